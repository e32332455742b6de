"""Guarantee: chunks are taken by their importance weights, up to the budget, whoever works and in whatever order."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re

import numpy as np
import pytest

from minipuzzle.data.rows import Row
from minipuzzle.data.runner import attempts_of
from minipuzzle.data.selecting import dsir

CODE = "def add ( first , second ) : return first + second # numbers of lists and dictionaries in functions "
SPEECH = "the people of this nation shall remember what the house and the senate have done for them today "


def documents(seed: int, words: str, number: int) -> list[Row]:
    chance, vocabulary = random.Random(seed), words.split()
    return [Row(text=" ".join(chance.choices(vocabulary, k=200)), source=words[:3]) for _ in range(number)]


POOL = [*documents(0, CODE, 12), *documents(1, SPEECH, 12)]


def test_a_log_weight_is_the_sum_over_hashed_words_and_pairs() -> None:
    text, target, raw = "One two, one!", np.full(dsir.NUM_BUCKETS, 2e-4), np.full(dsir.NUM_BUCKETS, 1e-4)
    words = ["one", "two", ",", "one", "!"]
    ngrams = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
    buckets = [int(hashlib.sha256(ngram.encode()).hexdigest(), 16) % 10_000 for ngram in ngrams]
    target[buckets[0]] = 5e-3
    expected = sum(math.log(target[bucket] + 1e-8) - math.log(raw[bucket] + 1e-8) for bucket in buckets)
    assert dsir.ngram_counts(text) @ dsir.log_ratios(target, raw) == pytest.approx(expected)


def test_chunks_are_the_text_again_and_have_equal_length() -> None:
    text = " ".join(f"w{number}" for number in range(1000)) + "\n"
    pieces = dsir.chunks_of(text, 96)
    assert "".join(pieces) == text
    assert [len(piece.split()) for piece in pieces] == [96] * 10 + [40]
    assert dsir.chunks_of("short text", 96) == ["short text"]


def selection(pool: list[Row], seed: int = 0, budget: int = 2000) -> list[tuple[str, str]]:
    target = dsir.frequencies(row.text for row in documents(9, CODE, 4))
    step = dsir.fit(pool, {"code": (target, 1.0)}, budget_tokens=budget, chunk_words=64, seed=seed)
    results = step.results(attempts_of(step, pool)[0], lambda _: [])
    rows = [row for row in results if isinstance(row, Row)]
    assert budget - 200 < sum(row.num_tokens for row in rows) <= budget
    return [(row.source, row.text) for row in rows]


def test_the_sample_is_like_the_target() -> None:
    assert {source for source, _ in selection(POOL)} == {"def"}


def test_the_sample_is_the_same_in_any_order_and_another_by_another_seed() -> None:
    def near(seed: int, pool: list[Row]) -> set[tuple[str, str]]:
        return set(selection(pool, seed, budget=1500))

    assert near(0, POOL) == near(0, POOL[::-1])
    assert near(0, POOL) != near(1, POOL)


def test_noise_is_gumbels() -> None:
    values = [dsir.gumbel(f"{number:x}", 0) for number in range(20_000)]
    assert np.mean(values) == pytest.approx(0.5772, abs=0.03)
    assert np.var(values) == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_several_targets_get_their_shares() -> None:
    targets = {
        "code": (dsir.frequencies(row.text for row in documents(9, CODE, 4)), 0.25),
        "speeches": (dsir.frequencies(row.text for row in documents(8, SPEECH, 4)), 0.75),
    }
    step = dsir.fit(POOL, targets, budget_tokens=4000, chunk_words=64, seed=0)
    rows = [row for row in step.results(attempts_of(step, POOL)[0], lambda _: []) if isinstance(row, Row)]
    tokens = {name: sum(row.num_tokens for row in rows if row.tags["target"] == name) for name in ("code", "speeches")}
    assert tokens["code"] == pytest.approx(1000, abs=150)
    assert tokens["speeches"] == pytest.approx(3000, abs=150)
    assert all(re.match("the|of", row.source) for row in rows if row.tags["target"] == "speeches")
