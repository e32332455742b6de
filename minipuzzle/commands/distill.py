"""``minipuzzle distill``: train a cut model on the next-token distributions of the model it was cut from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill.scale.gpus import GPUS
from minipuzzle.commands.options.generate import (
    SectionedCommand,
    SectionOption,
    compute_of,
    compute_options,
    from_options,
    settings_options,
)
from minipuzzle.commands.options.shared import (
    COUNT,
    dry_run_option,
    echo_json,
    json_option,
    model_argument,
    push_option,
)
from minipuzzle.errors import GotWorseError
from minipuzzle.runtime.compute import Compute
from minipuzzle.workflows.settings import DistillOptions

if TYPE_CHECKING:
    from distill.run import PreparedRun

_ESTIMATE: dict[str, Any] = {"cls": SectionOption, "section": "Estimating"}


@click.command(cls=SectionedCommand)
@model_argument("student", "STUDENT")
@settings_options(DistillOptions)
@compute_options(
    dtype_help="Precision of the computation; default: bfloat16 on a GPU, float32 on a CPU. Weights are trained in "
    "float32."
)
@click.option(
    "--to-hf",
    type=COUNT,
    default=None,
    metavar="STEP",
    cls=SectionOption,
    section="Saving and evaluating",
    help="Write the student as it was after STEP steps of the run towards OUT to OUT.step-STEP, and stop. Needs a "
    "state that is still kept (--save-every, --keep-last); the run may be going on.",
)
@click.option(
    "--estimate",
    is_flag=True,
    help="Print memory, speed and hours to expect, and stop. STUDENT may be a config.json, or a plan.json with "
    "--teacher; no weights and no text are needed.",
    **_ESTIMATE,
)
@click.option("--gpus", default=None, help="With --estimate: numbers of GPUs, e.g. 8,64,512.", **_ESTIMATE)
@click.option(
    "--gpu",
    type=click.Choice(GPUS.names()),
    default="h100",
    show_default=True,
    help="With --gpus: which GPU.",
    **_ESTIMATE,
)
@push_option
@dry_run_option
@json_option
def distill(
    student: Path,
    estimate: bool,
    gpus: str | None,
    gpu: str,
    to_hf: int | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Recover a cut model: STUDENT learns the next-token distributions of its teacher.

    Interrupted with Ctrl-C or killed, the run leaves OUT.partial, and the same command continues from there. On many
    GPUs: torchrun --nproc-per-node=8 -m minipuzzle distill ...; any number of processes continues what any other
    number began. A run whose student got worse, or holds no numbers, ends with exit code 6.
    """
    from minipuzzle.show.distill import print_estimates
    from minipuzzle.workflows.distill import estimate_distill, prepare_distill

    needed = ("out",) if to_hf is not None else ("tokens",) if estimate else ("tokens", "data", "out")
    for name in needed:
        if options[name] is None or options[name] == ():
            raise click.UsageError(f"Missing option '--{name}'.")
    if to_hf is not None:
        _convert(student, to_hf, options, as_json=as_json)
        return
    if estimate and gpus:
        compute = Compute(dtype=options.pop("dtype") or "bfloat16")
    else:
        compute = compute_of(options, is_quiet=as_json)
    settings = from_options(DistillOptions, options, compute=compute)
    if estimate:
        estimates = estimate_distill(student, settings, gpus, gpu)
        echo_json(estimates.to_json()) if as_json else print_estimates(estimates.facts, estimates.runs)
        return
    _distill(prepare_distill(student, settings), settings, dry_run=dry_run, as_json=as_json)


def _distill(prepared: PreparedRun, settings: DistillOptions, *, dry_run: bool, as_json: bool) -> None:
    from minipuzzle.show.distill import distill_progress, print_planned, print_result, print_text
    from minipuzzle.workflows.distill import finish_distill, planned_distill

    is_first = prepared.compute.processes.is_first
    for note in prepared.notes if is_first else ():
        click.echo(note, err=True)
    if is_first and not as_json:
        print_text(prepared)
    if dry_run:
        if is_first:
            planned = planned_distill(prepared)
            echo_json(planned) if as_json else print_planned(planned)
        return
    quiet = as_json or not is_first
    with distill_progress(prepared, is_quiet=quiet) as on_step:
        result = finish_distill(
            prepared, settings.tensorboard, on_step, lambda note: click.echo(f"note: {note}", err=True)
        )
    if is_first:
        echo_json(result.to_json()) if as_json else print_result(result)
    if result.problem:
        raise GotWorseError(result.problem, "lower --learning-rate, give more --tokens, or another --data")


def _convert(student: Path, step: int, options: dict[str, Any], *, as_json: bool) -> None:
    from distill.states.results import convert_state
    from minipuzzle.workflows.verbs import open_plain

    target = convert_state(student=open_plain(student), out=options["out"], step=step, overwrite=options["overwrite"])
    if as_json:
        echo_json({"out": str(target), "step": step})
    else:
        click.echo(f"written to {target}")
