"""Progress of a distillation run on standard error: steps, loss, speed and time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distill.settings import OnStep, StepRecord, ignore_step


@contextmanager
def distill_progress(total_steps: int, *, quiet: bool = False) -> Iterator[OnStep]:
    """Yield an OnStep that draws; nothing is drawn where ``quiet``. A continued run starts where it stopped."""
    if quiet:
        yield ignore_step
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Distilling", total=total_steps, figures="")

        def show(record: StepRecord) -> None:
            figures = f"KL {record.kl:.4f}  {record.tokens_per_second:,.0f} tokens/s"
            progress.update(task, completed=record.step, figures=figures)

        yield show
