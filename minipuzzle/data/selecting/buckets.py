"""Quality buckets: percentiles of several classifiers, the best of them, and five names.

Each classifier's score becomes a percentile, then a step of 5 %; a row's step is the highest that any classifier gives
it, and steps are joined into five buckets.

Source: Nemotron-CC (arXiv 2412.02595), section 3.2: of 20 steps the last is high, 18 medium-high, 12 to 17 medium, 7 to
11 medium-low, the rest low.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from minipuzzle.data.rows import Row
from minipuzzle.errors import MinipuzzleError

NUM_STEPS = 20
FIRST_STEP = {"low": 0, "medium-low": 7, "medium": 12, "medium-high": 18, "high": 19}


def steps_of(scores: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """The step of each score, 0 to 19: by the share of all tokens (``weights``) in rows that score less."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    below = np.concatenate([[0.0], np.cumsum(weights[order])])[np.searchsorted(ranked, scores, side="left")]
    found: NDArray[np.int64] = np.minimum((below / weights.sum() * NUM_STEPS + 1e-9).astype(np.int64), NUM_STEPS - 1)
    return found


def bucket_of(step: int) -> str:
    """The bucket of a step."""
    return max((first, name) for name, first in FIRST_STEP.items() if first <= step)[1]


def buckets_of(rows: Sequence[Row], labels: Sequence[str]) -> list[str]:
    """The bucket of each row, by the best of its percentiles in some labels.

    Raises: MinipuzzleError for a label that a row lacks.
    """
    weights = np.array([row.num_tokens for row in rows], dtype=np.float64)
    steps = np.zeros(len(rows), dtype=np.int64)
    for label in labels:
        lacking = next((row for row in rows if label not in row.labels), None)
        if lacking is not None:
            known = ", ".join(lacking.labels) or "none"
            raise MinipuzzleError(f"row {lacking.id} has no label {label!r}", f"its labels: {known}; see `data label`")
        steps = np.maximum(steps, steps_of(np.array([row.labels[label] for row in rows]), weights))
    return [bucket_of(int(step)) for step in steps]


def bucket_table(rows: Sequence[Row], buckets: Sequence[str]) -> Mapping[str, Mapping[str, int]]:
    """Rows and tokens in each bucket, best first."""
    return {
        name: {
            "rows": sum(bucket == name for bucket in buckets),
            "tokens": sum(row.num_tokens for row, bucket in zip(rows, buckets, strict=True) if bucket == name),
        }
        for name in reversed(FIRST_STEP)
    }
