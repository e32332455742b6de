"""Guarantee: shares of sources are what their formulas say, and no source is read more often than it may be."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle.data.selecting.sampling import alpha, capped, natural, shares_by_name, unimax
from minipuzzle.errors import MinipuzzleError

SIZES = st.dictionaries(st.sampled_from("abcdef"), st.floats(1, 1e6), min_size=1)
FEASIBLE = st.floats(0.01, 0.99)  # of all that the sources can give


def test_alpha_of_one_is_natural_and_of_nought_is_even() -> None:
    sizes = {"a": 1.0, "b": 3.0}
    assert alpha(sizes, 1.0) == natural(sizes) == {"a": 0.25, "b": 0.75}
    assert alpha(sizes, 0.0) == {"a": 0.5, "b": 0.5}
    assert alpha(sizes, 2.0) == {"a": 0.1, "b": 0.9}


def test_unimax_is_even_until_a_source_is_used_up() -> None:
    assert unimax({"small": 10.0, "large": 1000.0, "mid": 100.0}, 300, 1) == {
        "small": pytest.approx(10 / 300),
        "large": pytest.approx(190 / 300),
        "mid": pytest.approx(100 / 300),
    }


@given(SIZES, FEASIBLE, st.floats(0.5, 8))
def test_unimax_raises_the_least_share_as_far_as_it_goes(
    sizes: dict[str, float], feasible: float, epochs: float
) -> None:
    """Water filling: all sources that are not used up have the same share, and no used-up one has more."""
    budget = feasible * epochs * sum(sizes.values())
    shares = unimax(sizes, budget, epochs)
    assert sum(shares.values()) == pytest.approx(1)
    free = [share for name, share in shares.items() if share * budget < epochs * sizes[name] * (1 - 1e-9)]
    assert all(share * budget <= epochs * sizes[name] * (1 + 1e-9) for name, share in shares.items())
    assert max(free, default=0) - min(free, default=0) < 1e-9
    assert all(share <= max(free, default=1) + 1e-9 for share in shares.values())


@given(SIZES, FEASIBLE, st.lists(st.floats(0.1, 9), min_size=6, max_size=6))
def test_caps_keep_the_proportions_of_what_is_not_capped(
    sizes: dict[str, float], feasible: float, weights: list[float]
) -> None:
    wanted = dict(zip(sizes, weights, strict=False))
    budget = feasible * 4 * sum(sizes.values())
    shares = capped(wanted, sizes, budget, 4)
    over = {name for name in sizes if shares[name] * budget > 4 * sizes[name] * (1 - 1e-9)}
    assert all(shares[name] * budget <= 4 * sizes[name] * (1 + 1e-6) for name in sizes)
    ratios = [shares[name] / wanted[name] for name in sizes if name not in over]
    assert max(ratios, default=0) - min(ratios, default=0) <= 1e-6 * max(ratios, default=1)
    assert sum(shares.values()) == pytest.approx(1)


def test_caps_find_what_enumeration_finds() -> None:
    """Which sources are capped: of all subsets the one in which every other source keeps below its cap."""
    sizes, wanted, budget, epochs = {"a": 5.0, "b": 20.0, "c": 100.0}, {"a": 6.0, "b": 3.0, "c": 1.0}, 100.0, 2.0
    found = []
    for capped_ones in product((False, True), repeat=3):
        full = {name for name, is_full in zip(sizes, capped_ones, strict=True) if is_full}
        left = budget - sum(epochs * sizes[name] for name in full)
        free = {name: wanted[name] for name in sizes if name not in full}
        tokens = {name: left * weight / sum(free.values()) for name, weight in free.items()}
        scale = left / sum(free.values()) if free else 0
        if all(tokens[name] <= epochs * sizes[name] for name in free) and all(
            scale * wanted[name] >= epochs * sizes[name] for name in full
        ):
            found.append({**{name: epochs * sizes[name] for name in full}, **tokens})
    assert len(found) == 1
    assert {name: share * budget for name, share in capped(wanted, sizes, budget, epochs).items()} == pytest.approx(
        found[0]
    )


def test_a_budget_beyond_all_epochs_is_refused() -> None:
    with pytest.raises(MinipuzzleError, match="4 epochs of all sources are 40 tokens, and 41 are wanted"):
        unimax({"a": 10.0}, 41, 4)


def test_a_rule_is_read_as_it_is_typed() -> None:
    assert shares_by_name("alpha=2", {"a": 1.0, "b": 3.0}, 1, 1) == {"a": 0.1, "b": 0.9}
    with pytest.raises(MinipuzzleError, match="unknown sampler 'unimaxx'"):
        shares_by_name("unimaxx", {"a": 1.0}, 1, 1)
    with pytest.raises(MinipuzzleError, match="no number"):
        shares_by_name("alpha=high", {"a": 1.0}, 1, 1)
