"""``minipuzzle search``: scores and limits in, a plan out, in seconds and without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minipuzzle.commands.options.generate import SectionedCommand, from_options, settings_options
from minipuzzle.commands.options.shared import (
    FOLDER_OR_FILE,
    deployment_options,
    echo_json,
    json_option,
    model_argument,
)
from minipuzzle.workflows.settings import SearchSettings


@click.command(cls=SectionedCommand)
@model_argument(metavar="MODEL|config.json")
@click.option(
    "--scores", "scores_path", type=FOLDER_OR_FILE, required=True, help="Score file of `minipuzzle score`, or JSON."
)
@settings_options(SearchSettings)
@deployment_options
@json_option
def search(model: Path, scores_path: Path, as_json: bool, **options: Any) -> None:
    """Find the cut that meets all limits and is predicted to lose least.

    Works from config.json and a score file alone. The prediction adds up scores of single layers; `prune` measures the
    best candidates instead.
    """
    from minipuzzle.errors import NothingToPruneError
    from minipuzzle.show.frontier import frontier_chart
    from minipuzzle.show.report import architecture_summary, print_candidates, print_plan
    from minipuzzle.workflows.search import architecture_of, run_search, scores_of

    named = options.pop("named_deployment")
    settings = from_options(SearchSettings, options, deployment=named)
    if not scores_of(scores_path).is_measured_here:
        note = click.style("note:", fg="yellow")
        click.echo(f"{note} these scores carry no fingerprint; their origin is unverified", err=True)
    try:
        found = run_search(model, scores_path, settings)
    except NothingToPruneError as nothing:
        if as_json:
            echo_json({"needs_pruning": False, **architecture_summary(architecture_of(model), named.deployment)})
        else:
            click.echo(nothing.problem)
        return
    if as_json:
        echo_json(found.to_json())
    elif found.frontier:
        click.echo(frontier_chart(found.frontier, quality=f"predicted loss ({settings.metric})"))
    else:
        candidates, best = [cut.candidate for cut in found.cuts], found.best.candidate
        print_plan(found.source, best.architecture, found.source.layers_besides(best.kept_layers), found.deployment)
        print_candidates(candidates, found.num_found)
        if settings.out is not None:
            click.echo(f"plan written to {settings.out}")
