"""``minipuzzle search``: scores and a budget in, a plan out, in seconds and without weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from minipuzzle.errors import MinipuzzleError
from minipuzzle.memory import Deployment
from minipuzzle.options import (
    FOLDER_OR_FILE,
    echo_json,
    json_option,
    model_argument,
    search_options,
)
from minipuzzle.search import SearchRequest


@click.command()
@model_argument(metavar="MODEL|config.json")
@click.option(
    "--scores", "scores_path", type=FOLDER_OR_FILE, required=True, help="Score file of `minipuzzle score`, or JSON."
)
@search_options
@click.option("-o", "--out", type=FOLDER_OR_FILE, default=None, help="Write the best plan here, for `prune --plan`.")
@click.option("--top", type=click.IntRange(min=1), default=5, help="Candidates to show.", show_default=True)
@json_option
def search(
    model: Path,
    scores_path: Path,
    request: SearchRequest | None,
    deployment: Deployment,
    out: Path | None,
    top: int,
    as_json: bool,
) -> None:
    """Find the cut that fits a budget and is predicted to lose least.

    Works from config.json and a score file alone. The prediction adds up scores of single layers; `prune` measures the
    best candidates instead.
    """
    from rich.console import Console

    from minipuzzle.checkpoint import read_json
    from minipuzzle.families import read_architecture
    from minipuzzle.outputs import output_file
    from minipuzzle.report import architecture_summary, print_candidates, print_plan
    from minipuzzle.scores import read_scores
    from minipuzzle.search import find_candidates, plan_of
    from minipuzzle.selection import keep_best_layers, layer_scores

    if request is None:
        raise MinipuzzleError("nothing says how small the model should be", "give --memory, --keep or --width")
    source = read_architecture(read_json(model / "config.json" if model.is_dir() else model))
    scores = read_scores(scores_path)
    candidates = find_candidates(source, scores, request, deployment)
    best = candidates[0]
    kept_layers = keep_best_layers(source, layer_scores(scores, request.metric), best.counts)
    dropped = [layer_idx for layer_idx in range(len(source.layers)) if layer_idx not in set(kept_layers)]
    if out is not None:
        plan = plan_of(source, scores, best, metric=request.metric)
        with output_file(out) as path:
            path.write_text(plan.to_json(), encoding="utf-8")
    if as_json:
        best_summary = {"dropped_layers": dropped, **architecture_summary(best.architecture, deployment)}
        others = [candidate.to_json() for candidate in candidates[:top]]
        facts = {"predicted_loss": best.predicted_loss, "candidates": others, "request": asdict(request)}
        echo_json({**best_summary, **facts})
        return
    if not scores.is_measured_here:
        Console(stderr=True).print("[yellow]note:[/] these scores carry no fingerprint; their origin is unverified")
    print_plan(source, best.architecture, dropped, deployment)
    print_candidates(candidates[:top], len(candidates))
    if out is not None:
        click.echo(f"plan written to {out}")
