"""A distillation run on standard error: the plan of its text beforehand, and a table that follows its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from distill.settings import DOCUMENTS, OnStep, StepRecord, ignore_step
from minipuzzle.architecture.quantities import format_count, format_gib
from minipuzzle.runtime.compute import Compute, peak_memory_bytes
from minipuzzle.show.bars import steps_bar
from minipuzzle.show.tables import figures_table

if TYPE_CHECKING:
    from distill.run import PreparedRun


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


@contextmanager
def distill_progress(total_steps: int, *, quiet: bool = False, prepared: PreparedRun | None = None) -> Iterator[OnStep]:
    """Yield an OnStep that draws; nothing is drawn where ``quiet``. A continued run starts where it stopped.

    ``prepared``: what a step's speed is compared with; without it the share of the hardware's best is not shown.
    """
    if quiet:
        yield ignore_step
        return
    console = Console(stderr=True)
    bar = steps_bar(console)
    task = bar.add_task("distilling", total=total_steps)
    held_out_kl: list[float] = []
    with Live(bar, console=console, refresh_per_second=4) as live:

        def on_step(record: StepRecord) -> None:
            bar.update(task, completed=record.step)
            if record.validation_kl is not None:
                held_out_kl.append(record.validation_kl)
            live.update(Group(step_table(record, held_out_kl[-1] if held_out_kl else None, prepared), bar))

        yield on_step


def step_table(record: StepRecord, held_out_kl: float | None, prepared: PreparedRun | None) -> Table:
    """The figures of a step in one row."""
    compute = Compute() if prepared is None else prepared.compute
    figures = {
        "loss": f"{record.loss:.4f}",
        "KL": f"{record.kl:.4f}",
        "held-out KL": "-" if held_out_kl is None else f"{held_out_kl:.4f}",
        "rate": f"{record.learning_rate:.1e}",
        "tokens/s": f"{record.tokens_per_second:,.0f}",
        "MFU (est.)": "-" if prepared is None else f"{prepared.used_fraction(record.tokens_per_second):.0%}",
        "memory": format_gib(peak_memory_bytes(compute.torch_device)),
    }
    table = Table(*figures, box=SIMPLE, expand=True)
    table.add_row(*figures.values())
    return table
