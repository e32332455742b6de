"""Quantised exports as other programs write them: by ModelOpt, and by the compressors of llm-compressor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import minipuzzle
from minipuzzle.errors import MinipuzzleError
from tests.support.cli import run_cli
from tests.support.tiny_models import write_family_checkpoint

TOKEN_IDS = torch.arange(3, 35)[None]
HEAD, FUSED, BLOCK = "lm_head", (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")), 16
MAX_KL = 1e-5  # nats/token; both sides compute in float32
# What neither program writes so that an engine could read it, by a part of what we say.
JOINT_EXPERTS = ("nemotron_h-moe", "granitemoehybrid-moe", "glm4_moe", "gpt_oss", "mixtral", "qwen3_moe")
REFUSED = {
    ("nemotron_h", "ModelOpt, FP8"): "ignore list of quantization_config is damaged",
    ("nemotron_h-moe", "ModelOpt, FP8"): "ignore list of quantization_config is damaged",
    ("gpt_oss", "ModelOpt, FP8"): "experts.0.down_proj.input_scale is missing",
    **{(name, "llm-compressor, FP8_DYNAMIC"): ".weight_scale is missing" for name in JOINT_EXPERTS},
    **{(name, "llm-compressor, NVFP4"): ".input_global_scale is missing" for name in JOINT_EXPERTS},
    # Told to, they quantise the two projections to one number a head, which no engine runs in FP8.
    ("qwen3_5_text", "llm-compressor, FP8_DYNAMIC"): "in_proj_a.weight_scale is unexpected",
    ("qwen3_5_text", "llm-compressor, NVFP4"): "in_proj_a.weight is missing",
}
# Experts of whole blocks, so that NVFP4 can hold them.
WIDTHS = {"nemotron_h-moe": {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48}}


def by_modelopt(model: Any, folder: Path) -> torch.Tensor:
    """Quantise, calibrate and export; what it computes before."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, logits)
    found = logits(model)
    export_hf_checkpoint(model, export_dir=folder)
    return found


def by_compressed_tensors(preset: str) -> Callable[[Any, Path], torch.Tensor]:
    """With scales as llm-compressor gives them: of each row, or one of the tensor and one of each block of a row."""

    def save(model: Any, folder: Path) -> torch.Tensor:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationStatus,
            apply_quantization_config,
            preset_name_to_scheme,
        )

        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != HEAD}
        inputs = largest_inputs(model, linears)
        scheme = preset_name_to_scheme(preset, ["Linear"])
        apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=[HEAD]))
        for name, module in linears.items():
            set_scales(name, linears, inputs)
            module.quantization_status = QuantizationStatus.FROZEN
        found = logits(model)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        compressor.remove_decompression_hook(model)
        model.save_pretrained(folder)
        compressor.update_config(str(folder))
        return found

    return save


def set_scales(name: str, linears: dict[str, Any], inputs: dict[str, torch.Tensor]) -> None:
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    module, (parent, _, last) = linears[name], name.rpartition(".")
    arguments, weight_RC = module.quantization_scheme.weights, module.weight.data
    if not hasattr(module, "weight_global_scale"):
        extremes = weight_RC.amin(1, keepdim=True), weight_RC.amax(1, keepdim=True)
        module.weight_scale.data = calculate_qparams(*extremes, arguments)[0]
        return
    group = next((group for group in FUSED if last in group), (last,))
    members = [member for part in group if (member := f"{parent}.{part}") in linears]
    amax = max(linears[member].weight.data.abs().max() for member in members)
    module.weight_global_scale.data = generate_gparam(-amax, amax)
    amax = max(inputs[member] for member in members)
    module.input_global_scale.data = generate_gparam(-amax, amax)
    blocks = weight_RC.unflatten(1, (-1, BLOCK))
    scales, _ = calculate_qparams(blocks.amin(2), blocks.amax(2), arguments, module.weight_global_scale.data)
    module.weight_scale.data = scales.to(module.weight_scale.dtype)


def largest_inputs(model: Any, linears: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, inputs: found.update({name: inputs[0].abs().max()})

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    logits(model)
    for hook in hooks:
        hook.remove()
    return found


PROGRAMS: dict[str, Callable[[Any, Path], torch.Tensor]] = {
    "ModelOpt, FP8": by_modelopt,
    "llm-compressor, FP8_DYNAMIC": by_compressed_tensors("FP8_DYNAMIC"),
    "llm-compressor, NVFP4": by_compressed_tensors("NVFP4"),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKEN_IDS, use_cache=False).logits
    return found.log_softmax(-1)


def foreign_row(name: str, work: Path) -> list[str]:
    """One row of the page; raises where it holds no longer."""
    return [f"`{name}`", *(_cell(name, program, work / str(number)) for number, program in enumerate(PROGRAMS))]


def _cell(name: str, program: str, work: Path) -> str:
    from transformers import AutoModelForCausalLM

    source, folder = write_family_checkpoint(work / "source", name, **WIDTHS.get(name, {})), work / "exported"
    theirs = PROGRAMS[program](AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), folder)
    if (reason := REFUSED.get((name, program))) is not None:
        try:
            minipuzzle.load(folder)
        except MinipuzzleError as error:
            assert reason in error.problem, error.problem
            return "refused"
        raise AssertionError(f"{name} by {program} is read now")
    kl = (theirs.exp() * (theirs - logits(minipuzzle.load(folder)))).sum(-1).mean()
    assert kl < MAX_KL, f"{name} by {program}: KL {kl}"
    found = run_cli("verify", folder, "--against", source, "--json")
    assert found.exit_code == 0, found.output
    return "yes"
