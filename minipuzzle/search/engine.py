"""From scores and limits to candidates and plans, in seconds and without weights.

The uniform layout is searched on a grid, the per-layer layout by an exact integer programme; both return candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.architecture.model import UNIFORM, Architecture
from minipuzzle.architecture.quantities import format_gib
from minipuzzle.cut.figures import Figures
from minipuzzle.cut.plan import Plan
from minipuzzle.cut.scores import Scores
from minipuzzle.cut.selection import make_plan
from minipuzzle.errors import InfeasibleBudgetError, NothingToPruneError
from minipuzzle.search.candidates import Candidate, diverse
from minipuzzle.search.costs import Limits, Pricing
from minipuzzle.search.grid import Grid, price_grid
from minipuzzle.search.per_layer import PerLayerProblem, per_layer_problem
from minipuzzle.search.predicted_loss import LossModel
from minipuzzle.search.request import SearchRequest
from minipuzzle.search.space import requested_space
from minipuzzle.search.sweep import FrontierPoint

DEFAULT_SOLUTIONS = 8


@dataclass(frozen=True, kw_only=True)
class PreparedSearch:
    """A search with everything priced, ready for any limits. ``source``, ``request`` and ``pricing`` as given."""

    source: Architecture
    request: SearchRequest
    pricing: Pricing
    priced: Grid | PerLayerProblem

    def candidates(self, limits: Limits, max_candidates: int | None = None) -> list[Candidate]:
        """Candidates within limits, best predicted first, as different from each other as the request wants.

        ``max_candidates``: None: all of a grid, ``DEFAULT_SOLUTIONS`` of an integer programme.

        Raises: InfeasibleBudgetError.
        """
        min_different = self.request.diversity
        if isinstance(self.priced, PerLayerProblem):
            number = max_candidates or DEFAULT_SOLUTIONS
            return self.priced.candidates(limits, number=number, min_different=min_different)
        found = self.priced.candidates(limits)
        return diverse(found, min_different, max_candidates) if min_different > 1 else found[:max_candidates]


def prepare_search(
    source: Architecture, scores: Scores, request: SearchRequest, deployment: Deployment
) -> PreparedSearch:
    """Price everything that a request allows.

    Raises: MinipuzzleError for impossible targets or missing scores.
    """
    scores.check_against(source)
    loss = LossModel(source=source, scores=scores, metric=request.metric)
    pricing = Pricing(source=source, deployment=deployment, timings=request.timings)
    space = requested_space(source, request)
    priced = price_grid(loss, pricing, space) if request.layout == UNIFORM else per_layer_problem(loss, pricing, space)
    return PreparedSearch(source=source, request=request, pricing=pricing, priced=priced)


def find_candidates(
    source: Architecture,
    scores: Scores,
    request: SearchRequest,
    deployment: Deployment,
    *,
    max_candidates: int | None = None,
) -> list[Candidate]:
    """Candidates for a request, best predicted first.

    Raises: InfeasibleBudgetError; NothingToPruneError if the source meets all limits as it is; MinipuzzleError for
    impossible targets or missing scores.
    """
    limits = request.limits(source, deployment)
    check_pruning_is_needed(source, request, deployment)
    return prepare_search(source, scores, request, deployment).candidates(limits, max_candidates)


def predicted_frontier(
    source: Architecture, scores: Scores, request: SearchRequest, deployment: Deployment, budgets: Sequence[int]
) -> list[FrontierPoint]:
    """The best prediction within each of some memory budgets, beside the request's other limits. Prices only once.

    Raises: MinipuzzleError for impossible targets or missing scores; a budget that nothing fits is a point.
    """
    prepared = prepare_search(source, scores, request, deployment)
    others = request.limits(source, deployment)
    points = []
    for budget_bytes in budgets:
        try:
            best = prepared.candidates(replace(others, memory_bytes=budget_bytes), max_candidates=1)[0]
        except InfeasibleBudgetError as error:
            points.append(FrontierPoint(budget_bytes=budget_bytes, description=error.problem))
            continue
        best.check()
        points.append(
            FrontierPoint(
                budget_bytes=budget_bytes,
                memory_bytes=best.memory_bytes,
                num_parameters=best.num_parameters,
                quality=best.predicted_loss,
                description=best.describe(),
            )
        )
    return points


def check_pruning_is_needed(source: Architecture, request: SearchRequest, deployment: Deployment) -> None:
    """Refuse to cut a model that meets all limits as it is, unless explicit targets ask for it.

    Raises: NothingToPruneError.
    """
    if not request.is_limited or request.is_fixed or request.vocab is not None:
        return
    costs = Pricing(source=source, deployment=deployment, timings=request.timings).model(source)
    limits = request.limits(source, deployment)
    if not limits.violated(costs):
        raise NothingToPruneError(
            f"nothing needs pruning: the model needs {format_gib(costs.memory_bytes)} "
            f"at {deployment.describe()} and meets every limit as it is",
            "serve it as it is, or set a lower limit",
        )


def figures_of(
    architecture: Architecture, pricing: Pricing, *, limits: Limits, layout: str, predicted_loss: float, metric: str
) -> Figures:
    """What a plan says of the model it leaves and of how it was chosen."""
    costs = pricing.model(architecture)
    return Figures(
        pattern=architecture.pattern,
        num_parameters=costs.num_parameters,
        num_active_parameters=costs.num_active_parameters,
        memory_bytes=costs.memory_bytes,
        memory_terms=memory_breakdown(architecture, pricing.deployment).terms,
        deployment=pricing.deployment,
        tokens_per_second=pricing.throughput(costs),
        layout=layout,
        limits=limits.given(),
        predicted_loss=predicted_loss,
        metric=metric,
    )


def plan_of(source: Architecture, scores: Scores, candidate: Candidate, *, metric: str) -> Plan:
    """The plan of a candidate, with the figures it was chosen by, after adding all of them up again.

    Raises: MinipuzzleError if scores of units to cut are missing.
    """
    candidate.check()
    figures = figures_of(
        candidate.architecture,
        candidate.pricing,
        limits=candidate.limits,
        layout=candidate.layout,
        predicted_loss=candidate.predicted_loss,
        metric=metric,
    )
    plan = make_plan(source, scores, kept_layers=candidate.kept_layers, widths=candidate.treatment, figures=figures)
    left = plan.apply(source)
    assert left == candidate.architecture, "the plan leaves another model than the one that was priced"
    return plan
