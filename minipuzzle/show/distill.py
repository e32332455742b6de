"""A distillation run on standard error: the plan of its text beforehand, and a table that follows its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from distill.settings import DOCUMENTS, LARGEST_KL, OnStep, StepRecord, ignore_step
from minipuzzle.architecture.quantities import format_count, format_gib
from minipuzzle.cut.budget import read_serving_budget
from minipuzzle.show.bars import ProgressLines, steps_bar
from minipuzzle.show.tables import figures_table

if TYPE_CHECKING:
    from distill.run import DistillResult, PreparedRun
    from distill.scale.estimate import RunEstimate


def text_plan(prepared: PreparedRun) -> Table:
    """What each phase reads of each source, and how often that makes."""
    columns = ("phase", "source", "tokens", "epochs", "epochs in all", "at most")
    table = figures_table(*columns, num_names=2, title="text of the run", title_justify="center")
    windows = prepared.text.windows
    caps = {source.name: source.max_epochs for source in windows.blend.sources}
    for share in windows.plan:
        table.add_row(
            share.phase,
            share.source,
            format_count(share.num_tokens),
            f"{share.epochs:.2f}",
            f"{windows.epochs_of(share.source):.2f}",
            f"{caps[share.source]:g}",
        )
    return table


def text_notes(prepared: PreparedRun) -> list[str]:
    """What a user should know about the text and the vocabulary, one sentence a line."""
    note = DOCUMENTS[prepared.request.settings.documents].note
    notes = [f"{note}; {prepared.text.windows.predicted_fraction:.1%} of all positions are predicted"]
    if prepared.vocabulary.note:
        notes.append(prepared.vocabulary.note)
    if prepared.text.held_out:
        notes.append(f"{len(prepared.text.held_out):,} documents of the text are held out for validation")
    if prepared.request.teacher_cache is not None:
        description = prepared.request.cache_description(prepared.vocabulary.rows)
        notes.append(
            f"the teacher cache takes {description.bytes_per_token} bytes a token, up to "
            f"{format_gib(prepared.cache_bytes)}; top {description.top_k} of {description.vocabulary:,} tokens; "
            "all others are one outcome, so the divergence is at most that over the whole vocabulary"
        )
    return notes


def print_text(prepared: PreparedRun) -> None:
    """Print what a run will read, before it starts."""
    console = Console(stderr=True)
    console.print(text_plan(prepared))
    for note in text_notes(prepared):
        console.print(note, highlight=False)


def print_planned(facts: Mapping[str, Any]) -> None:
    """Print what a run would do and take."""
    for name, value in facts.items():
        if not isinstance(value, int | float | str):
            continue
        shown = f"{value:,.2f}" if isinstance(value, float) else value if isinstance(value, str) else f"{value:,}"
        shown = format_gib(int(value)) if "bytes" in name else shown
        estimated = " (estimate)" if name in ("activation_bytes", "tokens_per_second", "hours") else ""
        print(f"{name.removesuffix('_bytes').replace('_', ' '):<26} {shown}{estimated}")
    print("dry run: nothing was written")


def print_result(result: DistillResult) -> None:
    """Print what a run did, beside what was expected of it."""
    table = figures_table("", "before", "after", "left")
    if result.validation_kl_before is not None and result.validation_kl_after is not None:
        row = [_shown(result.validation_kl_before), _shown(result.validation_kl_after)]
        table.add_row("KL to the teacher, nats/token", *row, f"{result.remaining_kl_fraction:.1%}")
        row = [_shown(result.validation_loss_before or 0), _shown(result.validation_loss_after or 0)]
        table.add_row("loss on the text, nats/token", *row, "")
        Console().print(table)
    print(
        f"{result.steps:,} steps, {format_count(result.tokens)} tokens, {result.epochs:.2f} epochs, "
        f"{result.tokens_per_second:,.0f} tokens/s"
    )
    expected = result.estimate
    print(f"{'':<22}{'measured':>14}{'estimated':>14}")
    print(f"{'tokens/s':<22}{result.tokens_per_second:>14,.0f}{expected.tokens_per_second:>14,.0f}")
    memory = format_gib(result.peak_memory_bytes), format_gib(expected.memory.total_bytes)
    print(f"{'memory, each process':<22}{memory[0]:>14}{memory[1]:>14}")
    if result.skipped_steps:
        print(
            f"{result.skipped_steps} steps were skipped, because their loss or gradient was not finite or rose suddenly"
        )
    if result.problem is None and result.remaining_kl_fraction is not None and result.remaining_kl_fraction >= 1:
        print("the student did not come nearer to its teacher: give more --tokens, or another --learning-rate")
    if result.best_step != result.steps:
        print(f"written are the weights after step {result.best_step:,}, the best by the KL on held-out text")
    print(f"written to {result.out}")
    if result.problem is None:
        chosen = " --fp8" if read_serving_budget(result.out) is None else ""  # else what it was cut for
        print(f"next: minipuzzle export {quote(str(result.out))}{chosen} -o ...")


def print_estimates(facts: Mapping[str, float], runs: Sequence[RunEstimate]) -> None:
    """Print what runs on some numbers of processes are expected to need."""
    for name, value in facts.items():
        print(
            f"{name.replace('_', ' '):<26} {value:,.2f}" if value < 1 else f"{name.replace('_', ' '):<26} {value:,.0f}"
        )
    table = figures_table("", *(f"{row.num_processes:,} x {row.hardware}" for row in runs))
    for term in asdict(runs[0].memory):
        table.add_row(term.removesuffix("_bytes"), *(format_gib(getattr(row.memory, term)) for row in runs))
    table.add_row("each process", *(format_gib(row.memory.total_bytes) for row in runs), style="bold")
    table.add_row("tokens/s", *(f"{row.tokens_per_second:,.0f}" for row in runs))
    table.add_row("bound by", *(row.bound_by for row in runs))
    table.add_row("hours", *(f"{row.hours:,.3g}" if row.hours < 100 else f"{row.hours:,.0f}" for row in runs))
    table.add_row("possible", *("; ".join(row.problems) or "yes" for row in runs))
    Console().print(table)
    print("an estimate: weights and optimiser are exact, activations, speed and hours are not")


@contextmanager
def distill_progress(prepared: PreparedRun, *, is_quiet: bool = False) -> Iterator[OnStep]:
    """Yield an OnStep that draws; nothing is drawn where ``is_quiet``. A continued run starts where it stopped."""
    if is_quiet:
        yield ignore_step
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _on_step_in_lines(prepared)
        return
    bar = steps_bar(console)
    task = bar.add_task("distilling", total=prepared.request.settings.total_steps)
    held_out_kl: list[float] = []
    with Live(bar, console=console, refresh_per_second=4) as live:

        def on_step(record: StepRecord) -> None:
            bar.update(task, completed=record.step)
            if record.validation_kl is not None:
                held_out_kl.append(record.validation_kl)
            live.update(Group(step_table(record, held_out_kl[-1] if held_out_kl else None, prepared), bar))

        yield on_step


def _on_step_in_lines(prepared: PreparedRun) -> OnStep:
    """An OnStep for logs: a line each half minute."""
    lines: ProgressLines | None = None

    def on_step(record: StepRecord) -> None:
        nonlocal lines
        if lines is None:
            lines = ProgressLines("distilling", prepared.request.settings.total_steps, done=record.step - 1)
        figures = f"loss {_shown(record.loss)}, KL {_shown(record.kl)}, {record.tokens_per_second:,.0f} tokens/s"
        lines.advance(1, figures)

    return on_step


def _shown(nats: float) -> str:
    """Four decimals, or fewer digits of what has diverged."""
    return "no number" if not abs(nats) < LARGEST_KL else f"{nats:.4f}" if abs(nats) < 1e6 else f"{nats:.2e}"


def step_table(record: StepRecord, held_out_kl: float | None, prepared: PreparedRun) -> Table:
    """The figures of a step in one row."""
    figures = {
        "loss": _shown(record.loss),
        "KL": _shown(record.kl),
        "held-out KL": "-" if held_out_kl is None else _shown(held_out_kl),
        "rate": f"{record.learning_rate:.1e}",
        "tokens/s": f"{record.tokens_per_second:,.0f}",
        "MFU (est.)": f"{prepared.used_fraction(record.tokens_per_second):.0%}",
        "memory": format_gib(prepared.compute.own_device.peak_bytes),
    }
    table = Table(*figures, box=SIMPLE, expand=True)
    table.add_row(*figures.values())
    return table
