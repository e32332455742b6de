"""Plans with what was measured of them, in order of their quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from minipuzzle.cut.figures import Figures
from minipuzzle.cut.plan import Plan
from minipuzzle.table import Table

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

    @property
    def figures(self) -> Figures:
        """What a search says of the plan that it made."""
        assert self.plan.figures is not None, "no search made this plan"
        return self.plan.figures

    def to_json(self) -> dict[str, Any]:
        """The figures of the plan, and what was measured."""
        return {**self.figures.to_json(), **self.quality.to_json()}


def _mean_rank(qualities: Sequence[PlanQuality]) -> list[float]:
    """Ranks by next-token accuracy and by agreement, added up.

    Source: the two criteria of the published search (arXiv 2504.03624, section 3.3), which does not say how it combines
    them.
    """
    accuracy = _ranks([-quality.next_token_accuracy for quality in qualities])
    agreement = _ranks([-quality.agreement for quality in qualities])
    return [a + b for a, b in zip(accuracy, agreement, strict=True)]


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0 for the lowest; equal values share the mean of their ranks."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]


# A criterion gives one number for each of several candidates; the lowest is best.
RANK_BY: Table[Callable[[Sequence[PlanQuality]], list[float]]] = Table(
    "ranking criterion",
    "ranking_criteria",
    entries={
        "kl": lambda qualities: [quality.kl for quality in qualities],
        "loss": lambda qualities: [quality.loss for quality in qualities],
        "mean-rank": _mean_rank,
    },
)


def best_first(ranked: Sequence[RankedPlan], rank_by: str = DEFAULT_RANK_BY) -> list[RankedPlan]:
    """Candidates in order of quality; equal ones keep the order of their predicted losses."""
    keys = RANK_BY[rank_by]([item.quality for item in ranked])
    predicted = [item.figures.predicted_loss if item.plan.figures else inf for item in ranked]
    order = sorted(range(len(ranked)), key=lambda idx: (keys[idx], predicted[idx], idx))
    return [ranked[idx] for idx in order]
