"""NVFP4: 4-bit E2M1 values in blocks of 16 that share an E4M3 scale, over one float32 scale for the whole tensor.

The published rule (arXiv 2509.25149, appendix on NVFP4 quantisation; NVIDIA ModelOpt writes the same): the tensor's
scale is amax / (6 * 448), a block's scale is the nearest E4M3 value to block amax / (6 * tensor scale), and an
element's code is the E2M1 value nearest to element / (block scale * tensor scale), ties to the even code.

Shape suffixes: R rows, C columns, K blocks of a row (C / 16).
"""

from __future__ import annotations

import threading

import torch

from minipuzzle.architecture.memory import NVFP4_BLOCK as BLOCK
from minipuzzle.formats.e4m3 import E4M3, E4M3_MAX

E2M1_MAX = 6.0
NVFP4_MAX = E2M1_MAX * E4M3_MAX  # the largest value under a tensor scale of 1
# With room for the scale of a block whose largest value is mapped to 4 instead of 6: 1.5 * 256 is an E4M3 value.
NVFP4_MAX_OF_TWO = E2M1_MAX * 256
_SMALLEST_E4M3 = 2.0**-9
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def block_scales(values_RC: torch.Tensor, tensor_scale: torch.Tensor, largest_code: float = E2M1_MAX) -> torch.Tensor:
    """The E4M3 scale of each block, ``[rows, blocks]``; a block of zeros has scale 1.

    ``largest_code``: the value that a block's largest is mapped to.

    Computed in float64, because a quotient that float32 has rounded to the middle of two E4M3 values may round again.
    """
    amax_RK = values_RC.unflatten(-1, (-1, BLOCK)).abs().amax(-1).double()
    scale_RK = amax_RK / (largest_code * tensor_scale.to(values_RC.device).double())
    scale_RK = torch.where(amax_RK > 0, scale_RK, 1.0).clamp(_SMALLEST_E4M3, E4M3_MAX)
    return _nearest_e4m3(scale_RK)


def _nearest_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Positive float64 to E4M3 in one rounding: torch's own cast goes through float32."""
    # float32 by cutting, with the last bit set where something was cut off: then the next rounding is right.
    bits, cut_off = values.view(torch.int64), (1 << 29) - 1
    to_odd = (bits >> 29) | (((bits & cut_off) + cut_off) >> 29)
    return (to_odd - ((1023 - 127) << 23)).to(torch.int32).view(torch.float32).to(E4M3)


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


def encode_rows(rows_RC: torch.Tensor, tensor_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and block scales of some rows: what ``block_scales`` and ``encode_blocks`` find, to the bit.

    Rows in BF16, as nearly all checkpoints store them, take a tenth of their time.
    """
    if rows_RC.dtype == torch.bfloat16 and rows_RC.is_contiguous() and float(tensor_scale) > _LEAST_TENSOR_SCALE:
        return _encode_bf16(rows_RC, float(tensor_scale))
    values_RC = rows_RC.float()
    scale_RK = block_scales(values_RC, tensor_scale)
    return encode_blocks(values_RC, scale_RK, tensor_scale), scale_RK


def encode_closest(rows_RC: torch.Tensor, tensor_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and block scales of some rows: each block's largest value becomes 6 or 4, whichever leaves the
    smaller squared error. Between 4 and 6 there is no code, and values that lie there move most.

    Source: "Four Over Six", arXiv 2512.02010, sections 3 and 4 (tensor scale amax / (6 * 256), mean squared error).
    """
    values_RC = rows_RC.float()
    found = []
    for largest_code in (E2M1_MAX, 4.0):
        scale_RK = block_scales(values_RC, tensor_scale, largest_code)
        codes_RC2 = encode_blocks(values_RC, scale_RK, tensor_scale)
        error_RC = decode_blocks(codes_RC2, scale_RK, tensor_scale).sub_(values_RC)
        found.append((error_RC.square_().unflatten(-1, (-1, BLOCK)).sum(-1), codes_RC2, scale_RK))
    (by_six, codes_RC2, scale_RK), (by_four, other_codes_RC2, other_scale_RK) = found
    is_four_RK = by_four < by_six
    scale_RK = torch.where(is_four_RK, other_scale_RK.float(), scale_RK.float()).to(E4M3)
    return torch.where(is_four_RK.repeat_interleave(BLOCK // 2, -1), other_codes_RC2, codes_RC2), scale_RK


# BF16 numbers of one sign are ordered as their bits are, and an octave up is 128 more, so that codes can be found by
# comparing 16-bit integers, four to a 64-bit word. What follows is for that: values are never widened.
_LEAST_TENSOR_SCALE = 2.0**-100  # so that no bound of a code is subnormal
_EACH = 0x0001_0001_0001_0001
_OCTAVE = 128
_BIAS = (1023 - 127) << 7  # between exponents of float64 and of BF16
_MANTISSA_SHIFT = 52 - 7
_buffers = threading.local()


def _encode_bf16(rows_RC: torch.Tensor, tensor_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    words_4K = rows_RC.view(torch.int64).view(-1, BLOCK // 4).t()
    signs_4K, sizes_4K, code_4K, other_4K = _working_memory(words_4K.shape[1], rows_RC.device)
    signs_4K.copy_(words_4K)
    torch.bitwise_and(signs_4K, 0x7FFF * _EACH, out=sizes_4K)
    sizes, code, other = (words.view(torch.int16) for words in (sizes_4K, code_4K, other_4K))
    scale_K = _scales_of_bits(_largest_of_four(sizes.amax(0)), tensor_scale)
    step_K = scale_K.double().mul_(tensor_scale)

    def bound(factor: float, *, is_closed: bool, less: int = 0) -> torch.Tensor:
        """The largest BF16 number below ``factor`` steps, or not above if open: what is larger has a higher code."""
        bits_K = (step_K * factor).view(torch.int64)
        return (
            ((((bits_K - 1) if is_closed else bits_K) >> _MANTISSA_SHIFT) - _BIAS - less).mul_(_EACH).view(torch.int16)
        )

    torch.bitwise_right_shift(signs_4K, 12, out=code_4K)
    code_4K &= 8 * _EACH
    # Halfway between two codes the even one is right: 0.25 is 0 and 0.75 is 1, 1.25 is 1 and 1.75 is 2, and so on up.
    for factor, is_closed in ((0.25, False), (0.75, True)):
        torch.sub(bound(factor, is_closed=is_closed), sizes, out=other)
        other >>= 15  # -1 where the bound is passed
        code -= other
    for factor, is_closed, octaves in ((1.25, False, 3), (1.75, True, 2)):
        torch.sub(sizes, bound(factor, is_closed=is_closed, less=_OCTAVE - 1), out=other)
        other >>= 7  # the octaves by which the bound is passed, and one
        code += other.clamp_(0, octaves)
    for shift in (12, 24):  # the second code of each pair beside the first, the second pair beside the first
        code_4K |= torch.bitwise_right_shift(code_4K, shift, out=other_4K)
    packed_K4 = torch.empty(code_4K.shape[::-1], dtype=torch.int16, device=rows_RC.device).copy_(code_4K.t())
    return packed_K4.view(torch.uint8).view(len(rows_RC), -1), scale_K.view(len(rows_RC), -1)


def _working_memory(num_blocks: int, device: torch.device) -> list[torch.Tensor]:
    """Four words a block, four times; kept, because fresh memory takes longer than the arithmetic."""
    key = (num_blocks, device)
    if getattr(_buffers, "key", None) != key:
        shape = (BLOCK // 4, num_blocks)
        _buffers.key, _buffers.kept = key, [torch.empty(shape, dtype=torch.int64, device=device) for _ in range(4)]
    kept: list[torch.Tensor] = _buffers.kept
    return kept


def _largest_of_four(sizes: torch.Tensor) -> torch.Tensor:
    """The largest of each four BF16 numbers without signs, as bits, ``[words]``."""
    words_K = sizes.view(torch.int64)
    for shift in (32, 16):
        words_K = torch.maximum(words_K.view(torch.int16), (words_K >> shift).view(torch.int16)).view(torch.int64)
    return words_K & 0x7FFF


def _scales_of_bits(bits_K: torch.Tensor, tensor_scale: float) -> torch.Tensor:
    """``block_scales`` from the bits of each block's largest value."""
    scale_K = ((bits_K + _BIAS) << _MANTISSA_SHIFT).view(torch.float64).div_(E2M1_MAX * tensor_scale)
    return _nearest_e4m3(scale_K.masked_fill_(bits_K == 0, 1.0).clamp_(_SMALLEST_E4M3, E4M3_MAX))


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
    codes_RC2, scale_RK = encode_rows(values.flatten(0, -2), tensor_scale)
    decoded_RC = decode_blocks(codes_RC2, scale_RK, tensor_scale)
    return decoded_RC.view(values.shape).to(values.dtype)
