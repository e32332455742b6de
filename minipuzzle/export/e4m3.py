"""FP8 E4M3 with one scale a tensor: scales, codes, and rounding of a model's activations as engines do it."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def scale_of(amax: torch.Tensor | float) -> torch.Tensor:
    """The scale that maps a largest absolute value to the largest E4M3 value: amax / 448 in float32, 0-d.

    A tensor of zeros has no scale of its own: 1.0 keeps its codes zero, where 0 would make engines divide 0 by 0. The
    same holds for values so small that amax / 448 would no longer be a normal float32.
    """
    scale = torch.as_tensor(amax, dtype=torch.float32).detach().cpu() / E4M3_MAX
    return scale if scale >= torch.finfo(torch.float32).tiny else torch.tensor(1.0)


def encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E4M3 codes of values / scale, rounded once from float32, to nearest, ties to even.

    Dividing in bfloat16 would round twice and change about 3 % of the codes.
    """
    return (values.float() / scale.to(values.device)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 values that codes stand for."""
    return codes.float() * scale.to(codes.device)


def fake_quantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values after a trip through E4M3, in their own precision."""
    return decode(encode(values, scale), scale).to(values.dtype)


def round_inputs(linear: nn.Module, scale: torch.Tensor) -> RemovableHandle:
    """Make a module round its input to E4M3, as an engine's FP8 matrix product does."""
    return linear.register_forward_pre_hook(lambda _module, inputs: (fake_quantize(inputs[0], scale), *inputs[1:]))


def round_outputs(linear: nn.Module, scale: torch.Tensor) -> RemovableHandle:
    """Make a module round its output to E4M3, as an FP8 cache does with keys and values."""
    return linear.register_forward_hook(lambda _module, _inputs, output: fake_quantize(output, scale))
