"""Number formats that exports quantise linear layers to: how weights become codes and scales, and back.

A scheme knows nothing of files: under which names and in which precision a layout stores what it computes is said in
``flavours.py``. Shape suffixes: R rows (outputs), C columns (inputs) of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from minipuzzle.architecture.memory import NVFP4_BLOCK
from minipuzzle.formats.e2m1 import (
    NVFP4_MAX,
    NVFP4_MAX_OF_TWO,
    decode_blocks,
    encode_closest,
    encode_rows,
    fake_quantize_blocks,
)
from minipuzzle.formats.e4m3 import E4M3_MAX, decode, encode, fake_quantize, row_scales
from minipuzzle.formats.flavours import CODES, SCALES, TENSOR_SCALE

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One number format.

    ``largest``: the value that one scale for a whole tensor, of weights or inputs, maps its largest to; None where
    there is no such scale, and so nothing to calibrate. ``weights_largest``: of weights alone, where it is another.
    ``encode`` takes rows as they are stored, the tensor's scale and the precision in which row scales are stored, and
    gives CODES and SCALES; rows are independent, so that a weight may be encoded piece by piece. ``decode`` is its
    inverse. ``round_inputs`` rounds activations as engines do.
    """

    name: str
    weights: str
    inputs: str
    largest: float | None
    columns_multiple: int
    encode: Callable[[torch.Tensor, torch.Tensor, torch.dtype], dict[str, torch.Tensor]]
    decode: Callable[[Parts], torch.Tensor]
    round_inputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weights_largest: float | None = None

    @property
    def has_tensor_scale(self) -> bool:
        """Whether weights and inputs have one scale for all their elements, the latter from calibration."""
        return self.largest is not None

    def fake_quantize(self, weight_RC: torch.Tensor, tensor_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A weight after a trip through the format, in float32. ``dtype``: precision of stored row scales."""
        parts = self.encode(weight_RC, tensor_scale, dtype)
        return self.decode({**parts, TENSOR_SCALE: tensor_scale})


def _encode_rows(rows_RC: torch.Tensor, _tensor_scale: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    # The scale is rounded first: codes must fit the scale that is stored.
    scale_R = row_scales(rows_RC).to(dtype)
    return {CODES: encode(rows_RC, scale_R.float()[:, None]), SCALES: scale_R}


def _encode_blocks(rows_RC: torch.Tensor, tensor_scale: torch.Tensor, _dtype: torch.dtype) -> dict[str, torch.Tensor]:
    codes_RC2, scale_RK = encode_rows(rows_RC, tensor_scale)
    return {CODES: codes_RC2, SCALES: scale_RK}


FP8 = Scheme(
    name="fp8",
    weights="FP8 E4M3, one scale a tensor",
    inputs="FP8 E4M3, one calibrated scale a tensor",
    largest=E4M3_MAX,
    columns_multiple=1,
    encode=lambda rows_RC, tensor_scale, _dtype: {CODES: encode(rows_RC, tensor_scale)},
    decode=lambda parts: decode(parts[CODES], parts[TENSOR_SCALE]),
    round_inputs=fake_quantize,
)
FP8_DYNAMIC = Scheme(
    name="fp8-dynamic",
    weights="FP8 E4M3, one scale for each output channel",
    inputs="FP8 E4M3, one scale a token, found while serving",
    largest=None,
    columns_multiple=1,
    encode=_encode_rows,
    decode=lambda parts: decode(parts[CODES], parts[SCALES].float().reshape(-1, 1)),
    round_inputs=lambda values, _scale: fake_quantize(values, row_scales(values)[..., None]),
)
NVFP4 = Scheme(
    name="nvfp4",
    weights="NVFP4: E2M1, an E4M3 scale for 16 values over one float32 scale a tensor",
    inputs="NVFP4, block scales found while serving under one calibrated scale a tensor",
    largest=NVFP4_MAX,
    columns_multiple=NVFP4_BLOCK,
    encode=_encode_blocks,
    decode=lambda parts: decode_blocks(parts[CODES], parts[SCALES], parts[TENSOR_SCALE]),
    round_inputs=fake_quantize_blocks,
)
# The same format: only what becomes of a weight differs.
NVFP4_CLOSEST = replace(
    NVFP4,
    encode=lambda rows_RC, tensor_scale, _dtype: dict(
        zip((CODES, SCALES), encode_closest(rows_RC, tensor_scale), strict=True)
    ),
    weights_largest=NVFP4_MAX_OF_TWO,
)
