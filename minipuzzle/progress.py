"""What long work reports to: who calls it decides what is shown (``minipuzzle.show.bars`` draws)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]  # called with the number of steps just done
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # of a description and the number of all steps


def no_progress(_steps: int) -> None:
    """The Advance of callers that show nothing."""


@contextmanager
def silent(_description: str, _total_steps: int) -> Iterator[Advance]:
    """The Progress of callers that show nothing."""
    yield no_progress
