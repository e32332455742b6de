"""The table of criteria for experts: what each is worth, from sums over tokens that one pass gathers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minipuzzle.table import Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

EXPERT = "expert"  # the axis


@dataclass(frozen=True, kw_only=True)
class ExpertSums:
    """Sums of a layer's experts over the tokens that the router gave them, all of shape ``[experts]``.

    ``routed``: how many of the layer's ``num_tokens`` those are. ``norms`` and ``squared_norms``: of the expert's
    output. ``gated_norms``: times the router's weight as a share of the weights of all experts of the token;
    ``weighted_norms``: times that weight as it is.
    """

    num_tokens: float
    routed: Array
    norms: Array
    squared_norms: Array
    gated_norms: Array
    weighted_norms: Array

    def mean(self, total: Array) -> Array:
        """A sum by the tokens that an expert was given; zero for one that was given none."""
        found: Array = total / self.routed.clip(1)
        return found


@dataclass(frozen=True, kw_only=True)
class ExpertCriterion:
    """A criterion in words, and what each expert is worth by it."""

    definition: str
    of: Callable[[ExpertSums], Array]


# What the stream loses with an expert; kept most on a model that we trained (examples/benchmarks/experts.md).
DEFAULT_CRITERION = "weighted"
EXPERT_CRITERIA = Table(
    "expert criterion",
    "expert_criteria",
    entries={
        "weighted": ExpertCriterion(
            definition="norm of the expert's output (before a latent projection back) times its routing weight: mean "
            "over all tokens, zero for those it is not given",
            of=lambda sums: sums.weighted_norms / sums.num_tokens,
        ),
        "reap": ExpertCriterion(
            definition="norm of the output times the routing weight as a share of the token's: mean over the tokens "
            "given to the expert (REAP, arXiv 2510.13999)",
            of=lambda sums: sums.mean(sums.gated_norms),
        ),
        "man": ExpertCriterion(
            definition="norm of the output: mean over the tokens given to the expert (MAN, arXiv 2606.15716)",
            of=lambda sums: sums.mean(sums.norms),
        ),
        "msan": ExpertCriterion(
            definition="squared norm of the output: mean over the tokens given to the expert (MSAN, arXiv 2606.15716)",
            of=lambda sums: sums.mean(sums.squared_norms),
        ),
        "frequency": ExpertCriterion(
            definition="share of all tokens that are given to the expert",
            of=lambda sums: sums.routed / sums.num_tokens,
        ),
    },
)


def criterion_axis(name: str) -> str:
    """The name of experts' scores by a criterion, in the place of an axis."""
    return EXPERT if name == DEFAULT_CRITERION else f"{EXPERT}_{name}"
