"""How far a step is, or what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minipuzzle.data.runner import progress_of
from minipuzzle.errors import MinipuzzleError
from minipuzzle.workflows.data.selecting import Found


def status(folder: str | Path) -> Found:
    """What a step's folder holds, finished or not.

    Raises: MinipuzzleError for a folder of no step.
    """
    path = Path(folder)
    partial = path.with_name(path.name + ".partial")
    found: dict[str, Any] | None = progress_of(path) or progress_of(partial)
    if found is None:
        raise MinipuzzleError(f"{path} is not the folder of a step", "give the ‹out› of a `data` command")
    return Found(figures=found)
