"""Guarantee: intervals, tests and the sentence about them are those of the textbooks, and cover what they claim."""

from __future__ import annotations

import random

import pytest
from scipy.stats import binomtest

from minipuzzle.abilities.statistics import (
    difference_of,
    items_needed,
    share_of,
    smallest_visible_gap,
    what_items_show,
)


@pytest.mark.parametrize(("right", "number"), [(0, 5), (3, 20), (81, 263), (50, 50)])
def test_the_interval_of_a_share_is_wilsons(right: int, number: int) -> None:
    share = share_of([1.0] * right + [0.0] * (number - right))
    wanted = binomtest(right, number).proportion_ci(0.95, method="wilson")
    assert (share.low, share.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert share.mean == right / number


def paired(both: int, won: int, lost: int, neither: int) -> tuple[list[float], list[float]]:
    pairs = [(1.0, 1.0)] * both + [(1.0, 0.0)] * won + [(0.0, 1.0)] * lost + [(0.0, 0.0)] * neither
    return [one for one, _ in pairs], [other for _, other in pairs]


@pytest.mark.parametrize(
    ("table", "interval"),
    [
        # Newcombe 1998, table III, method 10: (both, won, lost, neither) and his limits.
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((16, 20, 4, 20), None),
        ((0, 0, 0, 30), (-0.1135, 0.1135)),
    ],
)
def test_the_interval_of_a_difference_is_newcombes(
    table: tuple[int, int, int, int], interval: tuple[float, float] | None
) -> None:
    one, other = paired(*table)
    found, mirrored = difference_of(one, other), difference_of(other, one)
    assert (found.low, found.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-12)
    assert found.low <= found.mean <= found.high
    if interval is not None:
        assert (found.low, found.high) == pytest.approx(interval, abs=2e-3)
    assert (found.wins, found.losses) == table[1:3]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(800):
        pairs = [(float(rng.random() < 0.6), float(rng.random() < 0.45)) for _ in range(40)]
        found = difference_of([one for one, _ in pairs], [other for _, other in pairs])
        covered += found.low <= 0.15 <= found.high
    assert 0.93 <= covered / 800 <= 0.98


def test_the_sign_test_counts_items_that_differ() -> None:
    found = difference_of(*paired(10, 1, 9, 80))
    assert found.p_value == pytest.approx(binomtest(1, 10).pvalue)
    assert difference_of(*paired(10, 0, 0, 10)).p_value == 1.0
    scored = difference_of([0.5, 0.25, 1.0], [0.25, 0.25, 0.5])
    assert (scored.wins, scored.losses) == (2, 0) and scored.mean == pytest.approx(0.25)


def test_the_smallest_gap_is_the_first_that_a_sign_test_sees() -> None:
    number = 20
    needed = round(smallest_visible_gap(number) * number)
    assert difference_of(*paired(0, needed, 0, number - needed)).p_value < 0.05
    assert difference_of(*paired(0, needed - 1, 0, number - needed + 1)).p_value > 0.05


def test_so_many_items_show_the_gap_four_times_in_five() -> None:
    rng, number = random.Random(1), items_needed(0.1, 0.3)
    seen = 0
    for _ in range(300):
        draws = [rng.random() for _ in range(number)]
        won, lost = sum(draw < 0.2 for draw in draws), sum(0.2 <= draw < 0.3 for draw in draws)
        seen += binomtest(won, won + lost).pvalue < 0.05
    assert 0.72 <= seen / 300 <= 0.88


def test_the_sentence_says_what_few_items_cannot_show() -> None:
    assert "a gap below 30% cannot be told from chance" in what_items_show(difference_of(*paired(10, 2, 1, 7)))
    assert "5 items can show nothing" in what_items_show(difference_of(*paired(0, 5, 0, 0)))
