"""Our own reader of exports: plain folders, and FP8 folders in ModelOpt's layout, computed as engines compute them.

transformers has no reader for that layout: it takes the FP8 codes for weights, ignores the scales, and does not fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from minipuzzle.models import load_model

_PLAIN_DTYPES = ("BF16", "F16", "F32")
_MISMATCH = "config.json and the weights do not belong together; export again"


class Fp8Checkpoint(Checkpoint):
    """An FP8 export that reads like a plain checkpoint: each weight is the float32 values that its codes stand for.

    Only float32 holds them exactly. Activations are rounded by ``round_activations``, once a model is built.
    """

    def __init__(self, source: Checkpoint) -> None:
        """Check an export's headers and read its scales.

        Raises: MinipuzzleError naming what is missing, unexpected or wrong.
        """
        self.layout = check_fp8_export(source)
        self.scales = {name: _read_scale(source, name) for name in scale_names(self.layout)}
        weights = {name: entry for name, entry in source.entries.items() if name not in self.scales}
        super().__init__(source.folder, source.config, weights)
        self._scale_of_weight = {module + WEIGHT: f"{module}.weight_scale" for module in self.layout.quantized}

    def require_plain_weights(self) -> None:
        """Nothing to refuse: the headers were checked when this was made."""

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor: codes * scale in float32 where it is quantised, else as stored.

        Raises: MinipuzzleError if it holds values that are not finite.
        """
        stored = super().tensor(name)
        if name not in self._scale_of_weight:
            return stored
        values = decode(stored, self.scales[self._scale_of_weight[name]])
        if not torch.isfinite(values).all():
            raise MinipuzzleError(f"{name} holds codes that are not numbers", "export again")
        return values


def load_any_model(source: Path | Checkpoint, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The whole model of a checkpoint with plain weights or of an FP8 export, in evaluation mode.

    Of an FP8 export the weights are codes * scale, and inputs of its linear layers (and keys and values for an FP8
    cache) are rounded to E4M3 by hooks.

    Raises: MinipuzzleError for an unknown format, or names, shapes, precisions or values that are wrong.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    if not checkpoint.is_quantized:
        return load_model(checkpoint, dtype=dtype, device=device)
    export = Fp8Checkpoint(checkpoint)
    model = load_model(export, dtype=dtype, device=device)
    modules = export.family.modules
    round_activations(lambda name: model.get_submodule(modules.module_name(name)), export.layout, export.scales)
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


def round_activations(
    find_module: Callable[[str], nn.Module], layout: Fp8Layout, scales: Mapping[str, torch.Tensor]
) -> None:
    """Make the modules of a model, found by their names on disk, round the activations that engines keep in FP8."""
    for module in layout.quantized:
        round_inputs(find_module(module), scales[f"{module}.input_scale"])
    for module in layout.cached:
        round_outputs(find_module(module), scales[cache_scale_name(module)])
