"""Our own reader of exports: plain folders, and FP8 folders in ModelOpt's layout, computed as engines compute them.

transformers has no reader for that layout: it takes the FP8 codes for weights, ignores the scales, and does not fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from minipuzzle.checkpoint import Checkpoint, read_json
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.e4m3 import decode, round_inputs, round_outputs
from minipuzzle.export.layout import (
    HF_QUANT_CONFIG,
    WEIGHT,
    Fp8Layout,
    cache_scale_name,
    read_layout,
    scale_names,
)
from minipuzzle.families import Family
from minipuzzle.models import build_model, load_model

_PLAIN_DTYPES = ("BF16", "F16", "F32")
_MISMATCH = "config.json and the weights do not belong together; export again"


def load_any_model(source: Path | Checkpoint, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The whole model of a checkpoint with plain weights or of an FP8 export, in evaluation mode.

    Of an FP8 export the weights are codes * scale, and inputs of its linear layers (and keys and values for an FP8
    cache) are rounded to E4M3 by hooks. Only float32 holds codes * scale exactly.

    Raises: MinipuzzleError for an unknown format, or names, shapes, precisions or values that are wrong.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    if not checkpoint.is_quantized:
        return load_model(checkpoint, dtype=dtype, device=device)
    layout = check_fp8_export(checkpoint)
    scales = {name: _read_scale(checkpoint, name) for name in scale_names(layout)}
    tensors = _dequantized(checkpoint, layout, scales)
    model = build_model(checkpoint.config, tensors, dtype=dtype, device=device)
    round_activations(model, checkpoint.family, layout, scales)
    return model


def check_readable(checkpoint: Checkpoint) -> None:
    """Check from headers alone that ``load_any_model`` can read a checkpoint.

    Raises: MinipuzzleError naming what is wrong.
    """
    if checkpoint.is_quantized:
        check_fp8_export(checkpoint)
    else:
        checkpoint.require_plain_weights()


def check_fp8_export(checkpoint: Checkpoint) -> Fp8Layout:
    """Check names, shapes and precisions of an FP8 export against its config.json, from headers alone.

    Raises: MinipuzzleError naming the first tensor that is missing, unexpected, misshapen or of another precision.
    """
    config = checkpoint.config["quantization_config"]
    if not isinstance(config, Mapping):
        raise MinipuzzleError("config.json: quantization_config is not an object", "restore the file")
    layout = read_layout(checkpoint.architecture, config)
    _check_second_config(checkpoint, config)
    expected = _expected_headers(checkpoint, layout)
    for name in sorted(expected.keys() - checkpoint.entries.keys()):
        raise MinipuzzleError(f"{checkpoint.folder}: tensor {name} is missing", _MISMATCH)
    for name in sorted(checkpoint.entries.keys() - expected.keys()):
        raise MinipuzzleError(f"{checkpoint.folder}: tensor {name} is unexpected", _MISMATCH)
    for name, (shape, dtypes) in expected.items():
        entry = checkpoint.entries[name]
        if entry.shape != shape:
            raise MinipuzzleError(f"{name} has shape {list(entry.shape)}, not {list(shape)}", _MISMATCH)
        if entry.dtype not in dtypes:
            raise MinipuzzleError(f"{name} is stored as {entry.dtype}, not {' or '.join(dtypes)}", _MISMATCH)
    return layout


def _check_second_config(checkpoint: Checkpoint, config: Mapping[str, object]) -> None:
    path = checkpoint.folder / HF_QUANT_CONFIG
    if path.is_file() and read_json(path).get("quantization", {}).get("exclude_modules") != config.get("ignore"):
        raise MinipuzzleError(
            f"{path} and config.json leave different modules unquantised", "engines read one or the other: export again"
        )


def _expected_headers(checkpoint: Checkpoint, layout: Fp8Layout) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    fp8_weights = {module + WEIGHT for module in layout.quantized}
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for tensor in checkpoint.architecture.tensors():
        expected[tensor.name] = (tensor.shape, ("F8_E4M3",) if tensor.name in fp8_weights else _PLAIN_DTYPES)
    return expected | dict.fromkeys(scale_names(layout), ((), ("F32",)))


def _read_scale(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    scale = checkpoint.tensor(name)
    if not scale > 0:
        raise MinipuzzleError(f"{name} is {float(scale)}; a scale must be positive", "export again")
    return scale


def _dequantized(
    checkpoint: Checkpoint, layout: Fp8Layout, scales: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    scale_of_weight = {module + WEIGHT: scales[f"{module}.weight_scale"] for module in layout.quantized}
    for tensor in checkpoint.architecture.tensors():
        stored = checkpoint.tensor(tensor.name)
        if tensor.name not in scale_of_weight:
            yield tensor.name, stored
            continue
        values = decode(stored, scale_of_weight[tensor.name])
        if not torch.isfinite(values).all():
            raise MinipuzzleError(f"{tensor.name} holds codes that are not numbers", "export again")
        yield tensor.name, values


def round_activations(model: nn.Module, family: Family, layout: Fp8Layout, scales: Mapping[str, torch.Tensor]) -> None:
    """Make a model round the activations that an engine keeps in FP8, with the scales of an export."""
    for module in layout.quantized:
        round_inputs(model.get_submodule(family.modules.module_name(module)), scales[f"{module}.input_scale"])
    for module in layout.cached:
        round_outputs(model.get_submodule(family.modules.module_name(module)), scales[cache_scale_name(module)])
