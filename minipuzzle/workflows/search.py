"""Searching as a whole: scores and targets in, candidates and the plan of the best out, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minipuzzle.architecture.families import FAMILIES
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.architecture.model import UNIFORM, Architecture
from minipuzzle.cut.plan import Plan, read_plan
from minipuzzle.cut.scores import Scores, read_scores
from minipuzzle.errors import MinipuzzleError, warn
from minipuzzle.files.checkpoint import Checkpoint, architecture_at, holds_weights
from minipuzzle.files.outputs import check_target_file, output_file
from minipuzzle.formats.choices import warn_of_terms_not_exported
from minipuzzle.search.candidates import Candidate
from minipuzzle.search.engine import find_candidates, plan_of, predicted_frontier
from minipuzzle.search.request import SearchRequest
from minipuzzle.search.sweep import FrontierPoint, parse_sweep
from minipuzzle.show.frontier import check_frontier_csv, plot_frontier, write_frontier_csv
from minipuzzle.show.pictures import check_picture_target
from minipuzzle.show.report import architecture_summary
from minipuzzle.workflows.settings import SearchSettings, named_deployment
from minipuzzle.workflows.verbs import Model, verb


@dataclass(frozen=True, kw_only=True)
class FoundCut:
    """A candidate with the scores that choose its layers and channels."""

    candidate: Candidate
    scores: Scores = field(repr=False)
    metric: str = "mse"

    @cached_property
    def plan(self) -> Plan:
        """What to cut.

        Raises: MinipuzzleError if scores of units to cut are missing.
        """
        return plan_of(self.candidate.source, self.scores, self.candidate, metric=self.metric)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The best candidates, best predicted first, or the points of a sweep; ``num_found``: candidates that fit."""

    source: Architecture = field(repr=False)
    request: SearchRequest
    deployment: Deployment
    cuts: tuple[FoundCut, ...] = ()
    num_found: int = 0
    frontier: tuple[FrontierPoint, ...] = ()

    @property
    def best(self) -> FoundCut:
        """The candidate that is predicted to lose least."""
        return self.cuts[0]

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        asked = {"request": asdict(self.request)}
        if self.frontier:
            return {"frontier": [asdict(point) for point in self.frontier], **asked}
        best = self.best.candidate
        facts: dict[str, Any] = {"needs_pruning": True, **best.to_json()}
        facts |= architecture_summary(best.architecture, self.deployment)
        return {**facts, "candidates": [cut.candidate.to_json() for cut in self.cuts], **asked}


def architecture_of(model: Model) -> Architecture:
    """What a model is, from its config.json alone.

    Raises: MinipuzzleError if that is missing, damaged or of an unknown family.
    """
    if isinstance(model, str | Path):
        return architecture_at(Path(model))
    return (model if isinstance(model, Checkpoint) else model.checkpoint).architecture


def _fingerprint_of(model: Model) -> str | None:
    """Of the weights, where there are any beside config.json."""
    if not isinstance(model, str | Path):
        return (model if isinstance(model, Checkpoint) else model.checkpoint).fingerprint
    return Checkpoint.open(Path(model)).fingerprint if holds_weights(Path(model)) else None


def scores_of(scores: Scores | str | Path) -> Scores:
    """Scores from a file, or as they are.

    Raises: MinipuzzleError for anything unreadable.
    """
    return scores if isinstance(scores, Scores) else read_scores(Path(scores))


def run_search(model: Model, scores: Scores | str | Path, settings: SearchSettings) -> SearchResult:
    """Find the cuts that meet all limits and are predicted to lose least, from config.json and scores alone.

    Raises: MinipuzzleError for impossible targets or scores of another model; InfeasibleBudgetError;
    NothingToPruneError if the model meets all limits as it is.
    """
    named = named_deployment(settings.deployment)
    request, deployment = settings.request(named.memory, settings.sweep), named.deployment
    if request is None:
        raise MinipuzzleError("nothing says how small the model should be", "give ‹memory›, ‹keep› or ‹width›")
    _check_targets(model, scores, settings)
    whole, scores = architecture_of(model), scores_of(scores).ranking_experts_by(settings.expert_criterion)
    if (fingerprint := _fingerprint_of(model)) is not None:
        scores.check_against(whole, fingerprint)
    source = replace(whole, vocabulary=request.vocabulary_of(whole))
    if request.vocab is not None:
        scores.check_against(whole)
        request, scores = request.of_source(whole, deployment), replace(scores, token_ids=None)
    warn_of_terms_not_exported(source, deployment)
    if settings.sweep is not None:
        budgets = parse_sweep(settings.sweep, memory_breakdown(whole, deployment).total_bytes)
        points = predicted_frontier(source, scores, request, deployment, budgets)
        _write_frontier(points, settings)
        return SearchResult(source=source, request=request, deployment=deployment, frontier=tuple(points))
    max_candidates = None if request.layout == UNIFORM else settings.top
    candidates = find_candidates(source, scores, request, deployment, max_candidates=max_candidates)
    for candidate in candidates[: settings.top]:
        candidate.check()
    if obstacle := FAMILIES[source.model_type].obstacle(candidates[0].architecture):
        warn(obstacle)
    cuts = [FoundCut(candidate=each, scores=scores, metric=request.metric) for each in candidates[: settings.top]]
    if settings.out is not None:
        with output_file(Path(settings.out)) as path:
            plan = replace(cuts[0].plan, source_fingerprint=whole.fingerprint())  # `prune --vocab` chooses the tokens
            path.write_text(plan.to_json(), encoding="utf-8")
    return SearchResult(
        source=whole, request=request, deployment=deployment, cuts=tuple(cuts), num_found=len(candidates)
    )


def _check_targets(model: Model, scores: Scores | str | Path, settings: SearchSettings) -> None:
    inputs = [Path(given) for given in (model, scores, settings.timings) if isinstance(given, str | Path)]
    for target, read in ((settings.out, read_plan), (settings.csv, check_frontier_csv)):
        if target is not None:
            check_target_file(Path(target), overwrite=settings.overwrite, read=read, inputs=inputs)
    if settings.plot is not None:
        check_picture_target(Path(settings.plot), overwrite=settings.overwrite, inputs=inputs)


search = verb(SearchSettings, run_search)


def _write_frontier(points: Sequence[FrontierPoint], settings: SearchSettings) -> None:
    if settings.csv is not None:
        with output_file(Path(settings.csv)) as path:
            write_frontier_csv(points, path, quality="predicted_loss")
    if settings.plot is not None:
        with output_file(Path(settings.plot)) as path:
            shown = Path(settings.plot).suffix[1:]
            plot_frontier(points, path, quality=f"predicted loss ({settings.metric})", file_format=shown)
