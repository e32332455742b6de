"""Guarantee: labels measure what they are named after, buckets follow percentiles, classifiers and duplicates find."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from minipuzzle.data.rows import Rejected, Row, read_rows
from minipuzzle.data.selecting.buckets import FIRST_STEP, bucket_of, buckets_of, steps_of
from minipuzzle.data.selecting.duplicates import shingles, without_duplicates
from minipuzzle.data.selecting.labels import heuristics
from minipuzzle.data.selecting.quality import read_classifier, train_classifier
from minipuzzle.errors import MinipuzzleError

TEXT = Path(__file__).parents[3] / "examples/tiny_hybrid/text/heldout_speeches.jsonl"


def speeches(number: int, words: int = 120) -> list[str]:
    every = " ".join(row.content for row in read_rows([TEXT]) if isinstance(row, Row)).split()
    return [" ".join(every[start * words : (start + 1) * words]) for start in range(number)]


def test_repetition_and_shape_show_in_the_labels() -> None:
    plain, repeated = heuristics("A line.\nAnother one.\n"), heuristics("A line.\nA line.\nA line.\n")
    assert plain["repeated_lines"] == 0
    assert repeated["repeated_lines"] == pytest.approx(2 / 3)
    assert repeated["repeated_3_grams"] > plain["repeated_3_grams"] == 0
    assert heuristics("the cat of it")["stop_words"] == 0.75
    assert heuristics("")["words"] == 0


def test_steps_are_percentiles_by_tokens_as_counted_one_by_one() -> None:
    chance = np.random.default_rng(0)
    scores, weights = chance.integers(0, 30, 200).astype(float), chance.integers(1, 9, 200).astype(float)
    expected = [min(int(20 * weights[scores < score].sum() / weights.sum() + 1e-9), 19) for score in scores]
    assert steps_of(scores, weights).tolist() == expected


def test_published_steps_make_five_buckets() -> None:
    names = [bucket_of(step) for step in range(20)]
    assert names == ["low"] * 7 + ["medium-low"] * 5 + ["medium"] * 6 + ["medium-high"] + ["high"]
    assert list(FIRST_STEP.values()) == sorted(FIRST_STEP.values())


def test_the_best_of_several_classifiers_counts() -> None:
    rows = [Row(text=f"text {n:02}", labels={"one": float(n), "other": float(-n)}) for n in range(40)]
    buckets = buckets_of(rows, ["one", "other"])
    assert buckets[0] == buckets[-1] == "high"
    assert buckets[20] == "medium-low"
    with pytest.raises(MinipuzzleError, match="has no label 'third'"):
        buckets_of(rows, ["third"])


def test_a_classifier_finds_the_damaged_half_of_a_corpus(tmp_path: Path) -> None:
    """Shuffled words and boilerplate; measured on documents that it was not fitted on, and after it was written."""
    pytest.importorskip("sklearn")
    chance, texts = random.Random(0), speeches(140)
    damaged = [
        " ".join(chance.sample(text.split(), k=len(text.split()))) if place % 2 else f"{text} click here to subscribe"
        for place, text in enumerate(texts)
    ]
    good, bad = texts[:60], damaged[60:120]  # of other documents, so that no word gives a document away
    classifier = train_classifier([Row(text=text) for text in good], [Row(text=text) for text in bad])
    assert classifier.auc > 0.8
    classifier.write(tmp_path / "quality.json")
    again = read_classifier(tmp_path)
    assert again == classifier
    pairs = zip(again.scores(damaged[120:]), again.scores(texts[120:]), strict=True)
    assert sum(worse < better for worse, better in pairs) >= 18


def test_near_duplicates_go_and_their_like_stays() -> None:
    pytest.importorskip("datasketch")
    texts = speeches(12)
    changed = texts[3].replace(" the ", " a ", 1)
    overlap = shingles(texts[3]) & shingles(changed)
    assert len(overlap) / len(shingles(texts[3]) | shingles(changed)) > 0.85
    rows = [Row(text=text) for text in [*texts, changed, texts[5].upper()]]
    near = list(without_duplicates(rows, similarity=0.7))
    assert [place for place, row in enumerate(near) if isinstance(row, Rejected)] == [12, 13]
    assert near[12] == Rejected(id=rows[12].id, reason="duplicate", detail=f"of {rows[3].id}")
    exact = list(without_duplicates(rows, similarity=1.0))
    assert [place for place, row in enumerate(exact) if isinstance(row, Rejected)] == [13]
    assert all(first != second for first, second in pairwise(texts))
