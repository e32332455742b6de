"""Choosing a plan: the best predicted candidates are measured, the best measured one refined, finalists picked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from distill.race import RaceSettings
from importance.candidates import rank_plans
from minipuzzle.architecture.memory import Deployment
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan
from minipuzzle.cut.scores import Scores
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.ranked import DEFAULT_RANK_BY, RANK_BY, RankedPlan, best_first
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.compute import Compute
from minipuzzle.search.costs import Pricing
from minipuzzle.search.engine import find_candidates, plan_of
from minipuzzle.search.refinement import Neighbourhood, Refinement, refine
from minipuzzle.search.request import SearchRequest
from minipuzzle.search.space import requested_space
from minipuzzle.workflows.choosing.finalists import pick_finalists

FINALIST_DIFFERENCE = 0.1  # of the layers; a user's --diversity may ask for more


@dataclass(frozen=True, kw_only=True)
class ChoosingSettings:
    """How candidates are compared. ``num_candidates``: of the best predicted, how many are measured.

    ``num_compensated``: of the best measured, how many are mended and measured again, before one is chosen or finalists
    are picked; 0: none. ``num_finalists``: of the best measured, how many race.
    """

    num_candidates: int = 8
    rank_by: str = DEFAULT_RANK_BY
    refine: bool = False
    num_compensated: int = 0
    num_finalists: int = 1
    race: RaceSettings | None = None

    def __post_init__(self) -> None:
        RANK_BY.check(self.rank_by)
        if self.num_candidates < 1 or self.num_finalists < 1:
            raise MinipuzzleError(
                "there must be a candidate and a finalist", "check ‹num_candidates› and ‹num_finalists›"
            )
        if (self.num_finalists > 1) != (self.race is not None):
            raise MinipuzzleError(
                f"{self.num_finalists} finalists and {'a' if self.race else 'no'} race",
                "give both: ‹num_finalists› 3 and ‹race_tokens› 7B, for instance",
            )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is cut, on which evidence, and to what."""

    checkpoint: Checkpoint
    scores: Scores
    target: SearchRequest
    deployment: Deployment

    @property
    def source(self) -> Architecture:
        """The architecture that is cut."""
        return self.checkpoint.architecture

    def predicted_plans(self, number: int) -> list[Plan]:
        """The plans of the best predicted candidates, best first."""
        candidates = find_candidates(self.source, self.scores, self.target, self.deployment, max_candidates=number)
        return [plan_of(self.source, self.scores, candidate, metric=self.target.metric) for candidate in candidates]

    @property
    def neighbourhood(self) -> Neighbourhood:
        """Which plans lie beside a plan, within all limits and bounds."""
        return Neighbourhood(
            source=self.source,
            scores=self.scores,
            metric=self.target.metric,
            space=requested_space(self.source, self.target),
            limits=self.target.limits(self.source, self.deployment),
            pricing=Pricing(source=self.source, deployment=self.deployment, timings=self.target.timings),
        )


@dataclass(frozen=True, kw_only=True)
class ComparisonTable:
    """All measured plans, best first, the finalists among them, and what refinement did (None if none was asked)."""

    ranked: tuple[RankedPlan, ...]
    finalists: tuple[RankedPlan, ...]
    refinement: Refinement | None = None

    def to_json(self) -> dict[str, Any]:
        """The table of all plans, and how far the order of predictions is from the measured one."""
        predicted = [item.figures.predicted_loss for item in self.ranked]
        return {
            "candidates": [item.to_json() for item in self.ranked],
            "best_was_predicted": sorted(predicted).index(predicted[0]) + 1,
            **({"refinement": self.refinement.to_json()} if self.refinement else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The plan that was cut by, and the table of all that was compared (empty if nothing was).

    ``is_trained``: the folder holds the winner of a race as its training left it. ``compensation``: as in its file;
    empty if there was none.
    """

    plan: Plan
    table: dict[str, Any] = field(default_factory=dict)
    is_trained: bool = False
    compensation: dict[str, Any] = field(default_factory=dict)


def compare(
    problem: Problem,
    windows: EvaluationWindows,
    settings: ChoosingSettings,
    compute: Compute = Compute(),
    mended: Callable[[Plan], Quality] | None = None,
) -> ComparisonTable:
    """Measure the best predicted candidates on windows, refine the best, mend a few, and pick finalists.

    ``mended``: what a plan is like once it is mended, for ``settings.num_compensated`` of them or all that race. With
    three finalists or more, the best predicted candidate is one of them.

    Raises: InfeasibleBudgetError; MinipuzzleError for scores that do not fit or too little memory.
    """

    def measured(plans: Sequence[Plan]) -> list[RankedPlan]:
        return rank_plans(problem.checkpoint, plans, windows, compute, rank_by=settings.rank_by)

    plans = problem.predicted_plans(settings.num_candidates)
    best_predicted, ranked = plans[0], measured(plans)
    refinement = None
    if settings.refine:
        found = refine(ranked[0], neighbours=problem.neighbourhood.of, measure=measured, rank_by=settings.rank_by)
        ranked = best_first([*ranked, *found.measured], settings.rank_by)
        refinement = found.with_layer_scores(problem.source, problem.scores)
    if mended is not None and settings.num_compensated > 0 and len(ranked) > 1:
        number = max(settings.num_compensated, settings.num_finalists)
        again = [replace(item, quality=mended(item.plan), plain=item.quality) for item in ranked[:number]]
        ranked = [*best_first(again, settings.rank_by), *ranked[number:]]
    min_different = max(problem.target.diversity, ceil(FINALIST_DIFFERENCE * len(problem.source.layers)))
    finalists = pick_finalists(problem.source, ranked, settings.num_finalists, min_different)
    # Both opinions race: what was measured before distillation says little about what comes after it.
    if len(finalists) > 2 and not any(item.plan == best_predicted for item in finalists):
        finalists[-1] = next(item for item in ranked if item.plan == best_predicted)
    return ComparisonTable(ranked=tuple(ranked), finalists=tuple(finalists), refinement=refinement)
