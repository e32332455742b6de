"""Students computed in FP8: for speed on GPUs that multiply in FP8, or for training through an export's rounding.

Both change what the student's linear layers compute and leave its weights, their names and their float32 masters alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipuzzle.architecture.families import Family
from minipuzzle.architecture.model import Architecture
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.formats.e4m3 import fake_quantize, scale_of
from minipuzzle.formats.layout import export_layout

UNCONVERTED_GEMMS = 4  # at either end of the model, as in Nemotron-H (arXiv 2504.03624)
_SMALLEST_CAPABILITY = (8, 9)  # of NVIDIA GPUs with FP8 matrix units
_GEMM_MULTIPLE = 16  # both sides of an FP8 product are multiples of this


def float8_obstacle(device: torch.device) -> str | None:
    """Why FP8 compute is not to be had on a device; None where it is."""
    if device.type != "cuda":
        return f"the device is {device.type}, and FP8 matrix products need an NVIDIA GPU (Ada, Hopper or later)"
    capability = torch.cuda.get_device_capability(device)
    if capability < _SMALLEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no FP8 matrix units"
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
    family, architecture = checkpoint.family, checkpoint.architecture
    names, groups = _quantized_modules(architecture, family)
    for name in names:
        linear = _linear(model, name)
        siblings = tuple(_linear(model, sibling) for sibling in groups[name])
        stored_dtype = _STORED_DTYPES.get(checkpoint.entries[_disk_name(checkpoint, name)].dtype)
        linear.__dict__["forward"] = partial(_rounded_linear, linear, siblings, stored_dtype)
    return names


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear), f"{name} is not a linear layer"
    return module


_STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def _quantized_modules(
    architecture: Architecture, family: Family
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The modules that an FP8 export quantises, by their names in memory, and those that share each one's scale."""
    layout = export_layout(architecture, scheme="fp8")
    in_memory: Callable[[str], str] = family.modules.module_name
    groups = {
        in_memory(module): tuple(in_memory(sibling) for sibling in layout.scale_group(module))
        for module in layout.quantized
    }
    return tuple(groups), groups


def _disk_name(checkpoint: Checkpoint, module: str) -> str:
    in_memory = checkpoint.family.modules.module_name
    return next(name for name in checkpoint.entries if in_memory(name) == f"{module}.weight")


def _rounded_linear(
    linear: nn.Linear, siblings: tuple[nn.Linear, ...], stored_dtype: torch.dtype | None, inputs: Tensor
) -> Tensor:
    with torch.no_grad():
        amax = torch.stack([sibling.weight.abs().amax().float() for sibling in siblings]).amax()
        largest_input = inputs.abs().amax() if inputs.numel() else amax  # an expert without tokens
        weight_scale, input_scale = _scale(amax), _scale(largest_input)
    weight = _rounded(linear.weight, weight_scale, stored_dtype)
    return F.linear(_rounded(inputs, input_scale, None), weight, linear.bias)


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
