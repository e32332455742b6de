"""``minipuzzle prune``: a checkpoint and a budget in, a smaller checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.memory import Deployment
from minipuzzle.options import (
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
from minipuzzle.search import SearchRequest
from minipuzzle.search_options import search_options

if TYPE_CHECKING:
    import torch

    from minipuzzle.checkpoint import Checkpoint
    from minipuzzle.pruning import Measure, PruneRequest
    from minipuzzle.scores import Scores


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
    help="Candidates to cut in memory and measure; 1 trusts the prediction.",
    show_default=True,
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
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
    device: str | None,
    out: Path,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **measuring: Any,
) -> None:
    """Cut a model to a memory budget: measure, search, measure the best candidates, cut.

    Needs --memory, --keep or --width, and --data to measure on; --scores skips the measuring, --plan the search.
    The result is a complete checkpoint folder that remembers its teacher for `minipuzzle distill`.
    An interrupted run continues when the same command is given again.
    """
    from minipuzzle.checkpoint import Checkpoint
    from minipuzzle.outputs import check_target_folder
    from minipuzzle.pruning import PruneRequest
    from minipuzzle.pruning import prune as run_prune
    from minipuzzle.report import plan_summary, print_plan

    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain_weights()
    prune_request = PruneRequest(
        checkpoint=checkpoint,
        target=request,
        deployment=deployment,
        plan=plan_path,
        scores=scores_path,
        data=data,
        device=default_device(device),
        **measuring,
    )
    check_target_folder(out, overwrite=overwrite)
    if dry_run:
        _print_dry_run(prune_request, as_json)
        return
    measure = measurer(device=prune_request.device, dtype=prune_request.dtype, quiet=as_json)
    choice = run_prune(prune_request, measure, out=out, overwrite=overwrite, quiet=as_json)
    source = checkpoint.architecture
    if as_json:
        measured = [{**ranked.plan.notes, **ranked.quality.to_json()} for ranked in choice.ranked]
        echo_json({"out": str(out), **plan_summary(source, choice.plan, deployment), "measured_candidates": measured})
        return
    print_plan(source, choice.plan.apply(source), choice.plan.dropped_layers(source), deployment)
    if choice.ranked:
        click.echo(f"KL to the source {choice.ranked[0].quality.kl:.4f} nats/token before distillation")
    click.echo(f"written to {out}\nnext: minipuzzle distill {out} --data ... --tokens ... -o ...")


def measurer(*, device: str, dtype: str, quiet: bool) -> Measure:
    """How `prune` and `demo` measure: all scores of all windows, continued if interrupted."""
    from importance.measure import measure

    def measure_all(checkpoint: Checkpoint, token_ids_BT: torch.Tensor, partial_file: Path) -> Scores:
        return measure(checkpoint, token_ids_BT, device=device, dtype=dtype, partial_file=partial_file, quiet=quiet)

    return measure_all


def _print_dry_run(request: PruneRequest, as_json: bool) -> None:
    from minipuzzle.pruning import planned_work
    from minipuzzle.units import format_gib

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
    from importance.measure import open_stack, predict_work

    length = request.sequence_length
    stack = open_stack(request.checkpoint, sequence_length=length, device=request.device, dtype=request.dtype)
    work = predict_work(stack, layer_samples=request.samples, channel_samples=request.samples, sequence_length=length)
    return {
        "layer_applications": work.layer_applications,
        "weights_to_read_bytes": work.weight_bytes_read,
        "memory_while_measuring_bytes": work.peak_bytes,
    }
