"""From scores and limits to candidates and plans, in seconds and without weights.

The uniform layout is searched on a grid, the per-layer layout by an exact integer programme; both return candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any

from minipuzzle.architecture import UNIFORM, Architecture
from minipuzzle.candidates import Candidate, diverse
from minipuzzle.constraints import Limits, Pricing
from minipuzzle.errors import InfeasibleBudgetError, MinipuzzleError, NothingToPruneError
from minipuzzle.grid_search import Grid, price_grid
from minipuzzle.memory import Deployment, memory_breakdown
from minipuzzle.per_layer_search import PerLayerProblem, per_layer_problem
from minipuzzle.plan import Plan
from minipuzzle.predicted_loss import LossModel
from minipuzzle.scores import Scores
from minipuzzle.search_space import DEFAULT_GRANULARITY, LAYOUTS, requested_space
from minipuzzle.selection import make_plan
from minipuzzle.sweep import FrontierPoint
from minipuzzle.timings import Timings
from minipuzzle.units import format_gib, parse_budget_bytes, parse_share_or_count

DEFAULT_SOLUTIONS = 8


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What a user asks for: limits, fixed numbers, bounds, or any mix of them.

    ``memory``: a size or a share of the source such as ``75%``; ``params``, ``active_params``: a count or a share;
    ``throughput``: at least so many tokens a second; ``latency_ms``: a step takes at most so long; the latter two need
    ``timings``. Without any of these limits, everything that is not fixed stays. ``keep``, ``width``: fixed counts by
    kind and widths by axis. ``minimum``, ``maximum``: bounds on counts. ``widths``: allowed widths by axis, as text.
    ``keep_layers``: positions that stay in any case. ``diversity``: layers in which candidates differ at least.
    """

    memory: str | None = None
    params: str | None = None
    active_params: str | None = None
    throughput: float | None = None
    latency_ms: float | None = None
    timings: Timings | None = None
    keep: Mapping[str, int] = field(default_factory=dict)
    width: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, str] = field(default_factory=dict)
    minimum: Mapping[str, int] = field(default_factory=dict)
    maximum: Mapping[str, int] = field(default_factory=dict)
    keep_layers: tuple[int, ...] = ()
    min_kept_fraction: float = 0.5
    min_ffn_fraction: float = 0.75
    depth_step: int = 1
    granularity: int = DEFAULT_GRANULARITY
    metric: str = "mse"
    layout: str = UNIFORM
    diversity: int = 1

    def __post_init__(self) -> None:
        if not self.is_limited and not self.keep and not self.width:
            raise MinipuzzleError("nothing says how small the model should be", "give --memory, --keep or --width")
        if self.layout not in LAYOUTS:
            raise MinipuzzleError(f"unknown layout {self.layout!r}", f"use one of {', '.join(LAYOUTS)}")
        if (self.throughput is not None or self.latency_ms is not None) and self.timings is None:
            raise MinipuzzleError("a throughput needs measured times of layers", "give them with --timings FILE.csv")

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit to search under."""
        limits = (self.memory, self.params, self.active_params, self.throughput, self.latency_ms)
        return any(limit is not None for limit in limits)

    def budget_bytes(self, source_bytes: int) -> int:
        """The memory budget in bytes; without one, what the source needs."""
        return source_bytes if self.memory is None else parse_budget_bytes(self.memory, source_bytes)

    def limits(self, source: Architecture, deployment: Deployment) -> Limits:
        """The limits in numbers, shares taken of the source at that deployment."""
        times = [self.latency_ms * 1e6] if self.latency_ms is not None else []
        times += [deployment.batch * 1e9 / self.throughput] if self.throughput else []
        source_bytes = memory_breakdown(source, deployment).total_bytes
        active = source.num_active_parameters
        return Limits(
            memory_bytes=inf if self.memory is None else self.budget_bytes(source_bytes),
            num_parameters=inf if self.params is None else parse_share_or_count(self.params, source.num_parameters),
            num_active_parameters=inf
            if self.active_params is None
            else parse_share_or_count(self.active_params, active),
            step_nanoseconds=min(times, default=inf),
        )


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
    if not request.is_limited or request.keep or request.width:
        return
    costs = Pricing(source=source, deployment=deployment, timings=request.timings).model(source)
    limits = request.limits(source, deployment)
    if not limits.violated(costs):
        raise NothingToPruneError(
            f"nothing needs pruning: the model needs {format_gib(costs.memory_bytes)} "
            f"at {deployment.describe()} and meets every limit as it is",
            "serve it as it is, or set a lower limit",
        )


def figures_of(architecture: Architecture, pricing: Pricing) -> dict[str, Any]:
    """What a plan says of the model it leaves: layers, parameters, every memory term and their deployment."""
    costs = pricing.model(architecture)
    figures: dict[str, Any] = {
        "pattern": architecture.pattern,
        "num_parameters": costs.num_parameters,
        "num_active_parameters": costs.num_active_parameters,
        "memory_bytes": costs.memory_bytes,
        "memory_terms": [asdict(term) for term in memory_breakdown(architecture, pricing.deployment).terms],
        "deployment": asdict(pricing.deployment),
    }
    if (tokens_per_second := pricing.throughput(costs)) is not None:
        figures["tokens_per_second"] = tokens_per_second
    return figures


def plan_of(source: Architecture, scores: Scores, candidate: Candidate, *, metric: str) -> Plan:
    """The plan of a candidate, with the figures it was chosen by, after adding all of them up again.

    Raises: MinipuzzleError if scores of units to cut are missing.
    """
    candidate.check()
    notes: dict[str, Any] = {
        **figures_of(candidate.architecture, candidate.pricing),
        "layout": candidate.layout,
        "limits": candidate.limits.given(),
        "predicted_loss": candidate.predicted_loss,
        "metric": metric,
    }
    widths = {layer_idx: candidate.widths_of(layer_idx) for layer_idx in candidate.kept_layers}
    plan = make_plan(source, scores, kept_layers=candidate.kept_layers, widths=widths, notes=notes)
    left = plan.apply(source)
    assert left == candidate.architecture, "the plan leaves another model than the one that was priced"
    return plan
