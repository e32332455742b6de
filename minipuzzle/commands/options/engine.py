"""How ``minipuzzle distill`` is executed: the options, and what a run is expected to need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill.engine import OFFLOADS, QUANTIZATIONS, EngineSettings
from distill.scale.gpus import GPUS
from distill.settings import DistillSettings
from minipuzzle.architecture.quantities import format_gib
from minipuzzle.commands.options.shared import COUNT, Function, echo_json
from minipuzzle.errors import MinipuzzleError
from minipuzzle.runtime.compute import Compute

if TYPE_CHECKING:
    from distill.scale.estimate import RunEstimate
    from minipuzzle.architecture.model import Architecture

ENGINE_DEFAULTS = EngineSettings()


_ENGINE_OPTIONS = (
    click.option(
        "--fp8",
        is_flag=True,
        help="Multiply in FP8 on GPUs that can (with torchao); elsewhere this says why not and changes nothing.",
    ),
    click.option(
        "--qat",
        type=click.Choice(QUANTIZATIONS),
        default=ENGINE_DEFAULTS.qat,
        show_default=True,
        help="Train through the rounding of an FP8 export; best for a short run at a low rate after a plain one.",
    ),
    click.option(
        "--compile", "compile_layers", is_flag=True, help="Run the student's layers as torch.compile makes them."
    ),
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


def engine_options(function: Function) -> Function:
    """How the run is executed, whatever it learns; passed on as one ``engine``."""

    @wraps(function)
    def with_engine(**params: Any) -> Any:
        engine = EngineSettings(**{field.name: params.pop(field.name) for field in fields(EngineSettings)})
        return function(engine=engine, **params)

    decorated: Any = with_engine
    for option in reversed(_ENGINE_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def estimate_options(function: Function) -> Function:
    """What to estimate for, instead of running."""
    options = (
        click.option(
            "--estimate",
            is_flag=True,
            help="Print memory, speed and hours to expect, and stop. STUDENT may be a config.json, or a plan.json with "
            "--teacher; no weights and no text are needed.",
        ),
        click.option("--gpus", default=None, help="With --estimate: numbers of GPUs, e.g. 8,64,512."),
        click.option(
            "--gpu",
            type=click.Choice(GPUS.names()),
            default="h100",
            show_default=True,
            help="With --gpus: which GPU.",
        ),
    )
    decorated: Any = function
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def require_options(**values: object) -> None:
    """Refuse a command line without options that only some uses of the command need.

    Raises: click.UsageError naming the first that is missing.
    """
    for name, value in values.items():
        if value is None or value == ():
            raise click.UsageError(f"Missing option '--{name.replace('_', '-')}'.")


def show_estimates(
    student: Path,
    teacher: Path,
    settings: DistillSettings,
    engine: EngineSettings,
    compute: Compute,
    *,
    gpus: str | None,
    gpu: str,
    as_json: bool,
) -> None:
    """Print what a run would need for some numbers of processes, from config.json files alone."""
    from distill.scale.estimate import estimate_run, flops_per_token
    from distill.scale.hardware import hardware_of

    teacher_architecture = _read(teacher)
    student_architecture = _read_student(student, teacher_architecture)
    hardware = GPUS[gpu] if gpus else hardware_of(replace(compute, dtype=settings.dtype))
    estimates = [
        estimate_run(
            student_architecture, teacher_architecture, settings, engine, hardware=hardware, num_processes=number
        )
        for number in (_numbers(gpus) if gpus else (1,))
    ]
    sizes = {"student_parameters": student_architecture, "teacher_parameters": teacher_architecture}
    facts = {
        **{name: architecture.num_parameters for name, architecture in sizes.items()},
        "tokens": settings.total_steps * settings.tokens_per_step,
        "flops_per_token": flops_per_token(student_architecture, teacher_architecture, settings, engine),
        "expected_fraction_of_peak": hardware.expected_fraction,
    }
    if as_json:
        rows = [{**asdict(row), "memory_bytes": row.memory.total_bytes} for row in estimates]
        echo_json({"estimate": True, **facts, "runs": rows})
        return
    for name, value in facts.items():
        click.echo(
            f"{name.replace('_', ' '):<26} {value:,.2f}" if value < 1 else f"{name.replace('_', ' '):<26} {value:,.0f}"
        )
    _print_table(estimates)
    click.echo("an estimate: weights and optimiser are exact, activations, speed and hours are not")


def _print_table(estimates: list[RunEstimate]) -> None:
    from rich.console import Console

    from minipuzzle.show.tables import figures_table

    terms = tuple(asdict(estimates[0].memory))
    table = figures_table("", *(f"{row.num_processes:,} x {row.hardware}" for row in estimates))
    for term in terms:
        name = term.removesuffix("_bytes")
        table.add_row(name, *(format_gib(getattr(row.memory, term)) for row in estimates))
    table.add_row("each process", *(format_gib(row.memory.total_bytes) for row in estimates), style="bold")
    table.add_row("tokens/s", *(f"{row.tokens_per_second:,.0f}" for row in estimates))
    table.add_row("bound by", *(row.bound_by for row in estimates))
    table.add_row("hours", *(f"{row.hours:,.3g}" if row.hours < 100 else f"{row.hours:,.0f}" for row in estimates))
    table.add_row("possible", *("; ".join(row.problems) or "yes" for row in estimates))
    Console().print(table)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise MinipuzzleError(f"--gpus is {text!r}", "give whole numbers such as 8 or 8,64,512")
    return tuple(int(part) for part in parts)


def _read(path: Path) -> Architecture:
    from minipuzzle.architecture.families import read_architecture
    from minipuzzle.files.checkpoint import read_config

    return read_architecture(read_config(path))


def _read_student(path: Path, teacher: Architecture) -> Architecture:
    from minipuzzle.cut.plan import read_plan
    from minipuzzle.files.json_files import read_json

    if path.is_dir() or "kept_layers" not in read_json(path):
        return _read(path)
    plan = read_plan(path)
    plan.check_against(teacher)
    return plan.apply(teacher)


def show_comparison(
    estimate: RunEstimate, *, tokens_per_second: float, memory_bytes: int, echo: Callable[[str], None]
) -> None:
    """Print what was estimated beside what was measured."""
    expected = estimate.memory.total_bytes
    echo(f"{'':<22}{'measured':>14}{'estimated':>14}")
    echo(f"{'tokens/s':<22}{tokens_per_second:>14,.0f}{estimate.tokens_per_second:>14,.0f}")
    echo(f"{'memory, each process':<22}{format_gib(memory_bytes):>14}{format_gib(expected):>14}")
