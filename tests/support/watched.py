"""Checkpoints that keep account of what is read from them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minipuzzle.files.checkpoint import Checkpoint


class Read(NamedTuple):
    """Some rows of a tensor, or all of it."""

    name: str
    num_elements: int
    is_in_main_thread: bool


class WatchedCheckpoint(Checkpoint):
    """A checkpoint with a list of all reads."""

    def __init__(self, *source: Any, **settings: Any) -> None:
        super().__init__(*source, **settings)
        self.reads: list[Read] = []

    def rows_and_amax(self, name: str, start: int, stop: int | None) -> tuple[torch.Tensor, float]:
        """As any checkpoint reads them, and noted."""
        rows, amax = super().rows_and_amax(name, start, stop)
        self.reads.append(Read(name, rows.numel(), threading.current_thread() is threading.main_thread()))
        return rows, amax


def watched(folder: Path) -> WatchedCheckpoint:
    """A folder opened to be watched."""
    checkpoint = WatchedCheckpoint.open(folder)
    assert isinstance(checkpoint, WatchedCheckpoint)
    return checkpoint
