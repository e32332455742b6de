"""NVFP4: 4-bit E2M1 values in blocks of 16 that share an E4M3 scale, over one float32 scale for the whole tensor.

The published rule (arXiv 2509.25149, appendix on NVFP4 quantisation; NVIDIA ModelOpt writes the same): the tensor's
scale is amax / (6 * 448), a block's scale is the nearest E4M3 value to block amax / (6 * tensor scale), and an
element's code is the E2M1 value nearest to element / (block scale * tensor scale), ties to the even code.

Shape suffixes: R rows, C columns, K blocks of a row (C / 16).
"""

from __future__ import annotations

import torch

from minipuzzle.architecture.memory import NVFP4_BLOCK as BLOCK
from minipuzzle.formats.e4m3 import E4M3, E4M3_MAX

E2M1_MAX = 6.0
NVFP4_MAX = E2M1_MAX * E4M3_MAX  # the largest value under a tensor scale of 1
_SMALLEST_E4M3 = 2.0**-9
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def block_scales(values_RC: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """The E4M3 scale of each block, ``[rows, blocks]``; a block of zeros has scale 1.

    Computed in float64, because a quotient that float32 has rounded to the middle of two E4M3 values may round again.
    """
    amax_RK = values_RC.unflatten(-1, (-1, BLOCK)).abs().amax(-1).double()
    scale_RK = amax_RK / (E2M1_MAX * tensor_scale.to(values_RC.device).double())
    scale_RK = torch.where(amax_RK > 0, scale_RK, 1.0).clamp(_SMALLEST_E4M3, E4M3_MAX)
    return _nearest_e4m3(scale_RK)


def _nearest_e4m3(values: torch.Tensor) -> torch.Tensor:
    """float64 to E4M3 in one rounding: torch's own cast goes through float32."""
    # Rounding to 4 significant bits (3 below the smallest normal) is exact in float64: divide, round half to even.
    exponent = torch.frexp(values).exponent.clamp(min=-5)  # values = mantissa in [0.5, 1) * 2**exponent
    step = torch.ldexp(torch.ones_like(values), exponent - 4)
    return (torch.round(values / step) * step).to(E4M3)


def encode_blocks(values_RC: torch.Tensor, scale_RK: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """Codes, two a byte, ``[rows, columns / 2]`` uint8: even columns in the low half. Bit 3 is the sign."""
    # The product of 4 and 24 significant bits and the quotient below are float64, so that no middle is hit by rounding.
    step_RK = scale_RK.double() * tensor_scale.to(scale_RK.device).double()
    # In place where that is possible: fresh memory for each step would take longer than the arithmetic.
    magnitude_RC = values_RC.abs().double().unflatten(-1, (-1, BLOCK)).div_(step_RK[..., None]).flatten(-2)
    magnitude_RC.clamp_(max=E2M1_MAX)
    # Values lie 0.5 apart below 2, 1 apart below 4, then 2 apart; torch rounds halves to even, as codes want it.
    nearest_RC = (2 * magnitude_RC).round_()
    torch.minimum(nearest_RC, magnitude_RC.round().add_(2), out=nearest_RC)
    torch.minimum(nearest_RC, magnitude_RC.div_(2).round_().add_(4), out=nearest_RC)
    code_RC = nearest_RC.to(torch.uint8)
    code_RC |= torch.signbit(values_RC).to(torch.uint8) << 3
    packed_RC2: torch.Tensor = code_RC[..., ::2] | (code_RC[..., 1::2] << 4)
    return packed_RC2


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """The float32 values of E2M1 codes, two a byte, before any scale: twice as many along the last dimension."""
    values = torch.tensor([*_E2M1_VALUES, *(-value for value in _E2M1_VALUES)], device=codes.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # one look-up a byte
    found: torch.Tensor = pairs[codes.int()].flatten(-2)
    return found


def decode_blocks(codes_RC2: torch.Tensor, scale_RK: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """The float32 values that packed codes stand for, ``[rows, columns]``."""
    step_RK = scale_RK.float() * tensor_scale.to(codes_RC2.device)
    blocks_RKB = unpacked(codes_RC2).unflatten(-1, (-1, BLOCK))
    decoded_RC: torch.Tensor = blocks_RKB.mul_(step_RK[..., None]).flatten(-2)
    return decoded_RC


def fake_quantize_blocks(values: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """Values after a trip through NVFP4 with block scales of their own, in their own precision and shape."""
    rows_RC = values.float().flatten(0, -2)
    scale_RK = block_scales(rows_RC, tensor_scale)
    decoded_RC = decode_blocks(encode_blocks(rows_RC, scale_RK, tensor_scale), scale_RK, tensor_scale)
    return decoded_RC.view(values.shape).to(values.dtype)
