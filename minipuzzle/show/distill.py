"""A distillation run on standard error: the plan of its text beforehand, and a table that follows its steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from distill.settings import DOCUMENTS, OnStep, StepRecord, ignore_step
from minipuzzle.architecture.quantities import format_count, format_gib
from minipuzzle.progress import steps_bar
from minipuzzle.show.tables import figures_table

if TYPE_CHECKING:
    from distill.run import PreparedRun
    from minipuzzle.architecture.model import Architecture

_MATRIX = 1024  # side of the products by which a device's rate is measured
_MATRIX_PRODUCTS = 4


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """What a training token costs in floating-point operations, and what the device does a second at best.

    The work is an estimate: 2 a teacher's parameter for its forward pass, 6 a student's for both passes.
    """

    flops_per_token: float
    flops_per_second: float

    def used_fraction(self, tokens_per_second: float) -> float:
        """Model FLOPs utilisation."""
        return tokens_per_second * self.flops_per_token / self.flops_per_second


def measure_work(
    student: Architecture, teacher: Architecture, *, device: str, dtype: str, num_processes: int = 1
) -> ModelWork:
    """The work of a token, and the rate of square matrix products on this device times the number of processes."""
    import torch

    matrix = torch.ones(_MATRIX, _MATRIX, device=device, dtype=getattr(torch, dtype))
    rates = []
    for _ in range(_MATRIX_PRODUCTS):  # the first starts threads and loads kernels
        start = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        rates.append(2 * _MATRIX**3 / (time.perf_counter() - start))
    return ModelWork(
        flops_per_token=2.0 * teacher.num_parameters + 6.0 * student.num_parameters,
        flops_per_second=max(rates) * num_processes,
    )


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
def distill_progress(total_steps: int, *, quiet: bool = False, work: ModelWork | None = None) -> Iterator[OnStep]:
    """Yield an OnStep that draws; nothing is drawn where ``quiet``. A continued run starts where it stopped."""
    if quiet:
        yield ignore_step
        return
    console = Console(stderr=True)
    bar = steps_bar(console)
    task = bar.add_task("distilling", total=total_steps, figures="")
    held_out_kl: list[float] = []
    with Live(bar, console=console, refresh_per_second=4) as live:

        def on_step(record: StepRecord) -> None:
            bar.update(task, completed=record.step)
            if record.validation_kl is not None:
                held_out_kl.append(record.validation_kl)
            live.update(Group(step_table(record, held_out_kl[-1] if held_out_kl else None, work), bar))

        yield on_step


def step_table(record: StepRecord, held_out_kl: float | None, work: ModelWork | None) -> Table:
    """The figures of a step in one row."""
    figures = {
        "loss": f"{record.loss:.4f}",
        "KL": f"{record.kl:.4f}",
        "held-out KL": "-" if held_out_kl is None else f"{held_out_kl:.4f}",
        "rate": f"{record.learning_rate:.1e}",
        "tokens/s": f"{record.tokens_per_second:,.0f}",
        "MFU (est.)": "-" if work is None else f"{work.used_fraction(record.tokens_per_second):.0%}",
        "memory": format_gib(memory_in_use_bytes()),
    }
    table = Table(*figures, box=SIMPLE, expand=True)
    table.add_row(*figures.values())
    return table


def memory_in_use_bytes() -> int:
    """The largest memory so far: of the GPU where one is used, else of this process."""
    import resource
    import sys

    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
