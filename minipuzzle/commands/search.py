"""``minipuzzle search``: scores and limits in, a plan out, in seconds and without weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.architecture.memory import Deployment
from minipuzzle.commands.options.search import require_request, search_options
from minipuzzle.commands.options.shared import FOLDER_OR_FILE, echo_json, json_option, model_argument
from minipuzzle.errors import MinipuzzleError
from minipuzzle.search.request import SearchRequest

if TYPE_CHECKING:
    from minipuzzle.architecture.model import Architecture
    from minipuzzle.cut.scores import Scores


@click.command()
@model_argument(metavar="MODEL|config.json")
@click.option(
    "--scores", "scores_path", type=FOLDER_OR_FILE, required=True, help="Score file of `minipuzzle score`, or JSON."
)
@search_options
@click.option("-o", "--out", type=FOLDER_OR_FILE, default=None, help="Write the best plan here, for `prune --plan`.")
@click.option("--top", type=click.IntRange(min=1), default=5, help="Candidates to show.", show_default=True)
@click.option(
    "--sweep",
    metavar="LOW:HIGH:STEP",
    default=None,
    help="Search for each of many budgets, e.g. 20GiB:40GiB:2GiB or 50%:100%:5%, and chart the frontier.",
)
@click.option("--csv", "csv_path", type=FOLDER_OR_FILE, default=None, help="Write the frontier of --sweep as CSV.")
@click.option("--plot", "plot_path", type=FOLDER_OR_FILE, default=None, help="Draw the frontier of --sweep as PNG.")
@json_option
def search(
    model: Path,
    scores_path: Path,
    request: SearchRequest | None,
    deployment: Deployment,
    out: Path | None,
    top: int,
    sweep: str | None,
    csv_path: Path | None,
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Find the cut that meets all limits and is predicted to lose least.

    Works from config.json and a score file alone. The prediction adds up scores of single layers; `prune` measures the
    best candidates instead.
    """
    from rich.console import Console

    from minipuzzle.architecture.families import read_architecture
    from minipuzzle.cut.scores import read_scores
    from minipuzzle.errors import NothingToPruneError
    from minipuzzle.files.checkpoint import read_config
    from minipuzzle.show.report import architecture_summary

    request = require_request(request)
    if sweep is not None and out is not None:
        raise MinipuzzleError("a sweep has no one plan to write", "drop --out, then search at the budget you chose")
    if sweep is None and (csv_path is not None or plot_path is not None):
        raise MinipuzzleError("--csv and --plot belong to a sweep", "add --sweep LOW:HIGH:STEP")
    source = read_architecture(read_config(model))
    scores = read_scores(scores_path)
    if not scores.is_measured_here:
        Console(stderr=True).print("[yellow]note:[/] these scores carry no fingerprint; their origin is unverified")
    if sweep is not None:
        _sweep(source, scores, request, deployment, sweep, csv_path=csv_path, plot_path=plot_path, as_json=as_json)
        return
    try:
        _search(source, scores, request, deployment, out=out, top=top, as_json=as_json)
    except NothingToPruneError as nothing:
        if as_json:
            echo_json({"needs_pruning": False, **architecture_summary(source, deployment)})
        else:
            click.echo(nothing.problem)


def _search(
    source: Architecture,
    scores: Scores,
    request: SearchRequest,
    deployment: Deployment,
    *,
    out: Path | None,
    top: int,
    as_json: bool,
) -> None:
    from minipuzzle.architecture.model import UNIFORM
    from minipuzzle.files.outputs import output_file
    from minipuzzle.search.engine import find_candidates, plan_of
    from minipuzzle.show.report import architecture_summary, print_candidates, print_plan

    max_candidates = None if request.layout == UNIFORM else top
    candidates = find_candidates(source, scores, request, deployment, max_candidates=max_candidates)
    for candidate in candidates[:top]:
        candidate.check()
    best = candidates[0]
    if out is not None:
        plan = plan_of(source, scores, best, metric=request.metric)
        with output_file(out) as path:
            path.write_text(plan.to_json(), encoding="utf-8")
    if as_json:
        facts: dict[str, Any] = {"needs_pruning": True, **best.to_json()}
        facts |= architecture_summary(best.architecture, deployment)
        facts |= {"candidates": [candidate.to_json() for candidate in candidates[:top]], "request": asdict(request)}
        echo_json(facts)
        return
    print_plan(source, best.architecture, source.layers_besides(best.kept_layers), deployment)
    print_candidates(candidates[:top], len(candidates))
    if out is not None:
        click.echo(f"plan written to {out}")


def _sweep(
    source: Architecture,
    scores: Scores,
    request: SearchRequest,
    deployment: Deployment,
    budgets: str,
    *,
    csv_path: Path | None,
    plot_path: Path | None,
    as_json: bool,
) -> None:
    from minipuzzle.architecture.memory import memory_breakdown
    from minipuzzle.files.outputs import output_file
    from minipuzzle.search.engine import predicted_frontier
    from minipuzzle.search.sweep import parse_sweep
    from minipuzzle.show.frontier import frontier_chart, plot_frontier, write_frontier_csv

    source_bytes = memory_breakdown(source, deployment).total_bytes
    points = predicted_frontier(source, scores, request, deployment, parse_sweep(budgets, source_bytes))
    if csv_path is not None:
        with output_file(csv_path) as path:
            write_frontier_csv(points, path, quality="predicted_loss")
    if plot_path is not None:
        with output_file(plot_path) as path:
            plot_frontier(points, path, quality=f"predicted loss ({request.metric})")
    if as_json:
        echo_json({"frontier": [asdict(point) for point in points], "request": asdict(request)})
        return
    click.echo(frontier_chart(points, quality=f"predicted loss ({request.metric})"))
