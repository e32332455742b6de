"""Measures of text that need no model: what web crawls are filtered by, as labels of a row.

Source: the repetition and shape measures of MassiveText (arXiv 2112.11446, table A1).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from minipuzzle.data.endpoint.questions import Ask, Question
from minipuzzle.data.rows import Rejected, Row
from minipuzzle.data.runner import Attempt

if TYPE_CHECKING:
    from minipuzzle.data.selecting.quality import Classifier

STOP_WORDS = frozenset(["a", "and", "as", "be", "for", "in", "is", "it", "of", "on", "that", "the", "this", "to"])
_WORDS = re.compile(r"\w+")


def heuristics(text: str) -> dict[str, float]:
    """Words, mean length of a word, and shares: of letters, stop words, symbols, lines and n-grams that repeat."""
    words = _WORDS.findall(text.lower())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    num_words = max(len(words), 1)
    return {
        "words": float(len(words)),
        "word_length": sum(map(len, words)) / num_words,
        "letters": sum(letter.isalpha() for letter in text) / max(len(text), 1),
        "stop_words": sum(word in STOP_WORDS for word in words) / num_words,
        "symbols": sum(text.count(symbol) for symbol in ("#", "...", "…")) / num_words,
        "repeated_lines": 1 - len(set(lines)) / max(len(lines), 1),
        "repeated_3_grams": _repeated(words, 3),
        "open_ends": sum(not line.endswith((".", "!", "?", '"', "'", ":", ";")) for line in lines) / max(len(lines), 1),
    }


def _repeated(words: Sequence[str], length: int) -> float:
    """The share of n-grams that stand in a text more than once."""
    ngrams = Counter(zip(*(words[start:] for start in range(length)), strict=False))
    return sum(count for count in ngrams.values() if count > 1) / max(ngrams.total(), 1)


@dataclass(frozen=True, kw_only=True)
class Label:
    """Adds labels to rows; ``classifiers``: by the name of the label that each gives."""

    classifiers: Mapping[str, Classifier] = field(default_factory=dict)
    name: str = "label"

    def attempts(self, row: Row) -> Sequence[Attempt] | Rejected:
        """The row."""
        return [Attempt(row=row, text=row.content)]

    def questions(self, attempt: Attempt) -> Sequence[Question]:
        """None: nobody is asked."""
        return ()

    def results(self, attempts: Sequence[Attempt], ask: Ask) -> Sequence[Row | Rejected]:
        """All rows, with labels."""
        texts = [attempt.text for attempt in attempts]
        scores = {name: classifier.scores(texts) for name, classifier in self.classifiers.items()}
        return [
            replace(
                attempt.row,
                labels={
                    **attempt.row.labels,
                    **heuristics(attempt.text),
                    **{name: values[idx] for name, values in scores.items()},
                },
            )
            for idx, attempt in enumerate(attempts)
        ]
