"""Plans with what was measured of them, in order of their quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf

from minipuzzle.cut.plan import Plan

RANK_BY = ("kl", "loss", "mean-rank")
DEFAULT_RANK_BY = "kl"


@dataclass(frozen=True, kw_only=True)
class PlanQuality:
    """What a cut model does before any distillation.

    Units: ``loss`` and ``kl`` (forward, from the source model) nats/token; ``next_token_accuracy`` and ``agreement``
    (same best next token as the source model) shares of 1.
    """

    loss: float
    kl: float
    next_token_accuracy: float
    agreement: float
    num_tokens: int

    def to_json(self) -> dict[str, float | int]:
        """All figures by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RankedPlan:
    """A plan and what was measured of it before any distillation."""

    plan: Plan
    quality: PlanQuality


def best_first(ranked: Sequence[RankedPlan], rank_by: str = DEFAULT_RANK_BY) -> list[RankedPlan]:
    """Candidates in order of quality.

    ``kl`` and ``loss``: lowest first. ``mean-rank``: the mean of the ranks by next-token accuracy and by agreement,
    the two criteria of the published search (arXiv 2504.03624, section 3.3), which does not say how it combines them.
    Equal candidates keep the order of their predicted losses.
    """
    if rank_by == "mean-rank":
        accuracy = _ranks([-item.quality.next_token_accuracy for item in ranked])
        agreement = _ranks([-item.quality.agreement for item in ranked])
        keys = [a + b for a, b in zip(accuracy, agreement, strict=True)]
    else:
        assert rank_by in RANK_BY, rank_by
        keys = [float(getattr(item.quality, rank_by)) for item in ranked]
    predicted = [float(item.plan.notes.get("predicted_loss", inf)) for item in ranked]
    order = sorted(range(len(ranked)), key=lambda idx: (keys[idx], predicted[idx], idx))
    return [ranked[idx] for idx in order]


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0 for the lowest; equal values share the mean of their ranks."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]
