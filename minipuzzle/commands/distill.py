"""``minipuzzle distill``: train a cut model on the next-token distributions of the model it was cut from."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill.engine import OFFLOADS, EngineSettings
from distill.settings import DTYPES, DistillSettings
from minipuzzle.options import (
    COUNT,
    FOLDER_OR_FILE,
    Function,
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

DEFAULTS = DistillSettings(tokens=1)
ENGINE_DEFAULTS = EngineSettings()


def engine_options(function: Function) -> Function:
    """How the run is executed, whatever it learns; passed on as one ``engine``."""

    @wraps(function)
    def with_engine(**params: Any) -> Any:
        engine = EngineSettings(**{field.name: params.pop(field.name) for field in fields(EngineSettings)})
        return function(engine=engine, **params)

    options = (
        click.option(
            "--activation-checkpointing",
            is_flag=True,
            help="Keep only the inputs of layers and compute the rest twice: less memory, a third more work.",
        ),
        click.option(
            "--teacher-offload",
            type=click.Choice(OFFLOADS),
            default=ENGINE_DEFAULTS.teacher_offload,
            show_default=True,
            help="Keep the teacher in host memory and copy it to the device layer by layer.",
        ),
        click.option(
            "--keep-last",
            type=COUNT,
            default=ENGINE_DEFAULTS.keep_last,
            show_default=True,
            help="Saved states to keep while the run lasts.",
        ),
        click.option(
            "--spike-factor",
            type=float,
            default=ENGINE_DEFAULTS.spike_factor,
            show_default=True,
            help="Skip a step whose loss is so many times the median of recent ones.",
        ),
        click.option(
            "--max-skipped-steps",
            type=click.IntRange(min=0),
            default=ENGINE_DEFAULTS.max_skipped_steps,
            show_default=True,
            help="Stop a run that has skipped more steps than this.",
        ),
    )
    decorated: Any = with_engine
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


@click.command()
@model_argument("student", "STUDENT")
@click.option(
    "--teacher",
    type=FOLDER_OR_FILE,
    default=None,
    help="The model STUDENT was cut from; default: the one that STUDENT remembers.",
)
@data_option()
@click.option("--tokens", type=COUNT, required=True, help="Tokens to train on, e.g. 2M; may exceed the data.")
@out_option()
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
@engine_options
@device_option
@overwrite_option
@dry_run_option
@json_option
def distill(
    student: Path,
    teacher: Path | None,
    data: tuple[Path, ...],
    validation: tuple[Path, ...],
    out: Path,
    device: str | None,
    dtype: str | None,
    engine: EngineSettings,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Recover a cut model: STUDENT learns the next-token distributions of its teacher.

    Interrupted with Ctrl-C or killed, the run leaves OUT.partial, and the same command continues from there. On many
    GPUs: torchrun --nproc-per-node=8 -m minipuzzle.cli distill ...; any number of processes continues what any other
    number began.
    """
    from distill.display import distill_progress
    from distill.run import DistillRequest, find_teacher, prepare_run, run_prepared
    from minipuzzle.checkpoint import Checkpoint

    device = default_device(device)
    settings = _settings(options, dtype or ("float32" if device == "cpu" else "bfloat16"))
    student_checkpoint = Checkpoint.open(student)
    request = DistillRequest(
        student=student_checkpoint,
        teacher=Checkpoint.open(teacher or find_teacher(student)),
        data=data,
        settings=settings,
        out=out,
        engine=engine,
        validation=validation,
        device=device,
        overwrite=overwrite,
    )
    prepared = prepare_run(request)
    is_first = processes_from_environment().is_first
    if dry_run:
        if is_first:
            _show_plan(prepared, as_json=as_json)
        return
    with distill_progress(settings.total_steps, quiet=as_json or not is_first) as on_step:
        result = run_prepared(prepared, on_step=on_step)
    if is_first:
        _show_result(result, as_json=as_json)


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
        **asdict(prepared.memory),
        "memory_bytes": prepared.memory.total_bytes,
    }
    if as_json:
        echo_json({"teacher": str(prepared.request.teacher.folder), **facts, "settings": asdict(settings)})
        return
    click.echo(f"{'teacher':<26} {prepared.request.teacher.folder}")
    for name, value in facts.items():
        shown = format_gib(int(value)) if "bytes" in name else f"{value:,.2f}" if name == "epochs" else f"{value:,}"
        estimated = " (estimate)" if name == "activation_bytes" else ""
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
    seconds = max(result.train_seconds, 1e-9)
    click.echo(
        f"{result.steps:,} steps, {format_count(result.tokens)} tokens, {result.epochs:.2f} epochs, "
        f"{result.tokens / seconds:,.0f} tokens/s"
    )
    if result.skipped_steps:
        click.echo(
            f"{result.skipped_steps} steps were skipped, because their loss or gradient was not finite or rose suddenly"
        )
    click.echo(f"written to {result.out}\nnext: minipuzzle export {result.out} --fp8 -o ...")
