"""``minipuzzle prune``: a checkpoint and a budget in, a smaller checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.architecture.memory import Deployment
from minipuzzle.commands.options.generate import compute_of
from minipuzzle.commands.options.search import search_options
from minipuzzle.commands.options.shared import (
    COUNT,
    FOLDER_OR_FILE,
    data_option,
    device_option,
    dry_run_option,
    echo_json,
    json_option,
    model_argument,
    out_option,
    overwrite_option,
)
from minipuzzle.errors import MinipuzzleError
from minipuzzle.quality.ranked import DEFAULT_RANK_BY, RANK_BY
from minipuzzle.runtime.compute import DTYPES
from minipuzzle.search.request import SearchRequest

if TYPE_CHECKING:
    from minipuzzle.runtime.compute import Compute
    from minipuzzle.workflows.choosing.compare import ChoosingSettings
    from minipuzzle.workflows.prune import Choice, PruneRequest


@click.command(short_help="Cut a model to a memory budget.")
@model_argument()
@search_options
@data_option(required=False)
@click.option("--scores", "scores_path", type=FOLDER_OR_FILE, default=None, help="Use these scores; measure nothing.")
@click.option("--plan", "plan_path", type=FOLDER_OR_FILE, default=None, help="Cut by this plan; search nothing.")
@click.option("--samples", type=COUNT, default=128, help="Calibration samples.", show_default=True)
@click.option("--sequence-length", type=COUNT, default=512, help="Tokens a sample.", show_default=True)
@click.option("--seed", type=int, default=0, help="Seed of the sampling.", show_default=True)
@click.option(
    "--candidates",
    "num_candidates",
    type=click.IntRange(min=1),
    default=8,
    help="Candidates to measure, the best predicted; 1 trusts the prediction.",
    show_default=True,
)
@click.option(
    "--validation",
    type=FOLDER_OR_FILE,
    multiple=True,
    help="Text to compare candidates on; default: the calibration samples. Repeatable.",
)
@click.option(
    "--rank-by",
    type=click.Choice(RANK_BY.names()),
    default=DEFAULT_RANK_BY,
    help="kl: to the source, the least noisy; loss; mean-rank: of next-token accuracy and agreement, as published.",
    show_default=True,
)
@click.option(
    "--refine", is_flag=True, help="Add and exchange layers of the best candidate while that measures better."
)
@click.option("--finalists", "num_finalists", type=click.IntRange(min=1), default=1, help="Candidates that race.")
@click.option(
    "--race-tokens", type=COUNT, help="Tokens that each finalist is distilled on; the winner keeps its weights."
)
@click.option("--race-data", type=FOLDER_OR_FILE, multiple=True, help="Text for that; default: --data. Repeatable.")
@click.option("--race-halving", is_flag=True, help="Race in rounds and drop the worse half after each.")
@click.option("--race-learning-rate", type=float, default=1e-4, help="Peak rate of the race.", show_default=True)
@click.option("--race-batch", type=COUNT, default=16, help="Sequences of an optimiser step.", show_default=True)
@click.option(
    "--sweep",
    metavar="LOW:HIGH:STEP",
    help="Cut nothing: measure the best candidates of many budgets, e.g. 50%:100%:5%, and write the frontier of memory "
    "against KL (CSV, PNG, JSON and a plan for each budget) to OUT.",
)
@click.option(
    "--device-memory",
    default=None,
    help="Memory to measure and compare in, a layer at a time if need be, e.g. 16GiB; a race that would train in more "
    "is refused. Default: most of what is free.",
)
@click.option("--dtype", type=click.Choice(DTYPES.names()), default="float32", show_default=True)
@device_option
@out_option()
@overwrite_option
@dry_run_option
@json_option
def prune(
    model: Path,
    request: SearchRequest | None,
    deployment: Deployment,
    data: tuple[Path, ...],
    scores_path: Path | None,
    plan_path: Path | None,
    validation: tuple[Path, ...],
    race_data: tuple[Path, ...],
    sweep: str | None,
    out: Path,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    samples: int,
    sequence_length: int,
    seed: int,
    **choosing: Any,
) -> None:
    """Cut a model to a memory budget: measure, search, measure the best candidates, cut.

    Needs --memory, --keep or --width, and --data to measure on; --scores skips the measuring, --plan the search. With
    --finalists 3 --race-tokens N the best candidates are distilled on N tokens each, and the one that then loses least
    is written as it came out of the race; candidates.json holds the table of all.
    The result is a complete checkpoint folder that remembers its teacher for `minipuzzle distill`.
    An interrupted run continues when the same command is given again.
    """
    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.files.outputs import check_target_folder
    from minipuzzle.show.report import plan_summary, print_plan
    from minipuzzle.workflows.prune import PruneRequest
    from minipuzzle.workflows.prune import prune as run_prune

    compute = compute_of(choosing, is_quiet=as_json)
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain_weights()
    prune_request = PruneRequest(
        checkpoint=checkpoint,
        target=request,
        deployment=deployment,
        plan=plan_path,
        scores=scores_path,
        data=data,
        validation=validation,
        race_data=race_data,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        choosing=_choosing_settings(choosing, sequence_length, seed),
    )
    check_target_folder(out, overwrite=overwrite)
    if dry_run:
        _print_dry_run(prune_request, compute, as_json)
        return
    if sweep is not None:
        _sweep(prune_request, sweep, compute, out=out, overwrite=overwrite, as_json=as_json)
        return
    choice = run_prune(prune_request, compute, out=out, overwrite=overwrite)
    source = checkpoint.architecture
    if as_json:
        echo_json({"out": str(out), **plan_summary(source, choice.plan, deployment), **choice.table})
        return
    print_plan(source, choice.plan.apply(source), source.layers_besides(choice.plan.kept_layers), deployment)
    _print_choice(choice)
    click.echo(f"written to {out}\nnext: minipuzzle distill {out} --data ... --tokens ... -o ...")


def _sweep(request: PruneRequest, budgets: str, compute: Compute, *, out: Path, overwrite: bool, as_json: bool) -> None:
    from minipuzzle.show.frontier import frontier_chart
    from minipuzzle.workflows.choosing.frontier import QUALITY, sweep

    settings = request.choosing
    if settings.race is not None or settings.refine or request.plan is not None:
        raise MinipuzzleError("a sweep measures candidates and cuts nothing", "drop --finalists, --refine and --plan")
    found = sweep(request, budgets, compute, out=out, overwrite=overwrite)
    if as_json:
        echo_json({"out": str(out), **found.to_json()})
        return
    click.echo(frontier_chart(found.points, quality=QUALITY))
    click.echo(
        f"written to {out}\nnext: minipuzzle prune {request.checkpoint.folder} --plan {out}/plan-....json -o ..."
    )


def _choosing_settings(options: dict[str, Any], sequence_length: int, seed: int) -> ChoosingSettings:
    from distill.race import RaceSettings
    from minipuzzle.workflows.choosing.compare import ChoosingSettings

    race = {name.removeprefix("race_"): options.pop(name) for name in list(options) if name.startswith("race_")}
    batch, tokens = race.pop("batch"), race.pop("tokens")
    settings = None
    if tokens is not None:
        settings = RaceSettings(
            tokens=tokens, batch_sequences=batch, sequence_length=sequence_length, seed=seed, **race
        )
    return ChoosingSettings(race=settings, **options)


def _print_choice(choice: Choice) -> None:
    """What the choice was made by: the race, the refinement, the best measured candidate."""
    if "finalists" in choice.table:
        from minipuzzle.show.report import print_finalists

        print_finalists(choice.table["finalists"])
    if (refinement := choice.table.get("refinement")) is not None:
        before, after = refinement["before"]["kl"], refinement["after"]["kl"]
        click.echo(
            f"refined in {refinement['rounds']} rounds, {refinement['neighbours_measured']} neighbours: "
            f"KL {before:.4f} -> {after:.4f} nats/token"
        )
        for name, added_up in refinement.get("sum_of_dropped_layers_kl", {}).items():
            click.echo(
                f"  {name}: measured {refinement[name]['kl']:.4f}, sum of the dropped layers' KLs {added_up:.4f}"
            )
    if "candidates" in choice.table:
        candidates = choice.table["candidates"]
        click.echo(
            f"{len(candidates)} candidates measured; the best, KL {candidates[0]['kl']:.4f} nats/token before "
            f"distillation, was predicted to be number {choice.table['best_was_predicted']}"
        )


def _print_dry_run(request: PruneRequest, compute: Compute, as_json: bool) -> None:
    from minipuzzle.architecture.quantities import format_gib
    from minipuzzle.workflows.prune import planned_work

    facts = planned_work(request, compute)
    if as_json:
        echo_json(facts)
        return
    for name, value in facts.items():
        label = name.replace("_bytes", "").replace("_", " ")
        click.echo(f"{label:<30} {format_gib(value) if name.endswith('_bytes') else f'{value:,}'}")
    click.echo("dry run: nothing was written")
