"""Progress with time left, on standard error, so that standard output stays clean for results and --json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


def no_progress(_steps: int) -> None:
    """The Advance of callers that show nothing."""


@contextmanager
def progress_bar(description: str, total_steps: int, *, quiet: bool = False) -> Iterator[Advance]:
    """Yield a function that advances a bar of ``total_steps``; nothing is drawn where ``quiet``."""
    if quiet:
        yield no_progress
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
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total_steps)
        yield lambda steps: progress.advance(task, steps)
