"""Guarantee: windows of training text are a pure function of documents, seed and number, and lose no token inside."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.training.data import PackedWindows
from minipuzzle.data.windows import IGNORE
from minipuzzle.errors import MinipuzzleError
from tests.support.distilling import LENGTH, windows


def test_an_epoch_predicts_each_token_once() -> None:
    tokens = list(range(5 * LENGTH + 1))
    data = PackedWindows([tokens], sequence_length=LENGTH)
    inputs, labels = data.batch(0, data.windows_per_epoch)
    assert sorted(inputs.flatten().tolist()) == tokens[:-1]
    assert sorted(labels.flatten().tolist()) == tokens[1:]
    assert torch.equal(inputs + 1, labels)


def test_windows_do_not_depend_on_what_was_read_before() -> None:
    per_epoch = windows().windows_per_epoch
    in_order = torch.cat([windows().batch(0, per_epoch)[0], windows().batch(per_epoch, per_epoch)[0]])
    data = windows()
    for number in (2 * per_epoch - 1, 0, per_epoch, 1, per_epoch - 1):
        assert torch.equal(data.batch(number, 1)[0][0], in_order[number])


def test_epochs_and_seeds_order_the_text_differently() -> None:
    per_epoch = windows().windows_per_epoch
    first, second = windows().batch(0, per_epoch)[0], windows().batch(per_epoch, per_epoch)[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, windows(seed=1).batch(0, per_epoch)[0])


def test_positions_and_epochs_are_told() -> None:
    data = windows()
    assert data.num_tokens == 6 * 61
    assert data.windows_per_epoch == (6 * 61 - 1) // LENGTH
    position = data.position(2 * data.windows_per_epoch + 3)
    assert (position.epoch, position.index) == (2, 3)
    assert data.epochs(3 * data.tokens_per_epoch) == 3


def test_too_little_text_is_refused() -> None:
    with pytest.raises(MinipuzzleError, match="fewer than one sequence"):
        PackedWindows([[1, 2, 3]], sequence_length=3)


@given(
    st.lists(st.lists(st.integers(3, 99), max_size=12), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 3)
)
def test_no_label_crosses_a_boundary_and_separate_windows_lose_nothing(
    documents: list[list[int]], length: int, seed: int
) -> None:
    pairs = [pair for tokens in documents for pair in pairwise(tokens)]
    for layout in ("packed", "separate"):
        try:
            data = PackedWindows(documents, sequence_length=length, seed=seed, layout=layout)
        except MinipuzzleError:
            assert sum(map(len, documents)) <= length or not pairs
            continue
        inputs, labels = data.batch(0, data.windows_per_epoch)
        counts = labels != IGNORE
        found = list(zip(inputs[counts].tolist(), labels[counts].tolist(), strict=True))
        assert int(counts.sum()) == data.labels_per_epoch
        assert all(found.count(pair) <= pairs.count(pair) for pair in found)
        if layout == "separate":
            assert sorted(found) == sorted(pairs)
