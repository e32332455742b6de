"""Guarantee: both codecs round every value to the nearest that their format has, whatever the values and scales."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minipuzzle.formats.e2m1 import (
    NVFP4_MAX,
    NVFP4_MAX_OF_TWO,
    block_scales,
    decode_blocks,
    encode_blocks,
    encode_closest,
    encode_rows,
)
from minipuzzle.formats.e4m3 import E4M3, E4M3_MAX, decode, encode, scale_of
from tests.support.oracles import reference_codes, reference_nvfp4

Values = NDArray[np.float32]


def values(num: int, largest: float = 2.0**14) -> st.SearchStrategy[Values]:
    """Numbers of all sizes: whole ones and halves hit the middle between two codes more often than chance would."""
    sizes = st.floats(-largest, largest, width=32) | st.integers(-2000, 2000).map(lambda n: n / 64)
    return st.lists(sizes, min_size=num, max_size=num).map(lambda found: np.array(found, dtype=np.float32))


def unpacked(codes: torch.Tensor) -> NDArray[np.uint8]:
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).numpy()


@given(values(32), st.integers(-20, 20))
def test_e4m3_codes_are_the_nearest_ones(found: Values, exponent: int) -> None:
    scale = 2.0**exponent  # so that dividing is exact
    codes = encode(torch.from_numpy(found), torch.tensor(scale)).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes, reference_codes(found, scale))


@given(values(32))
def test_e4m3_keeps_the_order_and_the_size_of_values(found: Values) -> None:
    ascending = torch.from_numpy(np.sort(found))
    scale = scale_of(ascending.abs().max())
    rounded = decode(encode(ascending, scale), scale)
    assert (rounded.diff() >= 0).all()
    steps = torch.maximum(ascending.abs() * 2.0**-4, scale * 2.0**-10)  # half a step of 4 significant bits
    assert ((rounded - ascending).abs() <= steps * (1 + 1e-6)).all()


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_every_e4m3_code_survives_the_way_there_and_back(scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(E4M3)  # without NaN
    again = encode(decode(codes, torch.tensor(scale)), torch.tensor(scale))
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


@given(values(64))
def test_nvfp4_codes_and_scales_follow_the_published_rule(found: Values) -> None:
    weight_RC = found.reshape(2, 32)
    scale = scale_of(float(np.abs(found).max()), NVFP4_MAX)
    scale_RK = block_scales(torch.from_numpy(weight_RC), scale)
    codes = encode_blocks(torch.from_numpy(weight_RC), scale_RK, scale)
    wanted_codes, wanted_scales = reference_nvfp4(weight_RC, scale.item())
    np.testing.assert_array_equal(scale_RK.float().numpy(), wanted_scales)
    np.testing.assert_array_equal(unpacked(codes), wanted_codes)
    assert float(scale_RK.float().max()) <= E4M3_MAX


@given(st.lists(st.integers(0, 255), min_size=8, max_size=8), st.floats(2.0**-9, 448))
def test_every_e2m1_code_survives_the_way_there_and_back(found: list[int], scale: float) -> None:
    codes_RC2 = torch.tensor([found], dtype=torch.uint8)
    scale_RK, one = torch.tensor([[scale]]).to(E4M3), torch.tensor(1.0)
    again = encode_blocks(decode_blocks(codes_RC2, scale_RK, one), scale_RK, one)
    assert torch.equal(again, codes_RC2)


@given(values(64), st.integers(-60, 60), st.booleans())
def test_nvfp4_codes_of_bf16_rows_are_those_of_the_same_numbers_in_float32(
    found: Values, exponent: int, is_calibrated: bool
) -> None:
    rows_RC = torch.from_numpy(found.reshape(2, 32)).mul(2.0**exponent).bfloat16()
    rows_RC[0, :16] *= 2.0**-12  # a block whose scale is at the lower end
    amax = rows_RC.abs().max() if is_calibrated else 2.0**exponent
    scale = scale_of(amax, NVFP4_MAX)
    codes, scale_RK = encode_rows(rows_RC, scale)
    wanted = block_scales(rows_RC.float(), scale)
    assert torch.equal(scale_RK.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(codes, encode_blocks(rows_RC.float(), wanted, scale))


def test_every_bf16_number_has_the_code_of_its_float32() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    rows_RC = numbers[numbers.isfinite()].clone().view(-1, 16)
    for scale in (2.0**-30, 3e-5, 1.0, 0.7):
        codes, scale_RK = encode_rows(rows_RC, torch.tensor(scale))
        assert torch.equal(codes, encode_blocks(rows_RC.float(), scale_RK, torch.tensor(scale)))


@given(values(64, largest=8.0))
def test_the_closer_of_two_block_scales_is_taken(found: Values) -> None:
    weight_RC = torch.from_numpy(found.reshape(2, 32))
    scale = scale_of(float(np.abs(found).max()), NVFP4_MAX_OF_TWO)

    def errors_of(codes: torch.Tensor, scale_RK: torch.Tensor) -> torch.Tensor:
        errors_RC: torch.Tensor = (decode_blocks(codes, scale_RK, scale) - weight_RC).square()
        return errors_RC.view(2, 2, 16).sum(-1)

    tried = []
    for largest in (6.0, 4.0):
        scale_RK = block_scales(weight_RC, scale, largest)
        tried.append(errors_of(encode_blocks(weight_RC, scale_RK, scale), scale_RK))
    assert torch.equal(errors_of(*encode_closest(weight_RC, scale)), torch.minimum(*tried))
