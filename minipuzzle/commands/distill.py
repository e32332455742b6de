"""``minipuzzle distill``: train a cut model on the next-token distributions of the model it was cut from."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill.engine import EngineSettings
from distill.schedules import SCHEDULES
from distill.settings import DOCUMENTS, FORMS, DistillSettings
from minipuzzle.architecture.quantities import format_count, format_gib
from minipuzzle.commands.options.engine import (
    engine_options,
    estimate_options,
    require_options,
    show_comparison,
    show_estimates,
)
from minipuzzle.commands.options.generate import compute_of
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
from minipuzzle.runtime.compute import DTYPES, Compute

if TYPE_CHECKING:
    from distill.run import DistillResult, PreparedRun
    from distill.settings import StepRecord
    from minipuzzle.files.checkpoint import Checkpoint

DEFAULTS = DistillSettings(tokens=1)
DEFAULT_TOP_K = 64  # of a teacher cache


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
@click.option(
    "--form",
    type=click.Choice(FORMS.names()),
    default=DEFAULTS.form,
    show_default=True,
    help="How the distributions are compared: KL from teacher to student, the reverse, or with a mixture of both.",
)
@click.option(
    "--mixture-share",
    type=float,
    help="Share of the first distribution in that mixture; default: 0.5 for jsd, 0.1 for skewed forms.",
)
@click.option(
    "--top-k",
    type=COUNT,
    default=DEFAULTS.top_k,
    help="Of the teacher, this many likeliest tokens and one outcome for all others; default: all, 64 with a cache.",
)
@click.option(
    "--teacher-cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the teacher's top-k targets in this folder, for further epochs and students; several runs may share it.",
)
@click.option(
    "--hidden-weight",
    type=float,
    default=DEFAULTS.hidden_weight,
    show_default=True,
    help="Weight of the cosine distance between what the two LM heads see.",
)
@click.option(
    "--schedule",
    type=click.Choice(SCHEDULES.names()),
    default=DEFAULTS.schedule,
    show_default=True,
    help="How the learning rate falls after the warm-up; wsd stays high and falls at the end.",
)
@click.option(
    "--warmup-fraction", type=float, default=DEFAULTS.warmup_fraction, show_default=True, help="Part of the run."
)
@click.option(
    "--decay-fraction",
    type=float,
    default=DEFAULTS.decay_fraction,
    show_default=True,
    help="Part of the run in which wsd lets the rate fall.",
)
@click.option(
    "--documents",
    type=click.Choice(DOCUMENTS.names()),
    default=DEFAULTS.documents,
    show_default=True,
    help="packed: without gaps or resets, as in pre-training; separate: a sequence holds one document, padded.",
)
@click.option(
    "--held-out",
    type=float,
    default=DEFAULTS.held_out,
    show_default=True,
    help="Share of the documents in --data to keep for validation; a blend file says so itself.",
)
@click.option(
    "--tensorboard",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the figures of each step for TensorBoard into this folder.",
)
@click.option("--save-every", type=COUNT, default=0, help="Save the state every N steps; default: every 5 minutes.")
@click.option(
    "--eval-every", type=COUNT, default=0, help="Evaluate every N steps and write the best; default: before and after."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES.names()),
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
    teacher_cache: Path | None,
    tensorboard: Path | None,
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
    from distill.run import DistillRequest, find_teacher, prepare_run
    from minipuzzle.files.checkpoint import Checkpoint

    if to_hf is not None:
        require_options(out=out)
        assert out is not None
        _convert(Checkpoint.open(student), out, to_hf, overwrite=overwrite, as_json=as_json)
        return
    require_options(tokens=tokens)
    if teacher_cache is not None:
        options["top_k"] = options["top_k"] or DEFAULT_TOP_K
    of_others = Compute(device="cuda", dtype=dtype or "bfloat16") if estimate and gpus else None
    compute = of_others or compute_of({"device": device, "dtype": dtype}, is_quiet=as_json)
    settings = _settings({"tokens": tokens, **options}, compute.dtype)
    if estimate:
        teacher = teacher or find_teacher(student)
        show_estimates(student, teacher, settings, engine, compute, gpus=gpus, gpu=gpu, as_json=as_json)
        return
    require_options(data=data, out=out)
    assert out is not None
    request = DistillRequest(
        student=Checkpoint.open(student),
        teacher=Checkpoint.open(teacher or find_teacher(student)),
        out=out,
        data=data,
        validation=validation,
        teacher_cache=teacher_cache,
        settings=settings,
        engine=engine,
        overwrite=overwrite,
    )
    _distill(prepare_run(request, compute), tensorboard, dry_run=dry_run, as_json=as_json)


def _distill(prepared: PreparedRun, tensorboard: Path | None, *, dry_run: bool, as_json: bool) -> None:
    from distill.run import run_prepared
    from distill.states.records import tensorboard_log
    from minipuzzle.show.distill import distill_progress

    is_first = prepared.compute.processes.is_first
    for note in prepared.notes if is_first else ():
        click.echo(note, err=True)
    if dry_run:
        if is_first:
            _show_plan(prepared, as_json=as_json)
        return
    quiet = as_json or not is_first
    if not quiet:
        _show_text(prepared)
    with (
        tensorboard_log(tensorboard if is_first else None) as log,
        distill_progress(prepared.request.settings.total_steps, quiet=quiet, prepared=prepared) as draw,
    ):

        def on_step(record: StepRecord) -> None:
            log(record)
            draw(record)

        result = run_prepared(prepared, on_step=on_step)
    if is_first:
        _show_result(result, as_json=as_json)


def _convert(student: Checkpoint, out: Path, step: int, *, overwrite: bool, as_json: bool) -> None:
    from distill.states.results import convert_state

    target = convert_state(student=student, out=out, step=step, overwrite=overwrite)
    if as_json:
        echo_json({"out": str(target), "step": step})
    else:
        click.echo(f"written to {target}")


def _show_text(prepared: PreparedRun) -> None:
    """What the run will read, before it starts."""
    from rich.console import Console

    from minipuzzle.show.distill import text_notes, text_plan

    console = Console(stderr=True)
    console.print(text_plan(prepared))
    for note in text_notes(prepared):
        console.print(note, highlight=False)


def _settings(options: dict[str, Any], dtype: str) -> DistillSettings:
    names = {"batch": "batch_sequences", "micro_batch": "micro_batch_sequences"}
    return replace(DEFAULTS, dtype=dtype, **{names.get(name, name): value for name, value in options.items()})


def _show_plan(prepared: PreparedRun, *, as_json: bool) -> None:
    from minipuzzle.show.distill import text_notes

    settings = prepared.request.settings
    windows, validation = prepared.text.windows, prepared.validation_windows
    facts = {
        "steps": settings.total_steps,
        "tokens": settings.total_steps * settings.tokens_per_step,
        "tokens_per_step": settings.tokens_per_step,
        "data_tokens": windows.num_tokens,
        "epochs": prepared.epochs,
        "validation_tokens": 0 if validation is None else validation.num_predictions,
        "predicted_fraction": windows.predicted_fraction,
        "teacher_cache_bytes": prepared.cache_bytes,
        **asdict(prepared.estimate.memory),
        "memory_bytes": prepared.estimate.memory.total_bytes,
        "tokens_per_second": round(prepared.estimate.tokens_per_second),
        "hours": prepared.estimate.hours,
    }
    if as_json:
        plan, notes = [asdict(share) for share in windows.plan], text_notes(prepared)
        teacher = str(prepared.request.teacher.folder)
        echo_json({"teacher": teacher, **facts, "plan": plan, "notes": notes, "settings": asdict(settings)})
        return
    _show_text(prepared)
    click.echo(f"{'teacher':<26} {prepared.request.teacher.folder}")
    for name, value in facts.items():
        is_fraction = isinstance(value, float)
        shown = format_gib(int(value)) if "bytes" in name else f"{value:,.2f}" if is_fraction else f"{value:,}"
        estimated = " (estimate)" if name in ("activation_bytes", "tokens_per_second", "hours") else ""
        click.echo(f"{name.removesuffix('_bytes').replace('_', ' '):<26} {shown}{estimated}")
    click.echo("dry run: nothing was written")


def _show_result(result: DistillResult, *, as_json: bool) -> None:
    if as_json:
        echo_json({**asdict(result), "out": str(result.out), "remaining_kl_fraction": result.remaining_kl_fraction})
        return
    from rich.console import Console

    from minipuzzle.show.tables import figures_table

    table = figures_table("", "before", "after", "left")
    if result.validation_kl_before is not None and result.validation_kl_after is not None:
        row = [f"{result.validation_kl_before:.4f}", f"{result.validation_kl_after:.4f}"]
        table.add_row("KL to the teacher, nats/token", *row, f"{result.remaining_kl_fraction:.1%}")
        row = [f"{result.validation_loss_before:.4f}", f"{result.validation_loss_after:.4f}"]
        table.add_row("loss on the text, nats/token", *row, "")
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
    if result.remaining_kl_fraction is not None and result.remaining_kl_fraction >= 1:
        click.echo("the student did not come nearer to its teacher: give more --tokens, or another --learning-rate")
    if result.best_step != result.steps:
        click.echo(f"written are the weights after step {result.best_step:,}, the best by the KL on held-out text")
    click.echo(f"written to {result.out}\nnext: minipuzzle export {result.out} --fp8 -o ...")
