"""Runs in the vLLM environment: greedy tokens, prompt log-probabilities, each linear layer's output on probe inputs.

Arguments: folder, file with prompts (JSON, lists of token ids), precision, output file (safetensors: ``tokens.<i>``,
``logprobs.<i>``, ``probe.<module>.x`` and ``.y``, ``cache_scales`` as read from the folder; the metadata says how
modules are quantised and in what precision the KV cache is).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.kv_cache import KVCacheScaleParameter

NUM_NEW_TOKENS = 24
NUM_PROBE_ROWS = 16


def probe(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor | str]]:
    """Output of every linear layer on seeded inputs that fill its calibrated range."""
    found: dict[str, dict[str, torch.Tensor | str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase) or "conv1d" in name:
            continue
        generator = torch.Generator().manual_seed(len(found))
        inputs = torch.randn(NUM_PROBE_ROWS, module.input_size, generator=generator)
        scale = getattr(module, "input_scale", None)
        if scale is not None:
            inputs *= float(scale.max()) * 448 / float(inputs.abs().max())
        inputs = inputs.to(torch.bfloat16)
        output = module(inputs)
        output = output[0] if isinstance(output, tuple) else output
        found[name] = {"x": inputs, "y": output.detach().clone(), "method": type(module.quant_method).__name__}
    return found


def cache_precisions(model: torch.nn.Module) -> list[str]:
    """The precisions of the KV caches of all attention layers."""
    return sorted({str(module.kv_cache_dtype) for module in model.modules() if hasattr(module, "_k_scale")})


def record_cache_scales() -> list[float]:
    """A list that fills with the scales of keys and values that vLLM reads; it forgets those it has no use for."""
    read: list[float] = []
    load = KVCacheScaleParameter.weight_loader

    def recording(parameter: torch.nn.Parameter, scale: torch.Tensor) -> None:
        load(parameter, scale)
        read.append(float(parameter))

    KVCacheScaleParameter.weight_loader = staticmethod(recording)
    return read


def main(folder: str, prompts_file: str, dtype: str, out: str) -> None:
    """Load the folder, generate, and probe."""
    cache_scales = record_cache_scales()
    # vLLM computes with an FP8 cache on CPUs with AVX-512 or AMX only; elsewhere it reads the scales and is told to
    # keep BF16, because "auto" follows the folder and then refuses to run.
    can_cache_fp8 = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
    llm = LLM(
        folder,
        # A class of ours lies beside the files of models whose layers differ, and nowhere else.
        trust_remote_code="auto_map" in json.loads((Path(folder) / "config.json").read_text()),
        kv_cache_dtype="auto" if can_cache_fp8 else "bfloat16" if dtype == "bfloat16" else "auto",
        dtype=dtype,
        enforce_eager=True,
        max_model_len=512,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_logprobs=-1,
    )
    prompts = json.loads(Path(prompts_file).read_text())
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, detokenize=False)
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    results: dict[str, torch.Tensor] = {}
    for idx, answer in enumerate(llm.generate(inputs, greedy)):
        results[f"tokens.{idx}"] = torch.tensor(answer.outputs[0].token_ids)
    for idx, answer in enumerate(llm.generate(inputs, scored)):
        rows = [[row[token].logprob for token in range(len(row))] for row in answer.prompt_logprobs[1:]]
        results[f"logprobs.{idx}"] = torch.tensor(rows)
    methods, caches = {}, []
    results["cache_scales"] = torch.tensor(cache_scales)
    if dtype == "bfloat16":
        caches = llm.apply_model(cache_precisions)[0]
        for name, parts in llm.apply_model(probe)[0].items():
            methods[name] = parts["method"]
            results |= {f"probe.{name}.{key}": parts[key] for key in ("x", "y")}
    results = {name: tensor.contiguous().clone() for name, tensor in results.items()}
    metadata = {"methods": methods, "caches": caches, "can_cache_fp8": can_cache_fp8}
    save_file(results, out, metadata={key: json.dumps(value) for key, value in metadata.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
