"""Students computed in FP8: for speed on GPUs that multiply in FP8, or for training through an export's rounding.

Both change what the student's linear layers compute and leave its weights, their names and their float32 masters alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minipuzzle.devices import Device
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.formats.e4m3 import fake_quantize, scale_of
from minipuzzle.formats.layout import WEIGHT, export_layout
from minipuzzle.runtime.rounded_linear import RoundedLinear

UNCONVERTED_GEMMS = 4  # at either end of the model, as in Nemotron-H (arXiv 2504.03624)
_SMALLEST_CAPABILITY = (8, 9)  # of NVIDIA GPUs with FP8 matrix units
_GEMM_MULTIPLE = 16  # both sides of an FP8 product are multiples of this


def float8_obstacle(device: Device) -> str | None:
    """Why FP8 compute is not to be had on a device; None where it is."""
    if not device.speaks_cuda:
        return f"the device is {device.kind}, and FP8 matrix products need an NVIDIA GPU (Ada, Hopper or later)"
    properties = device.properties
    if (properties.major, properties.minor) < _SMALLEST_CAPABILITY:
        return f"{properties.name} has no FP8 matrix units"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (pip install 'minipuzzle[fp8]')"
    return None


def use_float8_compute(model: nn.Module, layers: nn.ModuleList, *, emulate: bool = False) -> tuple[str, ...]:
    """Make linear layers multiply in FP8 through torchao, one scale a tensor chosen at every use; says which.

    The first and last UNCONVERTED_GEMMS of the model stay in its own precision, and so do the LM head and layers whose
    sides are not multiples of 16. Forward products are E4M3, gradients E5M2. ``emulate``: the same rounding in plain
    arithmetic, for devices without FP8 units.
    Source: per-tensor current scaling of arXiv 2504.03624; torchao's "tensorwise" recipe.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    linears = _linears(model, layers)[UNCONVERTED_GEMMS:-UNCONVERTED_GEMMS]
    chosen = tuple(name for name, linear in linears if all(size % _GEMM_MULTIPLE == 0 for size in linear.weight.shape))
    convert_to_float8_training(
        model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=lambda _module, name: name in chosen
    )
    return chosen


def _linears(model: nn.Module, layers: nn.ModuleList) -> list[tuple[str, nn.Linear]]:
    """The linear layers inside a model's layers, first to last."""
    inside = set(layers.modules())
    return [(n, module) for n, module in model.named_modules() if isinstance(module, nn.Linear) and module in inside]


def train_through_fp8(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Make a student's linear layers round weights and inputs as its FP8 export will; says which.

    Scales and rounding are those of the export: amax / 448, one rounding, one scale for the weights that engines fuse.
    Weights are first rounded to the precision in which the student is stored, from which the export starts. The scale
    of inputs comes from the inputs at hand, where the export's comes from its calibration text. The gradient passes
    through the rounding unchanged (straight-through estimator, arXiv 1308.3432).
    """
    layout = export_layout(checkpoint.architecture, scheme="fp8")
    in_memory = checkpoint.family.modules.module_name
    groups: dict[tuple[str, ...], list[RoundedLinear]] = {}
    for module in layout.quantized:
        siblings = groups.setdefault(layout.scale_group(module), [])
        stored_dtype = _STORED_DTYPES.get(checkpoint.entries[module + WEIGHT].dtype)
        round_weight = partial(_round_weight, siblings=siblings, stored_dtype=stored_dtype)
        linear = model.get_submodule(in_memory(module))
        siblings.append(RoundedLinear(linear, round_inputs=_round_inputs, round_weight=round_weight))
        model.set_submodule(in_memory(module), siblings[-1])
    return tuple(in_memory(module) for module in layout.quantized)


_STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def _round_weight(weight: Tensor, *, siblings: Sequence[nn.Linear], stored_dtype: torch.dtype | None) -> Tensor:
    with torch.no_grad():
        amax = torch.stack([sibling.weight.abs().amax().float() for sibling in siblings]).amax()
    return _rounded(weight, _scale(amax), stored_dtype)


def _round_inputs(inputs: Tensor) -> Tensor:
    if not inputs.numel():  # an expert without tokens
        return inputs
    with torch.no_grad():
        scale = _scale(inputs.abs().amax())
    return _rounded(inputs, scale, None)


def _rounded(values: Tensor, scale: Tensor, stored_dtype: torch.dtype | None) -> Tensor:
    rounded: Tensor = _Rounded.apply(values, scale, stored_dtype)  # type: ignore[no-untyped-call]
    return rounded


def _scale(amax: Tensor) -> Tensor:
    return scale_of(amax).to(amax.device)


class _Rounded(torch.autograd.Function):
    """A trip through E4M3 whose gradient is that of doing nothing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, stored_dtype: torch.dtype | None) -> Tensor:
        stored = values if stored_dtype is None else values.to(stored_dtype)
        return fake_quantize(stored.float(), scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        return output_gradients[0], None, None
