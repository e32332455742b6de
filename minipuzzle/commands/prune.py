"""``minipuzzle prune``: a checkpoint and a budget in, a smaller checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.architecture.memory import Deployment
from minipuzzle.commands.options.search import search_options
from minipuzzle.commands.options.shared import (
    COUNT,
    FOLDER_OR_FILE,
    data_option,
    default_device,
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
    import torch

    from distill.race import Race, RaceResult
    from minipuzzle.cut.scores import Scores
    from minipuzzle.data.windows import EvaluationWindows
    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.workflows.choosing.compare import ChoosingSettings
    from minipuzzle.workflows.prune import Choice, Measure, PruneRequest


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
    "--device-memory", default=None, help="Memory for comparing candidates, e.g. 16GiB; default: what is free."
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
        _print_dry_run(prune_request, as_json)
        return
    settings = prune_request.choosing
    if sweep is not None:
        _sweep(prune_request, sweep, out=out, overwrite=overwrite, as_json=as_json)
        return
    measure = measurer(device=settings.device, dtype=settings.dtype, quiet=as_json)
    race = racer(prune_request, quiet=as_json)
    choice = run_prune(prune_request, measure, out=out, overwrite=overwrite, quiet=as_json, race=race)
    source = checkpoint.architecture
    if as_json:
        echo_json({"out": str(out), **plan_summary(source, choice.plan, deployment), **choice.table})
        return
    print_plan(source, choice.plan.apply(source), source.layers_besides(choice.plan.kept_layers), deployment)
    _print_choice(choice)
    click.echo(f"written to {out}\nnext: minipuzzle distill {out} --data ... --tokens ... -o ...")


def _sweep(request: PruneRequest, budgets: str, *, out: Path, overwrite: bool, as_json: bool) -> None:
    from minipuzzle.show.frontier import frontier_chart
    from minipuzzle.workflows.choosing.frontier import QUALITY, sweep

    settings = request.choosing
    if settings.race is not None or settings.refine or request.plan is not None:
        raise MinipuzzleError("a sweep measures candidates and cuts nothing", "drop --finalists, --refine and --plan")
    measure = measurer(device=settings.device, dtype=settings.dtype, quiet=as_json)
    found = sweep(request, budgets, measure, out=out, overwrite=overwrite, quiet=as_json)
    if as_json:
        echo_json({"out": str(out), **found.to_json()})
        return
    click.echo(frontier_chart(found.points, quality=QUALITY))
    click.echo(
        f"written to {out}\nnext: minipuzzle prune {request.checkpoint.folder} --plan {out}/plan-....json -o ..."
    )


def _choosing_settings(options: dict[str, Any], sequence_length: int, seed: int) -> ChoosingSettings:
    from distill.race import RaceSettings
    from minipuzzle.architecture.quantities import parse_bytes
    from minipuzzle.workflows.choosing.compare import ChoosingSettings

    race = {name.removeprefix("race_"): options.pop(name) for name in list(options) if name.startswith("race_")}
    batch, tokens = race.pop("batch"), race.pop("tokens")
    device, device_memory = options.pop("device"), options.pop("device_memory")
    settings = None
    if tokens is not None:
        settings = RaceSettings(
            tokens=tokens, batch_sequences=batch, sequence_length=sequence_length, seed=seed, **race
        )
    return ChoosingSettings(
        race=settings,
        device=default_device(device),
        device_memory_bytes=None if device_memory is None else parse_bytes(device_memory),
        **options,
    )


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


def racer(request: PruneRequest, *, quiet: bool) -> Race | None:
    """How `prune` races finalists: by distilling them with the settings of the request; None without a race."""
    settings = request.choosing.race
    if settings is None:
        return None
    from collections.abc import Sequence

    from distill.race import run_race
    from distill.settings import DistillSettings, StepRecord
    from minipuzzle.progress import progress_bar

    distill_settings = DistillSettings(
        tokens=settings.tokens,
        sequence_length=settings.sequence_length,
        batch_sequences=settings.batch_sequences,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        dtype=request.choosing.dtype,
    )

    def race(students: Sequence[Path], windows: EvaluationWindows, folder: Path) -> RaceResult:
        with progress_bar("racing finalists", settings.total_steps(len(students)), quiet=quiet) as advance:

            def on_step(_record: StepRecord) -> None:
                advance(1)

            return run_race(
                students,
                teacher=request.checkpoint,
                data=request.training_data,
                validation=windows,
                settings=settings,
                distill_settings=distill_settings,
                folder=folder,
                device=request.choosing.device,
                on_step=on_step,
            )

    return race


def measurer(*, device: str, dtype: str, quiet: bool) -> Measure:
    """How `prune` and `demo` measure: all scores of all windows, continued if interrupted."""
    from importance.measure import measure

    def measure_all(checkpoint: Checkpoint, token_ids_BT: torch.Tensor, partial_file: Path) -> Scores:
        return measure(checkpoint, token_ids_BT, device=device, dtype=dtype, partial_file=partial_file, quiet=quiet)

    return measure_all


def _print_dry_run(request: PruneRequest, as_json: bool) -> None:
    from minipuzzle.architecture.quantities import format_gib
    from minipuzzle.workflows.prune import planned_work

    facts = planned_work(request)
    if request.scores is None and request.data:
        facts |= _measuring_work(request)
    if as_json:
        echo_json(facts)
        return
    for name, value in facts.items():
        label = name.replace("_bytes", "").replace("_", " ")
        click.echo(f"{label:<30} {format_gib(value) if name.endswith('_bytes') else f'{value:,}'}")
    click.echo("dry run: nothing was written")


def _measuring_work(request: PruneRequest) -> dict[str, int]:
    from importance.work import open_stack, predict_work

    length = request.sequence_length
    stack = open_stack(
        request.checkpoint, sequence_length=length, device=request.choosing.device, dtype=request.choosing.dtype
    )
    work = predict_work(stack, layer_samples=request.samples, channel_samples=request.samples, sequence_length=length)
    return {
        "layer_applications": work.layer_applications,
        "weights_to_read_bytes": work.weight_bytes_read,
        "memory_while_measuring_bytes": work.peak_bytes,
    }
