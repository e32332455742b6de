"""FP8 E4M3: scales, codes, and a trip through the format."""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def scale_of(amax: torch.Tensor | float, largest: float = E4M3_MAX) -> torch.Tensor:
    """The scale that maps a largest absolute value to a format's largest, amax / 448 for E4M3, in float32, 0-d.

    A tensor of zeros has no scale of its own: 1.0 keeps its codes zero, where 0 would make engines divide 0 by 0. The
    same holds for values so small that the quotient would no longer be a normal float32.
    """
    scale = torch.as_tensor(amax, dtype=torch.float32).detach().cpu() / largest
    return scale if scale >= torch.finfo(torch.float32).tiny else torch.tensor(1.0)


def row_scales(values: torch.Tensor) -> torch.Tensor:
    """``scale_of`` for every row along the last dimension: float32, ``values.shape[:-1]``."""
    scales = values.abs().amax(-1).float() / E4M3_MAX
    return torch.where(scales >= torch.finfo(torch.float32).tiny, scales, 1.0)


def encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E4M3 codes of values / scale, rounded once from float32, to nearest, ties to even.

    Dividing in bfloat16 would round twice and change about 3 % of the codes.
    """
    wide = values.float()
    # A second copy in float32 would be the largest thing in memory.
    out = None if wide is values or wide.requires_grad else wide
    return torch.div(wide, scale.to(values.device), out=out).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 values that codes stand for."""
    return codes.float().mul_(scale.to(codes.device))


def fake_quantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values after a trip through E4M3, in their own precision."""
    return decode(encode(values, scale), scale).to(values.dtype)
