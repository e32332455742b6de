"""Bars on standard error, so that standard output stays clean for results and --json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from minipuzzle.progress import Advance

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@contextmanager
def drawn_bar(description: str, total_steps: int) -> Iterator[Advance]:
    """The Progress that people see: a bar of all steps, with the time left."""
    from rich.console import Console

    with steps_bar(Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total_steps)
        yield lambda steps: bar.advance(task, steps)


def steps_bar(console: Console) -> Progress:
    """A bar that counts steps and says the time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )
