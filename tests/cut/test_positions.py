"""Guarantee: positions along a dimension are those whose every unit stays, in order, however axes are laid out."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle.architecture.layers import Dimension
from minipuzzle.cut.plan import Choices
from minipuzzle.cut.surgery import kept_positions

AXES = ("a", "b", "c")
DIMENSIONS = st.lists(
    st.lists(st.sampled_from(AXES), min_size=1, max_size=2, unique=True).map(tuple), min_size=1, max_size=3
).map(tuple)
SIZES = st.fixed_dictionaries({axis: st.integers(1, 5) for axis in AXES})


@given(DIMENSIONS, SIZES, st.data())
def test_an_element_stays_where_all_its_units_do(
    dimension: Dimension, sizes: dict[str, int], data: st.DataObject
) -> None:
    subsets = {axis: st.sets(st.integers(0, size - 1), min_size=1) for axis, size in sizes.items()}
    cut = data.draw(st.sets(st.sampled_from(AXES)))
    kept = {axis: tuple(sorted(data.draw(subsets[axis]))) for axis in sorted(cut)}
    elements = [
        dict(zip(segment, units, strict=True))
        for segment in dimension
        for units in itertools.product(*(range(sizes[axis]) for axis in segment))
    ]
    wanted = [
        position
        for position, units in enumerate(elements)
        if all(unit in kept.get(axis, range(sizes[axis])) for axis, unit in units.items())
    ]
    found = kept_positions(dimension, sizes, kept)
    if found is None:
        assert wanted == list(range(len(elements))) and not cut & {axis for segment in dimension for axis in segment}
    else:
        np.testing.assert_array_equal(found, wanted)


@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 3), st.data())
def test_each_unit_of_the_first_axis_keeps_what_it_chose(a: int, b: int, c: int, data: st.DataObject) -> None:
    kept_a = tuple(sorted(data.draw(st.sets(st.integers(0, a - 1), min_size=1))))
    choices = tuple(tuple(sorted(data.draw(st.sets(st.integers(0, b - 1), min_size=1)))) for _ in range(a))
    positions = np.arange(a * b * c).reshape(a, b, c)
    wanted = [positions[first, second, third] for first in kept_a for second in choices[first] for third in range(c)]
    found = kept_positions((("a", "b", "c"),), {"a": a, "b": b, "c": c}, {"a": kept_a, "b": Choices(choices)})
    np.testing.assert_array_equal(found, wanted)
