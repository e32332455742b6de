"""What lies in the folder of a saved state: read without believing or running any of it.

A state's tensors are a PyTorch distributed checkpoint (DCP), whose table of contents is a pickle: only the plain
records are admitted that DCP writes. All files are compared with their digests first.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from distill.settings import LARGEST_KL
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.digests import damage_of
from minipuzzle.files.json_files import read_json, record_of

STATE_FOLDER = "state"
PROGRESS_FILE = "progress.json"
MODEL_PREFIX = "model/"
_CONTENTS_FILE = ".metadata"
_ROUNDING = 1e-3  # a divergence of equal models may come out a little below zero


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after ``step`` steps.

    ``best_step``: the one after which the validation KL was lowest so far; 0 before any evaluation.
    ``recent_losses``: those of the last steps that were taken, by which a sudden rise is known.
    """

    step: int = 0
    skipped_steps: int = 0
    train_seconds: float = 0.0
    validation_kl_before: float | None = None
    validation_kl_after: float | None = None
    validation_loss_before: float | None = None
    validation_loss_after: float | None = None
    best_step: int = 0
    best_validation_kl: float = LARGEST_KL
    recent_losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= max(self.best_step, self.skipped_steps) <= self.step or min(self.best_step, self.skipped_steps) < 0:
            raise ValueError(f"{self.skipped_steps} steps skipped and the best after {self.best_step}, of {self.step}")
        divergences = (self.validation_kl_before, self.validation_kl_after, self.best_validation_kl)
        if min(self.train_seconds, *(kl for kl in divergences if kl is not None)) < -_ROUNDING:
            raise ValueError("a time or a divergence is negative")


class DamagedStateError(MinipuzzleError):
    """A saved state is not as it was written."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the state after so many steps is kept, in a run's folder of states."""
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps whose states are whole, ascending."""
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def weight_reader(folder: Path, step: int) -> Callable[[str, tuple[int, ...]], Tensor]:
    """A function that reads one float32 weight, by its name in memory and its shape, from a saved state.

    Raises: MinipuzzleError naming the states there are, if there is none of this step.
    """
    steps = saved_steps(folder)
    if step not in steps:
        found = ", ".join(str(step) for step in steps) or "none"
        raise MinipuzzleError(f"{folder} has no state of step {step}", f"states are kept of these steps: {found}")
    source = step_folder(folder, step)
    _, reader = open_state(source, step, damage_of(source))

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        tensors = {MODEL_PREFIX + name: torch.empty(shape, dtype=torch.float32)}
        read_into(tensors, reader, no_dist=True)
        return tensors[MODEL_PREFIX + name]

    return read


class CheckedReader(FileSystemReader):
    """Reads a state by a table of contents that was read before, and by no other."""

    def __init__(self, folder: Path, contents: Metadata) -> None:
        super().__init__(folder)
        self.contents = contents

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.contents


class _ContentsUnpickler(pickle.Unpickler):
    """Admits what DCP's tables of contents are made of, none of which runs anything."""

    def find_class(self, module_name: str, name: str) -> Any:
        if name in _ADMITTED.get(module_name, ()):
            return super().find_class(module_name, name)
        if module_name == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it asks for {module_name}.{name}")


_ADMITTED = {
    "torch.distributed.checkpoint.metadata": (
        *("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath",),
}


def open_state(source: Path, step: int, problem: str | None) -> tuple[Progress, CheckedReader]:
    """What a state says of itself, and a reader of its tensors; ``problem``: what its digests say is wrong.

    Raises: DamagedStateError.
    """
    try:
        if problem:
            raise ValueError(problem)
        progress = record_of(Progress, read_json(source / PROGRESS_FILE), PROGRESS_FILE)
        if progress.step != step:
            raise ValueError(f"{PROGRESS_FILE} is of step {progress.step}")
        with (source / _CONTENTS_FILE).open("rb") as file:
            contents = _ContentsUnpickler(file).load()
        entries = contents.state_dict_metadata.values()
        are_tensors = isinstance(contents, Metadata) and all(isinstance(e, TensorStorageMetadata) for e in entries)
        if not are_tensors or any(
            Path(i.relative_path).name != i.relative_path for i in contents.storage_data.values()
        ):
            raise ValueError(f"{_CONTENTS_FILE} lists other things than tensors in files beside it")
    except Exception as error:  # a pickle may raise anything
        raise damaged(source, str(error)) from None
    contents.storage_meta = StorageMeta()
    return progress, CheckedReader(source, contents)


def read_into(tensors: dict[str, Tensor], reader: CheckedReader, **options: Any) -> None:
    try:
        dcp_load(tensors, storage_reader=reader, **options)
    except CheckpointException as error:
        raise damaged(Path(reader.path), str(error).splitlines()[-1]) from None


def damaged(source: Path, problem: str) -> DamagedStateError:
    return DamagedStateError(f"the state {source} is damaged: {problem}", "give a state that is whole")
