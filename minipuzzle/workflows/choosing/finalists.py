"""Finalists: the few candidates that short distillation decides between, and the table of how they did.

Before distillation the order of good candidates says little (arXiv 2504.03624, table 6: 63.3, 62.1 and 53.7 became
69.3, 69.6 and 69.5), so the finalists are made different on purpose, and the winner is the one that measures best
after every one of them has been trained on as many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import num_layers_different
from minipuzzle.quality.ranked import RankedPlan


def pick_finalists(
    source: Architecture, ranked: Sequence[RankedPlan], number: int, min_different: int
) -> list[RankedPlan]:
    """The best candidates that differ from every better finalist in so many layers.

    Where there are too few such candidates, the best of the others fill the places.
    """
    chosen: list[RankedPlan] = []
    for item in ranked:
        treatment = item.plan.treatment(source)
        others = (num_layers_different(treatment, earlier.plan.treatment(source)) for earlier in chosen)
        if len(chosen) < number and all(different >= min_different for different in others):
            chosen.append(item)
    fillers = [item for item in ranked if not any(item is earlier for earlier in chosen)]
    return chosen + fillers[: number - len(chosen)]
