"""Progress with time left, on standard error, so that standard output stays clean for results and --json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

Advance = Callable[[int], None]  # called with the number of steps just done
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # of a description and the number of all steps
# Sets the steps done so far and a few figures beside the bar.
Show = Callable[[int, str], None]


def no_progress(_steps: int) -> None:
    """The Advance of callers that show nothing."""


@contextmanager
def silent(_description: str, _total_steps: int) -> Iterator[Advance]:
    """The Progress of callers that show nothing."""
    yield no_progress


@contextmanager
def progress_bar(description: str, total_steps: int, *, quiet: bool = False) -> Iterator[Advance]:
    """Yield a function that advances a bar of ``total_steps``; nothing is drawn where ``quiet``."""
    with progress_figures(description, total_steps, quiet=quiet) as show:
        num_done = 0

        def advance(steps: int) -> None:
            nonlocal num_done
            num_done += steps
            show(num_done, "")

        yield advance


@contextmanager
def progress_figures(description: str, total_steps: int, *, quiet: bool = False) -> Iterator[Show]:
    """Yield a function that sets a bar of ``total_steps`` and what stands beside it."""
    if quiet:
        yield lambda _num_done, _figures: None
        return
    from rich.console import Console

    with steps_bar(Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total_steps, figures="")
        yield lambda num_done, figures: progress.update(task, completed=num_done, figures=figures)


def steps_bar(console: Console) -> RichProgress:
    """A bar that counts steps and says the time left; its task has ``figures``, which stand beside it."""
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
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )
