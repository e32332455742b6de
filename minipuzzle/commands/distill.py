"""``minipuzzle distill``: train a cut model on the next-token distributions of the model it was cut from."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill.engine import EngineSettings
from distill.settings import DTYPES, DistillSettings
from minipuzzle.commands.distill_engine import (
    engine_options,
    estimate_options,
    require_options,
    show_comparison,
    show_estimates,
)
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
from minipuzzle.processes import processes_from_environment
from minipuzzle.units import format_count, format_gib

if TYPE_CHECKING:
    from distill.run import DistillResult, PreparedRun
    from minipuzzle.checkpoint import Checkpoint

DEFAULTS = DistillSettings(tokens=1)


@click.command()
@model_argument("student", "STUDENT")
@click.option(
    "--teacher",
    type=FOLDER_OR_FILE,
    default=None,
    help="The model STUDENT was cut from; default: the one that STUDENT remembers.",
)
@data_option(required=False)
@click.option("--tokens", type=COUNT, help="Tokens to train on, e.g. 2M; may exceed the data.")
@out_option(required=False)
@click.option(
    "--validation",
    type=FOLDER_OR_FILE,
    multiple=True,
    help="Held-out text, to measure the distance from the teacher before and after. Repeatable.",
)
@click.option(
    "--sequence-length", type=COUNT, default=DEFAULTS.sequence_length, show_default=True, help="Tokens of a sequence."
)
@click.option(
    "--batch", type=COUNT, default=DEFAULTS.batch_sequences, show_default=True, help="Sequences of an optimiser step."
)
@click.option(
    "--micro-batch",
    type=COUNT,
    default=DEFAULTS.micro_batch_sequences,
    show_default=True,
    help="Sequences computed at once; more is faster on a GPU and takes more memory.",
)
@click.option(
    "--learning-rate",
    type=float,
    default=DEFAULTS.learning_rate,
    show_default=True,
    help="Peak rate; a model of a few million parameters wants about 1e-3.",
)
@click.option(
    "--temperature", type=float, default=DEFAULTS.temperature, show_default=True, help="Softens both distributions."
)
@click.option(
    "--ce-weight",
    type=float,
    default=DEFAULTS.ce_weight,
    show_default=True,
    help="Share of the loss that comes from the text's own next tokens instead of the teacher.",
)
@click.option("--save-every", type=COUNT, default=0, help="Save the state every N steps; default: every 5 minutes.")
@click.option("--eval-every", type=COUNT, default=0, help="Evaluate every N steps; default: before and after the run.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=None,
    help="Precision of the computation; default: bfloat16 on a GPU, float32 on a CPU. Weights are trained in float32.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Order of the text.")
@click.option(
    "--to-hf",
    type=COUNT,
    default=None,
    metavar="STEP",
    help="Write the student as it was after STEP steps of the run towards OUT to OUT.step-STEP, and stop. Needs a "
    "state that is still kept (--save-every, --keep-last); the run may be going on.",
)
@engine_options
@estimate_options
@device_option
@overwrite_option
@dry_run_option
@json_option
def distill(
    student: Path,
    teacher: Path | None,
    data: tuple[Path, ...],
    tokens: int | None,
    validation: tuple[Path, ...],
    out: Path | None,
    device: str | None,
    dtype: str | None,
    engine: EngineSettings,
    estimate: bool,
    gpus: str | None,
    gpu: str,
    to_hf: int | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Recover a cut model: STUDENT learns the next-token distributions of its teacher.

    Interrupted with Ctrl-C or killed, the run leaves OUT.partial, and the same command continues from there. On many
    GPUs: torchrun --nproc-per-node=8 -m minipuzzle distill ...; any number of processes continues what any other
    number began.
    """
    from minipuzzle.checkpoint import Checkpoint

    if to_hf is not None:
        require_options(out=out)
        assert out is not None
        _convert(Checkpoint.open(student), out, to_hf, overwrite=overwrite, as_json=as_json)
        return
    require_options(tokens=tokens)
    device = "cuda" if estimate and gpus else default_device(device)
    settings = _settings({"tokens": tokens, **options}, dtype or ("float32" if device == "cpu" else "bfloat16"))
    if estimate:
        from distill.run import find_teacher

        teacher = teacher or find_teacher(student)
        show_estimates(student, teacher, settings, engine, gpus=gpus, gpu=gpu, device=device, as_json=as_json)
        return
    require_options(data=data, out=out)
    assert out is not None
    _distill(
        student,
        teacher,
        out,
        data=data,
        validation=validation,
        settings=settings,
        engine=engine,
        device=device,
        overwrite=overwrite,
        dry_run=dry_run,
        as_json=as_json,
    )


def _distill(
    student: Path, teacher: Path | None, out: Path, *, dry_run: bool, as_json: bool, **request_fields: Any
) -> None:
    from distill.display import distill_progress
    from distill.run import DistillRequest, find_teacher, prepare_run, run_prepared
    from minipuzzle.checkpoint import Checkpoint

    request = DistillRequest(
        student=Checkpoint.open(student),
        teacher=Checkpoint.open(teacher or find_teacher(student)),
        out=out,
        **request_fields,
    )
    prepared = prepare_run(request)
    is_first = processes_from_environment().is_first
    for note in prepared.notes if is_first else ():
        click.echo(note, err=True)
    if dry_run:
        if is_first:
            _show_plan(prepared, as_json=as_json)
        return
    with distill_progress(request.settings.total_steps, quiet=as_json or not is_first) as on_step:
        result = run_prepared(prepared, on_step=on_step)
    if is_first:
        _show_result(result, as_json=as_json)


def _convert(student: Checkpoint, out: Path, step: int, *, overwrite: bool, as_json: bool) -> None:
    from distill.results import convert_state

    target = convert_state(student=student, out=out, step=step, overwrite=overwrite)
    if as_json:
        echo_json({"out": str(target), "step": step})
    else:
        click.echo(f"written to {target}")


def _settings(options: dict[str, Any], dtype: str) -> DistillSettings:
    names = {"batch": "batch_sequences", "micro_batch": "micro_batch_sequences"}
    return replace(DEFAULTS, dtype=dtype, **{names.get(name, name): value for name, value in options.items()})


def _show_plan(prepared: PreparedRun, *, as_json: bool) -> None:
    settings = prepared.request.settings
    windows, validation = prepared.train_windows, prepared.validation_windows
    facts = {
        "steps": settings.total_steps,
        "tokens": settings.total_steps * settings.tokens_per_step,
        "tokens_per_step": settings.tokens_per_step,
        "data_tokens": windows.num_tokens,
        "epochs": prepared.epochs,
        "validation_tokens": 0 if validation is None else validation.num_predictions,
        **asdict(prepared.estimate.memory),
        "memory_bytes": prepared.estimate.memory.total_bytes,
        "tokens_per_second": round(prepared.estimate.tokens_per_second),
        "hours": prepared.estimate.hours,
    }
    if as_json:
        echo_json({"teacher": str(prepared.request.teacher.folder), **facts, "settings": asdict(settings)})
        return
    click.echo(f"{'teacher':<26} {prepared.request.teacher.folder}")
    for name, value in facts.items():
        is_fraction = name in ("epochs", "hours")
        shown = format_gib(int(value)) if "bytes" in name else f"{value:,.2f}" if is_fraction else f"{value:,}"
        estimated = " (estimate)" if name in ("activation_bytes", "tokens_per_second", "hours") else ""
        click.echo(f"{name.removesuffix('_bytes').replace('_', ' '):<26} {shown}{estimated}")
    click.echo("dry run: nothing was written")


def _show_result(result: DistillResult, *, as_json: bool) -> None:
    if as_json:
        facts = {**asdict(result), "out": str(result.out), "remaining_kl_fraction": result.remaining_kl_fraction}
        echo_json(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "before", "after", "left")
    if result.validation_kl_before is not None and result.validation_kl_after is not None:
        left = f"{result.remaining_kl_fraction:.1%}"
        row = (f"{result.validation_kl_before:.4f}", f"{result.validation_kl_after:.4f}", left)
        table.add_row("KL to the teacher, nats/token", *row)
        for column in table.columns[1:]:
            column.justify = "right"
        Console().print(table)
    click.echo(
        f"{result.steps:,} steps, {format_count(result.tokens)} tokens, {result.epochs:.2f} epochs, "
        f"{result.tokens_per_second:,.0f} tokens/s"
    )
    show_comparison(
        result.estimate,
        tokens_per_second=result.tokens_per_second,
        memory_bytes=result.peak_memory_bytes,
        echo=click.echo,
    )
    if result.skipped_steps:
        click.echo(
            f"{result.skipped_steps} steps were skipped, because their loss or gradient was not finite or rose suddenly"
        )
    click.echo(f"written to {result.out}\nnext: minipuzzle export {result.out} --fp8 -o ...")
