"""Guarantee: real engines, each in an environment of its own, load our exports and compute what we say they compute.

mlx-lm and vLLM's CPU build read the BF16 folder; vLLM reads the FP8 folders of both layouts. FP8 is judged layer by
layer on probe inputs, against our emulation of weights and activations in FP8 and against weights alone; tokens prove
nothing there. Set up and run by `make test-engines`.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import minipuzzle
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.corpus import read_documents, sample_windows
from minipuzzle.evaluate import divergence_sums
from minipuzzle.export.reader import QuantizedCheckpoint
from minipuzzle.export.run import ExportRequest, export_checkpoint
from minipuzzle.export.verify import open_any
from minipuzzle.models import load_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny_hybrid"
ENGINES = ROOT / ".venv-engines"
PROMPT_LENGTHS = (5, 37, 150, 300)
NUM_NEW_TOKENS = 24
MAX_KL = 0.01  # nats/token, of vLLM in BF16 from our float32 emulation
pytestmark = [pytest.mark.slow, pytest.mark.engines]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an engine computed."""

    tensors: dict[str, torch.Tensor]
    methods: dict[str, str]
    can_cache_fp8: bool = False


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded hybrid in each format, calibrated on its text."""
    root = tmp_path_factory.mktemp("exports")
    source = Checkpoint.open(EXAMPLE / "model")
    documents = read_documents([EXAMPLE / "text" / "calibration.jsonl"])
    token_ids = sample_windows(load_tokenizer(source.folder), documents, num_samples=16, sequence_length=256)
    requests = {
        "bf16": ExportRequest(),
        "modelopt": ExportRequest(scheme="fp8", fp8_kv_cache=True),
        "compressed-tensors": ExportRequest(scheme="fp8-dynamic", flavour="compressed-tensors"),
    }
    for name, request in requests.items():
        export_checkpoint(source, root / name, request, calibration_token_ids=token_ids)
    prompts = sample_windows(load_tokenizer(source.folder), documents, num_samples=4, sequence_length=300, seed=1)
    cut = [row[:length].tolist() for row, length in zip(prompts, PROMPT_LENGTHS, strict=True)]
    (root / "prompts.json").write_text(json.dumps(cut))
    return {name: root / name for name in requests}


def prompts_of(folder: Path) -> list[list[int]]:
    prompts: list[list[int]] = json.loads((folder.parent / "prompts.json").read_text())
    return prompts


def ask(engine: str, folder: Path, *options: str) -> Answer:
    """Run an engine's script in its environment."""
    out = folder.with_name(f"{folder.name}-{engine}-{'-'.join(options)}.safetensors")
    python, script = ENGINES / engine / "bin" / "python", Path(__file__).with_name(f"run_{engine}.py")
    assert python.exists(), "the engines are not set up: run `make test-engines`"
    command = [str(part) for part in (python, script, folder, folder.parent / "prompts.json", *options, out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata() or {}
    return Answer(
        tensors=load_file(out),
        methods=json.loads(metadata.get("methods", "{}")),
        can_cache_fp8=json.loads(metadata.get("can_cache_fp8", "false")),
    )


@torch.inference_mode()
def our_logits(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([prompt]), use_cache=False).logits[0].float()
    return logits


@torch.inference_mode()
def our_greedy_tokens(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NUM_NEW_TOKENS):
        tokens.append(int(our_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_mlx_lm_reads_the_bf16_export_and_agrees_on_log_probabilities(folders: dict[str, Path]) -> None:
    found = ask("mlx", folders["bf16"]).tensors
    model = minipuzzle.load(folders["bf16"])
    for idx, prompt in enumerate(prompts_of(folders["bf16"])):
        difference = (our_logits(model, prompt).log_softmax(-1) - found[f"logprobs.{idx}"]).abs().max()
        print(f"mlx-lm, {len(prompt)} tokens: largest difference of log-probabilities {difference:.1e}")
        assert difference < 1e-4


def test_vllm_reads_the_bf16_export_and_continues_prompts_with_the_same_tokens(folders: dict[str, Path]) -> None:
    found = ask("vllm", folders["bf16"], "float32").tensors
    model = minipuzzle.load(folders["bf16"])
    for idx, prompt in enumerate(prompts_of(folders["bf16"])):
        assert found[f"tokens.{idx}"].tolist() == our_greedy_tokens(model, prompt)
        ours = our_logits(model, prompt)[:-1].log_softmax(-1)
        difference = (ours - found[f"logprobs.{idx}"]).abs().max()
        print(f"vLLM, float32, {len(prompt)} tokens: same greedy tokens, log-probabilities within {difference:.1e}")
        assert difference < 1e-4


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors"])
def test_vllm_computes_each_fp8_layer_as_our_emulation_does(folders: dict[str, Path], name: str) -> None:
    answer = ask("vllm", folders[name], "bfloat16")
    export = open_any(folders[name])
    assert isinstance(export, QuantizedCheckpoint)
    num_probed = check_probes(answer, export)
    assert num_probed == len(export.layout.quantized)
    caches = {key: value for key, value in answer.methods.items() if key.startswith("cache.")}
    print(f"KV caches: {sorted(set(caches.values()))}; this CPU computes with FP8 caches: {answer.can_cache_fp8}")
    check_divergence(answer, folders[name])


def check_probes(answer: Answer, export: QuantizedCheckpoint) -> int:
    """Compare every quantised linear layer's output on its probe; returns how many of our modules that covered."""
    scheme = export.layout.scheme
    assert scheme is not None
    num_probed, worst, nearest_plain = 0, 0.0, 1.0
    for engine_name in [key for key in answer.methods if not key.startswith("cache.")]:
        modules = modules_of(engine_name, export)
        assert modules, f"{engine_name} is none of ours"
        if not export.layout.is_quantized(modules[0]):
            assert "Unquantized" in answer.methods[engine_name], engine_name
            continue
        inputs, output = (answer.tensors[f"probe.{engine_name}.{key}"].float() for key in ("x", "y"))
        weight = torch.cat([export.tensor(f"{module}.weight") for module in modules])
        scale = export.scales.inputs.get(modules[0], torch.tensor(1.0))
        expected, plain = scheme.round_inputs(inputs, scale) @ weight.T, inputs @ weight.T
        error = float((output - expected).norm() / expected.norm())
        plain_error = float((output - plain).norm() / plain.norm())
        assert error < 0.01, f"{engine_name}: {error:.2%} from our emulation"
        assert plain_error > 2 * error, f"{engine_name}: weights alone are as near ({plain_error:.2%})"
        worst, nearest_plain = max(worst, error), min(nearest_plain, plain_error)
        num_probed += len(modules)
    print(f"{num_probed} modules: at most {worst:.2%} from our emulation; weights alone at least {nearest_plain:.2%}")
    return num_probed


def modules_of(engine_name: str, export: QuantizedCheckpoint) -> list[str]:
    """Our names of what an engine's module computes, in its order."""
    name = re.sub(r"^model\.", "backbone.", engine_name)
    names = [name.replace("qkv_proj", f"{part}_proj") for part in "qkv"] if "qkv_proj" in name else [name]
    known = {*export.layout.quantized, *export.layout.ignored}
    return [module for module in names if module in known]


def check_divergence(answer: Answer, folder: Path) -> None:
    """The KL of an engine in BF16 from our emulation in float32."""
    model = minipuzzle.load(folder)
    kl, num_tokens = 0.0, 0
    for idx, prompt in enumerate(prompts_of(folder)):
        ours = our_logits(model, prompt)[:-1]
        kl += divergence_sums(ours, answer.tensors[f"logprobs.{idx}"])[0]
        num_tokens += len(ours)
    print(f"KL of vLLM in BF16 from our emulation: {kl / num_tokens:.2g} nats/token on {num_tokens} tokens")
    assert kl / num_tokens < MAX_KL
