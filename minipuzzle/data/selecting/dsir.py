"""Text that is like a target: importance weights of hashed n-grams, and a sample by them.

A chunk's weight is the ratio of its likelihood under two bags of hashed one- and two-grams, the target's and the raw
text's. The best by log weight plus Gumbel noise are a sample without replacement, in proportion to the weights.
Chunks have equal length and the budget is in tokens: whole documents and a budget of documents favour short ones.

Source: DSIR (arXiv 2302.03169), section 3.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from minipuzzle.data.endpoint.questions import Ask, Question
from minipuzzle.data.rows import Rejected, Row
from minipuzzle.data.runner import Attempt
from minipuzzle.errors import MinipuzzleError

NUM_BUCKETS = 10_000
MIN_WORDS = 16  # a shorter rest of a document says nothing about it
_SMOOTHING = 1e-8  # of frequencies in a logarithm
_WORDS = re.compile(r"\w+|[^\w\s]+")
Counts = NDArray[np.float64]


@lru_cache(maxsize=1 << 20)
def _bucket(ngram: str) -> int:
    return int.from_bytes(hashlib.sha256(ngram.encode()).digest(), "big") % NUM_BUCKETS


def ngram_counts(text: str) -> Counts:
    """How often each bucket is hit by the words and pairs of words of a text, ``[NUM_BUCKETS]``."""
    words = _WORDS.findall(text.lower())
    pairs = (f"{first} {second}" for first, second in itertools.pairwise(words))
    hits = np.fromiter((_bucket(ngram) for ngram in (*words, *pairs)), dtype=np.int64)
    return np.bincount(hits, minlength=NUM_BUCKETS).astype(np.float64)


def frequencies(texts: Iterable[str]) -> Counts:
    """The share of each bucket over all texts; all zero without any."""
    total = np.zeros(NUM_BUCKETS)
    for text in texts:
        total += ngram_counts(text)
    found: Counts = total / max(total.sum(), 1.0)
    return found


def log_ratios(target: Counts, raw: Counts) -> Counts:
    """What one hit of a bucket adds to a chunk's log weight."""
    found: Counts = np.log(target + _SMOOTHING) - np.log(raw + _SMOOTHING)
    return found


def gumbel(row_id: str, seed: int) -> float:
    """Gumbel noise that belongs to a row: the same in any order and in any process."""
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return -math.log(-math.log((int.from_bytes(digest[:8], "big") + 0.5) / 2**64))


def chunks_of(text: str, chunk_words: int) -> list[str]:
    """A text in pieces of ``chunk_words`` words, spaces and all; a rest below ``MIN_WORDS`` joins the last piece."""
    ends = [match.end() for match in re.finditer(r"\S+\s*", text)]
    if len(ends) <= chunk_words + MIN_WORDS:
        return [text]
    cuts = [ends[place - 1] for place in range(chunk_words, len(ends) - MIN_WORDS + 1, chunk_words)]
    bounds = [0, *cuts, len(text)] if cuts[-1] < len(text) else [0, *cuts]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


@dataclass(frozen=True, kw_only=True)
class Select:
    """Keeps the chunks whose log weight plus noise reaches a target's threshold; see ``fit``."""

    chunk_words: int
    seed: int
    ratios: Mapping[str, Counts] = field(repr=False)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    name: str = "select"

    def attempts(self, row: Row) -> Sequence[Attempt] | Rejected:
        """Its chunks."""
        if row.messages:
            return [Attempt(row=row, text=row.content)]
        pieces = chunks_of(row.text, self.chunk_words)
        return [Attempt(row=row, text=text, number=number) for number, text in enumerate(pieces)]

    def questions(self, attempt: Attempt) -> Sequence[Question]:
        """None: nobody is asked."""
        return ()

    def values(self, attempt: Attempt) -> dict[str, float]:
        """Log weight plus noise of a chunk, for each target."""
        counts, noise = ngram_counts(attempt.text), gumbel(_chunk_row(attempt).id, self.seed)
        return {name: float(counts @ ratios) + noise for name, ratios in self.ratios.items()}

    def results(self, attempts: Sequence[Attempt], ask: Ask) -> Sequence[Row | Rejected]:
        """The chunks that some target takes, tagged with the first that does."""
        return [self._result(attempt) for attempt in attempts]

    def _result(self, attempt: Attempt) -> Row | Rejected:
        values = self.values(attempt)
        taken = next((name for name, limit in self.thresholds.items() if values[name] >= limit), None)
        if taken is None:
            return Rejected(id=attempt.row.id, reason="less like the targets", attempt=f"chunk {attempt.number}")
        return _chunk_row(attempt, {"target": taken}, {"log_weight": values[taken]})


def _chunk_row(attempt: Attempt, tags: Mapping[str, str] = {}, labels: Mapping[str, float] = {}) -> Row:
    row = attempt.row
    made = {"step": "select", "chunk": attempt.number}
    return Row(
        text="" if row.messages else attempt.text,
        messages=row.messages,
        source=row.source,
        parents=(row.id,),
        labels={**row.labels, **labels},
        tags={**row.tags, **tags},
        made=made,
    )


def fit(
    rows: Iterable[Row], targets: Mapping[str, tuple[Counts, float]], *, budget_tokens: int, chunk_words: int, seed: int
) -> Select:
    """The selection whose chunks come nearest to the budget from below, each target to its share of it.

    ``targets``: by name, frequencies and share. A chunk that two targets want belongs to the one named first. All
    figures of a chunk are held, its text is not.

    Raises: MinipuzzleError if the rows hold less than the budget.
    """
    rows = list(rows) if not isinstance(rows, Sequence) else rows
    step = Select(chunk_words=chunk_words, seed=seed, ratios={})
    attempts = [attempt for row in rows for attempt in _pieces(step, row)]
    raw = frequencies(attempt.text for attempt in attempts)
    ratios = {name: log_ratios(target, raw) for name, (target, _) in targets.items()}
    scored = Select(chunk_words=chunk_words, seed=seed, ratios=ratios)
    values = [scored.values(attempt) for attempt in attempts]
    sizes = np.array([_chunk_row(attempt).num_tokens for attempt in attempts], dtype=np.int64)
    if sizes.sum() < budget_tokens:
        problem = f"the text holds about {sizes.sum():,} tokens, and {budget_tokens:,} are to be selected"
        raise MinipuzzleError(problem, "lower ‹tokens›, or add text")
    free, thresholds = np.ones(len(attempts), dtype=bool), {}
    for name, (_, share) in targets.items():
        scores = np.array([value[name] for value in values])
        order = np.argsort(-scores, kind="stable")
        order = order[free[order]]
        count = int(np.searchsorted(np.cumsum(sizes[order]), budget_tokens * share, side="right"))
        if count:
            thresholds[name] = float(scores[order[count - 1]])
            free &= scores < thresholds[name]
    return Select(chunk_words=chunk_words, seed=seed, ratios=ratios, thresholds=thresholds)


def _pieces(step: Select, row: Row) -> Sequence[Attempt]:
    found = step.attempts(row)
    assert not isinstance(found, Rejected)
    return found
