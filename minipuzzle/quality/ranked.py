"""Plans with what was measured of them, in order of their quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from minipuzzle.cut.figures import Figures
from minipuzzle.cut.plan import Plan
from minipuzzle.quality.record import Quality
from minipuzzle.table import Table

DEFAULT_RANK_BY = "kl"


@dataclass(frozen=True, kw_only=True)
class RankedPlan:
    """A plan and what was measured of it before any distillation: of the mended cut, where there is ``plain``, what was
    measured of the cut before it was mended."""

    plan: Plan
    quality: Quality
    plain: Quality | None = None

    @property
    def figures(self) -> Figures:
        """What a search says of the plan that it made."""
        assert self.plan.figures is not None, "no search made this plan"
        return self.plan.figures

    @property
    def kl(self) -> float:
        """Forward KL from the source model, nats/token."""
        assert self.quality.kl is not None, "candidates are compared with their source"
        return self.quality.kl

    def to_json(self) -> dict[str, Any]:
        """The figures of the plan, and what was measured."""
        plain = {} if self.plain is None else {"kl_not_compensated": self.plain.kl}
        return {**self.figures.to_json(), **self.measured(), **plain}

    def measured(self) -> dict[str, float | int | None]:
        """What was measured, under the names of the table of candidates."""
        quality = self.quality
        return {
            "loss": quality.loss,
            "kl": quality.kl,
            "next_token_accuracy": quality.accuracy,
            "agreement": quality.agreement,
            "num_tokens": quality.num_tokens,
        }


def _mean_rank(qualities: Sequence[Quality]) -> list[float]:
    """Ranks by next-token accuracy and by agreement, added up.

    Source: the two criteria of the published search (arXiv 2504.03624, section 3.3), which does not say how it combines
    them.
    """
    accuracy = _ranks([-(quality.accuracy or 0.0) for quality in qualities])
    agreement = _ranks([-(quality.agreement or 0.0) for quality in qualities])
    return [a + b for a, b in zip(accuracy, agreement, strict=True)]


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0 for the lowest; equal values share the mean of their ranks."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]


# A criterion gives one number for each of several candidates; the lowest is best.
RANK_BY: Table[Callable[[Sequence[Quality]], list[float]]] = Table(
    "ranking criterion",
    "ranking_criteria",
    entries={
        "kl": lambda qualities: [quality.kl or 0.0 for quality in qualities],
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
