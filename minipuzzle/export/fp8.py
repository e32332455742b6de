"""FP8 folders in ModelOpt's layout, which vLLM, SGLang and TensorRT-LLM load: calibrated, written, and verified.

No step needs the whole model in memory: tensors are written one by one, and calibration and verification run layer by
layer where the memory holds no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipuzzle.checkpoint import DEFAULT_SHARD_BYTES, Checkpoint, ShardWriter, copy_companions, write_json
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.bf16 import (
    ExportedFolder,
    check_export_target,
    deployed_architecture,
    portable_config,
    read_source,
)
from minipuzzle.export.calibration import ActivationAmax, measure_amax, open_stack
from minipuzzle.export.e4m3 import encode, scale_of
from minipuzzle.export.layout import (
    HF_QUANT_CONFIG,
    RECIPES,
    WEIGHT,
    Fp8Layout,
    cache_scale_name,
    fp8_layout,
    hf_quant_config,
    quantization_config,
)
from minipuzzle.export.model_card import CardFacts, PrecisionFacts, write_model_card
from minipuzzle.export.verify import Verification, expected_states, verification_slice, verify_fp8
from minipuzzle.outputs import output_folder
from minipuzzle.progress import Advance, no_progress
from minipuzzle.streaming import LayerStack

Scales = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Fp8Folder(ExportedFolder):
    """A finished FP8 export with what its verification measured."""

    verification: Verification

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {**super().to_json(), "verification": self.verification.to_json()}


def export_fp8(
    checkpoint: Checkpoint,
    calibration_token_ids: torch.Tensor,
    out: Path,
    *,
    recipe: str = "default",
    fp8_kv_cache: bool = False,
    device: str = "cpu",
    device_memory_bytes: int | None = None,
    overwrite: bool = False,
    base_model: str | None = None,
    quality: Mapping[str, Mapping[str, float | None]] | None = None,
    command: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    advance: Advance = no_progress,
) -> Fp8Folder:
    """Calibrate a checkpoint on tokens, write it as an FP8 folder, reload it and compare what it computes.

    Shapes: ``calibration_token_ids`` [windows, tokens] int64. ``quality``: rows of the card's table, data name ->
    metric -> value. ``device_memory_bytes`` limits weights and working memory (default: most of what is free); if the
    model does not fit, one layer at a time is in memory. ``advance`` is called once a layer of the calibration.

    Raises: MinipuzzleError for a quantised or damaged source, a target that may not be replaced, activations that are
    not finite, or a written folder that does not compute what was calibrated.
    """
    checkpoint.require_plain_weights()
    check_calibration(checkpoint, calibration_token_ids)
    check_export_target(checkpoint, out, overwrite=overwrite)
    layout = fp8_layout(deployed_architecture(checkpoint.architecture), recipe=recipe, fp8_kv_cache=fp8_kv_cache)
    provenance = _provenance(checkpoint, recipe, fp8_kv_cache, calibration_token_ids)
    stack = open_stack(checkpoint, calibration_token_ids, device=device, device_memory_bytes=device_memory_bytes)
    with output_folder(out, provenance, overwrite=overwrite) as partial:
        scales = calibrated_scales(stack, layout, calibration_token_ids, advance)
        del stack
        write_fp8(checkpoint, layout, scales, partial, max_shard_bytes)
        tokens_BT = verification_slice(calibration_token_ids)
        expected = expected_states(
            checkpoint, layout, scales, tokens_BT, device=device, device_memory_bytes=device_memory_bytes
        )
        verification = verify_fp8(
            checkpoint, partial, tokens_BT, expected, device=device, device_memory_bytes=device_memory_bytes
        )
        precision = _precision_facts(layout, recipe, calibration_token_ids, verification)
        facts = CardFacts(
            relation="quantized", base_model=base_model, precision=precision, quality=quality or {}, command=command
        )
        write_model_card(partial, checkpoint, facts)
        written = Checkpoint.open(partial)
        return Fp8Folder(
            folder=out,
            num_tensors=len(written.entries),
            weight_bytes=written.weight_bytes,
            verification=verification,
        )


def _provenance(
    checkpoint: Checkpoint, recipe: str, fp8_kv_cache: bool, calibration_token_ids: torch.Tensor
) -> dict[str, Any]:
    return {
        "command": "export",
        "format": "fp8",
        "source_fingerprint": checkpoint.fingerprint,
        "recipe": recipe,
        "fp8_kv_cache": fp8_kv_cache,
        "calibration": calibration_fingerprint(calibration_token_ids),
    }


def _precision_facts(
    layout: Fp8Layout, recipe: str, calibration_token_ids: torch.Tensor, verification: Verification
) -> PrecisionFacts:
    num_windows, num_tokens = calibration_token_ids.shape
    return PrecisionFacts(
        recipe=f"{recipe}: {RECIPES[recipe]}",
        ignored_modules=layout.ignored,
        fp8_kv_cache=layout.fp8_kv_cache,
        calibration=f"{num_windows:,} windows of {num_tokens:,} tokens",
        kl_from_source=verification.kl_from_source,
        agreement_with_source=verification.agreement_with_source,
        num_tokens=verification.num_tokens,
    )


def calibration_fingerprint(token_ids: torch.Tensor) -> str:
    """A short hash of calibration tokens."""
    return hashlib.sha256(f"{list(token_ids.shape)}".encode() + token_ids.numpy().tobytes()).hexdigest()[:16]


def calibrated_scales(
    stack: LayerStack, layout: Fp8Layout, token_ids_BT: torch.Tensor, advance: Advance = no_progress
) -> Scales:
    """All scales of an export by their names on disk, from its source and the tokens it is calibrated on."""
    amax = measure_amax(
        stack, token_ids_BT, input_modules=layout.quantized, output_modules=layout.cached, advance=advance
    )
    return activation_scales(layout, amax) | weight_scales(stack.checkpoint, layout)


def activation_scales(layout: Fp8Layout, amax: ActivationAmax) -> dict[str, torch.Tensor]:
    """Scales of inputs and of cached keys and values, by their names on disk; fused modules share one."""
    scales = {
        f"{module}.input_scale": scale_of(max(amax.inputs[sibling] for sibling in layout.scale_group(module)))
        for module in layout.quantized
    }
    return scales | {cache_scale_name(module): scale_of(amax.outputs[module]) for module in layout.cached}


def weight_scales(checkpoint: Checkpoint, layout: Fp8Layout) -> dict[str, torch.Tensor]:
    """Scales of weights, by their names on disk; fused modules share one. Reads one weight at a time."""
    amax = {module: checkpoint.tensor(module + WEIGHT).abs().amax().float() for module in layout.quantized}
    return {
        f"{module}.weight_scale": scale_of(max(amax[sibling] for sibling in layout.scale_group(module)))
        for module in layout.quantized
    }


def fp8_tensors(checkpoint: Checkpoint, layout: Fp8Layout, scales: Scales) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the export by name, one at a time: FP8 codes, BF16 for the rest, and the scales."""
    fp8_modules = {module + WEIGHT: module for module in layout.quantized}
    for tensor in deployed_architecture(checkpoint.architecture).tensors():
        values = read_source(checkpoint, tensor)
        if module := fp8_modules.get(tensor.name):
            yield tensor.name, encode(values, scales[f"{module}.weight_scale"])
        else:
            yield tensor.name, values.to(torch.bfloat16)
    # Fused modules share scales, and safetensors wants a memory of its own for each tensor.
    yield from ((name, scale.clone()) for name, scale in scales.items())


def write_fp8(checkpoint: Checkpoint, layout: Fp8Layout, scales: Scales, folder: Path, max_shard_bytes: int) -> None:
    """Write weights, scales, both quantisation configs and the files that go along."""
    config = {**portable_config(checkpoint), "quantization_config": quantization_config(layout)}
    write_json(folder / "config.json", config)
    write_json(folder / HF_QUANT_CONFIG, hf_quant_config(layout))
    copy_companions(checkpoint.folder, folder)
    writer = ShardWriter(folder, max_shard_bytes)
    for name, tensor in fp8_tensors(checkpoint, layout, scales):
        writer.add(name, tensor)
    writer.finish()


def check_calibration(checkpoint: Checkpoint, token_ids: torch.Tensor) -> None:
    """Refuse calibration tokens that the model does not know.

    Raises: MinipuzzleError if a token id is not in the vocabulary.
    """
    largest = int(token_ids.max())
    if largest >= checkpoint.architecture.vocabulary:
        raise MinipuzzleError(
            f"the tokenizer gives token {largest}, but the model knows {checkpoint.architecture.vocabulary:,}",
            "the folder's tokenizer belongs to another model",
        )
