"""``minipuzzle prune``: a checkpoint and a budget in, a smaller checkpoint out."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.commands.options.generate import (
    SectionedCommand,
    compute_of,
    compute_options,
    from_options,
    settings_options,
)
from minipuzzle.commands.options.shared import (
    deployment_options,
    dry_run_option,
    echo_json,
    json_option,
    model_argument,
    push_option,
)
from minipuzzle.workflows.settings import PruneSettings

if TYPE_CHECKING:
    from minipuzzle.workflows.prune import PruneRequest


@click.command(cls=SectionedCommand, short_help="Cut a model to a memory budget.")
@model_argument()
@settings_options(PruneSettings)
@click.option(
    "--sweep",
    metavar="LOW:HIGH:STEP",
    help="Cut nothing: measure the best candidates of many budgets, e.g. 50%:100%:5%, and write the frontier of memory "
    "against KL (CSV, PNG, JSON and a plan for each budget) to OUT.",
)
@deployment_options
@compute_options(
    dtype="float32",
    dtype_help="Precision of the computation.",
    memory_help="Memory to measure and compare in, a layer at a time if need be, e.g. 16GiB; a race that would "
    "train in more is refused. Default: most of what is free.",
)
@push_option
@dry_run_option
@json_option
def prune(model: Path, sweep: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Cut a model to a memory budget: measure, search, measure the best candidates, cut.

    Needs --memory, --keep or --width, and --data to measure on; --scores skips the measuring, --plan the search. With
    --finalists 3 --race-tokens N the best candidates are distilled on N tokens each, and the one that then loses least
    is written as it came out of the race; candidates.json holds the table of all.
    The result is a complete checkpoint folder that remembers its teacher for `minipuzzle distill`.
    A cut is mended before it is written (--no-compensate).
    An interrupted run continues when the same command is given again.
    """
    from minipuzzle.files.outputs import check_target_folder
    from minipuzzle.show.report import print_choice, print_compensation, print_plan, print_planned_work
    from minipuzzle.workflows.prune import planned_work, prune_request, run_prune

    compute = compute_of(options, is_quiet=as_json)
    settings = from_options(PruneSettings, options, deployment=options.pop("named_deployment"), compute=compute)
    if dry_run or sweep is not None:
        request = prune_request(model, settings, sweep)
        inputs = (request.checkpoint.folder, *request.files)
        check_target_folder(Path(settings.out), overwrite=settings.overwrite, inputs=inputs)
    if dry_run:
        facts = planned_work(request, compute)
        echo_json(facts) if as_json else print_planned_work(facts)
        return
    if sweep is not None:
        _sweep(request, sweep, settings, as_json=as_json)
        return
    pruned = run_prune(model, settings)
    if as_json:
        echo_json(pruned.to_json())
        return
    source, plan = pruned.source, pruned.plan
    print_plan(source, plan.apply(source), source.layers_besides(plan.kept_layers), pruned.deployment)
    print_choice(pruned.choice.table)
    print_compensation(pruned.choice.compensation)
    click.echo(
        f"written to {pruned.out}\nnext: minipuzzle distill {quote(str(pruned.out))} --data ... --tokens ... -o ..."
    )


def _sweep(request: PruneRequest, budgets: str, settings: PruneSettings, *, as_json: bool) -> None:
    from minipuzzle.show.frontier import frontier_chart
    from minipuzzle.workflows.choosing.frontier import QUALITY, sweep

    out = Path(settings.out)
    found = sweep(request, budgets, settings.compute, out=out, overwrite=settings.overwrite)
    if as_json:
        echo_json({"out": str(out), **found.to_json()})
        return
    click.echo(frontier_chart(found.points, quality=QUALITY))
    model, plans = quote(str(request.checkpoint.folder)), quote(str(out))
    click.echo(f"written to {out}\nnext: minipuzzle prune {model} --plan {plans}/plan-....json -o ...")
