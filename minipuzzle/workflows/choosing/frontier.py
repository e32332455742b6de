"""The measured frontier: for each of some memory budgets, the best of the candidates by running them.

All candidates of all budgets are measured together, so that they share prefixes, and a candidate that was found for a
small budget also counts at every larger one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from importance.candidates import rank_plans
from minipuzzle.architecture.memory import memory_breakdown
from minipuzzle.cut.plan import Plan
from minipuzzle.cut.scores import read_scores
from minipuzzle.cut.vocabulary import recorded
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.errors import InfeasibleBudgetError, MinipuzzleError
from minipuzzle.files.json_files import write_json
from minipuzzle.files.outputs import output_folder
from minipuzzle.quality.ranked import RankedPlan
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.search.engine import plan_of, prepare_search
from minipuzzle.search.sweep import FrontierPoint, parse_sweep
from minipuzzle.show.frontier import plot_frontier, write_frontier_csv
from minipuzzle.workflows.choosing.compare import ChoosingSettings, Problem
from minipuzzle.workflows.prune import PruneRequest, comparison_windows, measured_scores

QUALITY = "KL to the source, nats/token"


@dataclass(frozen=True, kw_only=True)
class MeasuredFrontier:
    """Points in order of their budgets, the plan of each (None where nothing fits), and all that was measured."""

    points: tuple[FrontierPoint, ...]
    plans: tuple[Plan | None, ...]
    ranked: tuple[RankedPlan, ...]

    def to_json(self) -> dict[str, Any]:
        """The points, and the table of all candidates."""
        return {
            "frontier": [asdict(point) for point in self.points],
            "candidates": [item.to_json() for item in self.ranked],
        }


def measured_frontier(
    problem: Problem,
    budgets: tuple[int, ...],
    windows: EvaluationWindows,
    settings: ChoosingSettings,
    compute: Compute = Compute(),
) -> MeasuredFrontier:
    """Measure the best predicted candidates of each budget, ``settings.num_candidates`` of them, beside other limits.

    The quality of a point is the KL to the source model, in nats/token; ``settings.rank_by`` chooses among candidates.

    Raises: MinipuzzleError for impossible targets or missing scores; a budget that nothing fits is a point.
    """
    source, target = problem.source, problem.target
    prepared = prepare_search(source, problem.scores, target, problem.deployment)
    others = target.limits(source, problem.deployment)
    plans: dict[object, Plan] = {}
    reasons: dict[int, str] = {}
    for budget_bytes in budgets:
        limits = replace(others, memory_bytes=budget_bytes)
        try:
            found = prepared.candidates(limits, max_candidates=settings.num_candidates)
        except InfeasibleBudgetError as error:
            reasons[budget_bytes] = error.problem
            continue
        for candidate in found:
            key = (candidate.kept_layers, candidate.describe(), str(candidate.layer_widths))
            if key not in plans:
                plans[key] = plan_of(source, problem.scores, candidate, metric=target.metric)
    if not plans:
        raise InfeasibleBudgetError(reasons[max(budgets)], "raise the budgets of the sweep, or loosen a bound")
    ranked = rank_plans(problem.checkpoint, list(plans.values()), windows, compute, rank_by=settings.rank_by)
    chosen = [next((item for item in ranked if item.figures.memory_bytes <= size), None) for size in budgets]
    points = [_point(size, item, reasons.get(size, "")) for size, item in zip(budgets, chosen, strict=True)]
    return MeasuredFrontier(
        points=tuple(points), plans=tuple(item.plan if item else None for item in chosen), ranked=tuple(ranked)
    )


def _point(budget_bytes: int, item: RankedPlan | None, reason: str) -> FrontierPoint:
    if item is None:
        return FrontierPoint(budget_bytes=budget_bytes, description=reason)
    return FrontierPoint(
        budget_bytes=budget_bytes,
        memory_bytes=item.figures.memory_bytes,
        num_parameters=item.figures.num_parameters,
        quality=item.kl,
        description=item.figures.pattern,
    )


def sweep(request: PruneRequest, budgets: str, compute: Compute, *, out: Path, overwrite: bool) -> MeasuredFrontier:
    """Measure the frontier of some budgets and write it to a folder: CSV, picture, JSON, and a plan for each budget.

    ``budgets``: LOW:HIGH:STEP as ``parse_sweep`` reads it. The plans are for ``prune --plan``.

    Raises: as ``measured_frontier``, and MinipuzzleError for scores without tokens and no validation text.
    """
    if request.choosing.race is not None or request.choosing.refine or request.plan is not None:
        raise MinipuzzleError(
            "a sweep measures candidates and cuts nothing", "drop ‹num_finalists›, ‹refine› and ‹plan›"
        )
    assert request.target is not None
    checkpoint = request.checkpoint
    source_bytes = memory_breakdown(checkpoint.origin.architecture, request.deployment).total_bytes
    sizes = parse_sweep(budgets, source_bytes)
    tokenizer = load_tokenizer(checkpoint.tokenizer_folder)
    documents, validation = (read_documents(paths, tokenizer) for paths in (request.data, request.validation))
    scores = read_scores(request.scores) if isinstance(request.scores, Path) else request.scores
    provenance = request.provenance(compute)
    provenance["settings"]["sweep"] = budgets
    with output_folder(out, provenance, overwrite=overwrite) as folder:
        scores = scores or measured_scores(request, documents, compute, folder)
        scores.check_against(checkpoint.architecture, checkpoint.fingerprint)
        windows = comparison_windows(request, scores, validation)
        if windows is None:
            raise MinipuzzleError("there is nothing to measure candidates on", "give ‹validation›")
        problem = Problem(checkpoint=checkpoint, scores=scores, target=request.target, deployment=request.deployment)
        found = measured_frontier(problem, sizes, windows, request.choosing, compute)
        write_json(folder / "frontier.json", found.to_json())
        write_frontier_csv(found.points, folder / "frontier.csv", quality="kl")
        plot_frontier(found.points, folder / "frontier.png", quality=QUALITY)
        for size, plan in zip(sizes, found.plans, strict=True):
            if plan is not None:
                (folder / f"plan-{size}.json").write_text(recorded(checkpoint, plan).to_json(), encoding="utf-8")
    return found
