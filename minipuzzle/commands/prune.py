"""``minipuzzle prune``: a checkpoint and a budget in, a smaller checkpoint out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.errors import MinipuzzleError
from minipuzzle.memory import Deployment
from minipuzzle.options import (
    COUNT,
    FOLDER_OR_FILE,
    data_option,
    default_device,
    deployment_options,
    device_option,
    dry_run_option,
    echo_json,
    json_option,
    model_argument,
    out_option,
    overwrite_option,
    search_options,
)
from minipuzzle.search import SearchRequest

if TYPE_CHECKING:
    from minipuzzle.checkpoint import Checkpoint
    from minipuzzle.pruning import Choice
    from minipuzzle.scores import Scores


@dataclass(frozen=True, kw_only=True)
class PruneInputs:
    """Where the plan comes from: a plan file, a score file, or text to measure on."""

    plan: Path | None
    scores: Path | None
    data: tuple[Path, ...]
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    num_candidates: int = 8
    dtype: str = "float32"
    device: str = "cpu"


@click.command(short_help="Cut a model to a memory budget.")
@model_argument()
@search_options
@deployment_options
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
    from minipuzzle.report import plan_summary, print_plan

    inputs = PruneInputs(plan=plan_path, scores=scores_path, data=data, device=default_device(device), **measuring)
    _check_inputs(inputs, request)
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain_weights()
    check_target_folder(out, overwrite=overwrite)
    if dry_run:
        _print_dry_run(checkpoint, inputs, request, deployment, as_json)
        return
    choice = prune_checkpoint(checkpoint, inputs, request, deployment, out=out, overwrite=overwrite, quiet=as_json)
    source = checkpoint.architecture
    if as_json:
        measured = [{**ranked.plan.notes, **ranked.evaluation.to_json()} for ranked in choice.ranked]
        echo_json({"out": str(out), **plan_summary(source, choice.plan, deployment), "measured_candidates": measured})
        return
    print_plan(source, choice.plan.apply(source), choice.plan.dropped_layers(source), deployment)
    if choice.ranked:
        evaluation = choice.ranked[0].evaluation
        click.echo(f"KL to the source {evaluation.kl:.4f} nats/token before distillation")
    click.echo(f"written to {out}\nnext: minipuzzle distill {out} --data ... --tokens ... -o ...")


def _check_inputs(inputs: PruneInputs, request: SearchRequest | None) -> None:
    if inputs.plan is not None:
        if request is not None or inputs.scores is not None:
            raise MinipuzzleError("--plan already says what to cut", "drop --scores, --memory, --keep and --width")
        return
    if request is None:
        raise MinipuzzleError("nothing says how small the model should be", "give --memory, --keep or --width")
    if inputs.scores is None and not inputs.data:
        raise MinipuzzleError("there is nothing to measure on", "give --data, or --scores of an earlier run")


def prune_checkpoint(
    checkpoint: Checkpoint,
    inputs: PruneInputs,
    request: SearchRequest | None,
    deployment: Deployment,
    *,
    out: Path,
    overwrite: bool,
    quiet: bool,
) -> Choice:
    """Do what `minipuzzle prune` does, after its arguments are checked; used by the demo too.

    Raises: MinipuzzleError for bad input, InfeasibleBudgetError, InputChangedError for another interrupted run.
    """
    from minipuzzle.corpus import read_documents
    from minipuzzle.outputs import fingerprint_files, output_folder
    from minipuzzle.plan import read_plan
    from minipuzzle.progress import progress_bar
    from minipuzzle.pruning import Choice, check_feasible, prune_provenance, write_pruned
    from minipuzzle.scores import read_scores

    if request is not None:
        check_feasible(checkpoint, request, deployment)
    # Read before the output folder is begun, so that a broken file leaves no trace.
    documents = read_documents(inputs.data)
    plan = read_plan(inputs.plan) if inputs.plan is not None else None
    scores = read_scores(inputs.scores) if inputs.scores is not None else None
    files = [path for path in (inputs.plan, inputs.scores, *inputs.data) if path is not None]
    settings = {
        "request": asdict(request) if request else None,
        "deployment": asdict(deployment),
        "samples": inputs.samples,
        "sequence_length": inputs.sequence_length,
        "seed": inputs.seed,
        "num_candidates": inputs.num_candidates,
        "dtype": inputs.dtype,
        "inputs_fingerprint": fingerprint_files(files),
    }
    with output_folder(out, prune_provenance(checkpoint, settings), overwrite=overwrite) as folder:
        if plan is not None:
            choice = Choice(plan=plan, candidates=(), ranked=())
        else:
            assert request is not None
            scores = scores or _measured_scores(checkpoint, inputs, documents, folder, quiet)
            choice = _choose(checkpoint, scores, inputs, request, deployment, quiet)
        num_tensors = sum(1 for _ in choice.plan.apply(checkpoint.architecture).tensors())
        with progress_bar("cutting", num_tensors, quiet=quiet) as advance:
            write_pruned(checkpoint, choice.plan, folder, advance)
    return choice


def _measured_scores(
    checkpoint: Checkpoint, inputs: PruneInputs, documents: list[str], folder: Path, quiet: bool
) -> Scores:
    """Scores measured by an interrupted run of the same command, or measured now and kept in ``folder``."""
    from importance.measure import measure
    from minipuzzle.corpus import sample_windows
    from minipuzzle.models import load_tokenizer
    from minipuzzle.outputs import output_file
    from minipuzzle.pruning import SCORES_FILE, UNFINISHED_SCORES_FILE
    from minipuzzle.scores import read_scores, write_scores

    kept = folder / SCORES_FILE
    if kept.is_file():
        return read_scores(kept)
    tokenizer = load_tokenizer(checkpoint.folder)
    token_ids = sample_windows(
        tokenizer,
        documents,
        num_samples=inputs.samples,
        sequence_length=inputs.sequence_length,
        seed=inputs.seed,
    )
    scores = measure(
        checkpoint,
        token_ids,
        device=inputs.device,
        dtype=inputs.dtype,
        partial_file=folder / UNFINISHED_SCORES_FILE,
        quiet=quiet,
    )
    with output_file(kept) as path:
        write_scores(scores, path)
    return scores


def _choose(
    checkpoint: Checkpoint,
    scores: Scores,
    inputs: PruneInputs,
    request: SearchRequest,
    deployment: Deployment,
    quiet: bool,
) -> Choice:
    import torch

    from minipuzzle.corpus import windows_of_tokens
    from minipuzzle.models import load_tokenizer
    from minipuzzle.progress import progress_bar
    from minipuzzle.pruning import choose_plan

    num_measured = inputs.num_candidates if scores.token_ids is not None else 1
    token_ids = torch.from_numpy(scores.token_ids).long() if scores.token_ids is not None else torch.zeros(1, 2).long()
    windows = windows_of_tokens(load_tokenizer(checkpoint.folder), token_ids)
    with progress_bar("measuring candidates", num_measured, quiet=quiet) as advance:
        return choose_plan(
            checkpoint,
            scores,
            request,
            deployment,
            windows,
            num_measured=num_measured,
            dtype=getattr(torch, inputs.dtype),
            device=inputs.device,
            advance=advance,
        )


def _print_dry_run(
    checkpoint: Checkpoint,
    inputs: PruneInputs,
    request: SearchRequest | None,
    deployment: Deployment,
    as_json: bool,
) -> None:
    from minipuzzle.corpus import read_documents
    from minipuzzle.memory import memory_breakdown
    from minipuzzle.plan import read_plan
    from minipuzzle.pruning import check_feasible
    from minipuzzle.scores import read_scores
    from minipuzzle.units import format_gib

    source = checkpoint.architecture
    source_bytes = memory_breakdown(source, deployment).total_bytes
    facts: dict[str, Any] = {"source_memory_bytes": source_bytes, "weight_bytes_to_read": checkpoint.weight_bytes}
    if request is not None:
        candidates = check_feasible(checkpoint, request, deployment)
        facts |= {
            "budget_bytes": request.budget_bytes(source_bytes),
            "candidates_that_fit": len(candidates),
            "largest_candidate_bytes": max(candidate.memory_bytes for candidate in candidates),
        }
    if inputs.plan is not None:
        read_plan(inputs.plan).check_against(source)
    if inputs.scores is not None:
        read_scores(inputs.scores).check_against(source, checkpoint.fingerprint)
    if inputs.data:
        facts["documents"] = len(read_documents(inputs.data))
    if as_json:
        echo_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<26} {format_gib(value) if 'bytes' in name else value}")
    click.echo("dry run: nothing was written")
