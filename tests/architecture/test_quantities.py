"""Guarantee: sizes and counts mean what they say, and ambiguous ones are refused."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle.architecture.memory import PRECISIONS
from minipuzzle.architecture.quantities import (
    format_count,
    format_gib,
    parse_budget_bytes,
    parse_bytes,
    parse_count,
    parse_share_or_count,
)
from minipuzzle.errors import MinipuzzleError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1GiB", 2**30), ("31.7GiB", int(31.7 * 2**30)), ("32GB", 32 * 10**9), ("500 MiB", 500 * 2**20), ("7B", 7)],
)
def test_a_size_is_read_in_its_own_unit(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["12", "12 potatoes", "GiB", "-3GiB", "1e9", ""])
def test_a_size_without_a_known_unit_is_refused(text: str) -> None:
    with pytest.raises(MinipuzzleError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), ("128k", 128_000), ("1M", 10**6), ("1Mi", 2**20), ("1.5k", 1500)]
)
def test_a_count_is_decimal_unless_it_says_binary(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["1.5", "k", "3 GiB", "1.0001k"])
def test_a_count_that_is_not_whole_is_refused(text: str) -> None:
    with pytest.raises(MinipuzzleError):
        parse_count(text)


def test_a_budget_may_be_a_share_of_the_source() -> None:
    assert parse_budget_bytes("75%", 1000) == 750
    assert parse_budget_bytes("1GiB", 1000) == 2**30


@pytest.mark.parametrize("text", ["0%", "101%", "x%", "5MiB%"])
def test_a_share_outside_one_to_a_hundred_is_refused(text: str) -> None:
    with pytest.raises(MinipuzzleError):
        parse_budget_bytes(text, 1000)


def test_memory_prints_as_gib_with_enough_digits_for_small_models() -> None:
    assert format_gib(2**30) == "1.00 GiB"
    assert format_gib(8_000_000) == "0.0075 GiB"
    assert format_count(8_888_000_000) == "8.89 B"


def test_bytes_of_each_precision_follow_their_formats() -> None:
    """NVFP4 stores 4 bits an element and an 8-bit scale for each 16 of a row, the last block however short."""
    assert {name: precision.num_bytes((10, 16)) for name, precision in PRECISIONS.items()} == {
        "fp32": 640,
        "bf16": 320,
        "fp16": 320,
        "fp8": 160,
        "nvfp4": 90,
    }
    assert PRECISIONS["nvfp4"].num_bytes((3, 18)) == 3 * (9 + 2)


SUFFIXES = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4} | {
    f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)
}
DECIMALS = st.tuples(st.integers(0, 10**6), st.integers(0, 999)).map(lambda parts: f"{parts[0]}.{parts[1]:03}")


@given(DECIMALS, st.sampled_from(sorted(SUFFIXES)), st.sampled_from(["", " "]), st.booleans())
def test_sizes_are_exact_whatever_their_digits(number: str, suffix: str, space: str, is_lower: bool) -> None:
    """In binary fractions 0.1 GB would not be 100,000,000 bytes."""
    text = number + space + (suffix.lower() if is_lower else suffix)
    assert parse_bytes(text) == math.floor(Fraction(number) * SUFFIXES[suffix])


@given(st.integers(0, 10**15), DECIMALS, st.sampled_from(["k", "M", "B", "T", "Ki", "Mi", "Gi"]))
def test_counts_are_whole_or_refused(whole: int, number: str, suffix: str) -> None:
    assert parse_count(str(whole)) == whole
    factor = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[suffix]
    wanted = Fraction(number) * factor
    if wanted.denominator == 1:
        assert parse_count(number + suffix) == wanted
    else:
        with pytest.raises(MinipuzzleError, match="not a whole number"):
            parse_count(number + suffix)


@given(st.integers(1, 10**15), st.integers(1, 10_000))
def test_a_budget_is_never_above_its_share_and_a_count_never_below(whole: int, hundredths: int) -> None:
    share = Fraction(hundredths, 10_000) * whole
    text = f"{hundredths // 100}.{hundredths % 100:02}%"
    assert parse_budget_bytes(text, whole) == math.floor(share)
    assert parse_share_or_count(text, whole) == math.ceil(share)


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_a_mistake_with_a_hint(text: str) -> None:
    for parse in (parse_bytes, parse_count):
        try:
            assert parse(text) >= 0
        except MinipuzzleError as error:
            assert error.hint


def test_exponents_are_read_and_a_bare_share_is_asked_about() -> None:
    assert parse_count("7e9") == parse_count("7E+9") == 7 * 10**9
    with pytest.raises(MinipuzzleError, match=r"is 75% meant\?"):
        parse_bytes("0.75")
