"""Bars on standard error, so that standard output stays clean for results and --json; lines where no terminal is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from minipuzzle.progress import Advance

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


LINE_SECONDS = 30  # between two lines of a job whose output goes to a file


class ProgressLines:
    """A line now and then of what has been done, how fast, and how long the rest takes: for logs of batch jobs.

    ``done``: steps of an earlier run, which say nothing about the speed of this one. ``clock``: seconds; ``write``:
    takes a line.
    """

    def __init__(
        self,
        description: str,
        total_steps: int,
        *,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._description, self._total = description, total_steps
        self._clock, self._write = clock, write
        self._start = self._last = clock()
        self._done = self._done_before = done

    def advance(self, steps: int, figures: str = "") -> None:
        """So many steps more; ``figures``: what else a line says."""
        self._done += steps
        now = self._clock()
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        rate = (self._done - self._done_before) / (now - self._start)
        left = "" if not rate else f", {_duration((self._total - self._done) / rate)} left"
        said = f", {figures}" if figures else ""
        self._write(f"{self._description}: {self._done:,} of {self._total:,}{said}, {rate:.3g} a second{left}")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@contextmanager
def drawn_bar(description: str, total_steps: int) -> Iterator[Advance]:
    """The Progress that people see: a bar of all steps, with the time left; lines where there is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(description, total_steps).advance
        return
    with steps_bar(console) as bar:
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
