"""Saved training states: weights, optimiser, random generators and position, written whole or not at all.

``<folder>/state/step-00000120/`` is a PyTorch distributed checkpoint (DCP): each process writes its own part, and any
number of processes can read it. It is copied while training waits and written while training goes on, under another
name; it gets its own name only when all parts are on disk, and only then are older states removed, their names first.
So whatever has a name is whole, and a run killed at any moment finds the last that was. ``<folder>`` must be one that
all processes see.

The last file of a state lists the SHA-256 of all others. A state is compared with it before anything of it is read; a
damaged one is left for the one before it.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save

from distill.states.stored import (
    MODEL_PREFIX,
    PROGRESS_FILE,
    STATE_FOLDER,
    DamagedStateError,
    Progress,
    damaged,
    open_state,
    read_into,
    saved_steps,
    step_folder,
)
from minipuzzle.devices import Device
from minipuzzle.files.digests import damage_of, write_digests
from minipuzzle.files.json_files import write_json
from minipuzzle.runtime.processes import Processes

_UNFINISHED_SUFFIX = ".unfinished"
_REMOVED_SUFFIX = ".removed"
# DCP says of every save and load of a single process that it assumes a single process; of saves in a thread of its own,
# beyond the reach of a filter that holds while a block runs.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
_OPTIMIZER, _GENERATOR = "optimizer/", "generator/"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The tensors that change during a run. The optimiser was given named parameters."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: Device


class StateStore:
    """The saved states of one run. All processes of the job must call its methods together."""

    def __init__(
        self, folder: Path, state: TrainingState, *, processes: Processes | None = None, keep_last: int = 1
    ) -> None:
        assert keep_last >= 1
        self.folder = folder / STATE_FOLDER
        self._state = state
        self._processes = processes or Processes()
        self._keep_last = keep_last
        self._saved_at_seconds = time.monotonic()
        self._writing: tuple[Path, Future[Any]] | None = None
        self._sealing = ThreadPoolExecutor(1)  # digests of a large state take minutes
        self._protected_steps: tuple[int, ...] = ()
        # Training and writing run at once: in one group their messages could be taken for each other.
        is_distributed = self._processes.world_size > 1
        self._group = dist.new_group(backend="gloo") if is_distributed else None

    def save(self, progress: Progress, *, protected_steps: tuple[int, ...] = ()) -> None:
        """Begin to save; wait for a state that is still being written. ``protected_steps`` are never removed."""
        self.finish()
        self._saved_at_seconds = time.monotonic()
        target = step_folder(self.folder, progress.step)
        if self._processes.broadcast(target.exists()):
            return
        unfinished = target.with_name(target.name + _UNFINISHED_SUFFIX)
        if self._processes.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            write_json(unfinished / PROGRESS_FILE, asdict(progress))
        self._protected_steps = protected_steps
        self._processes.wait()
        writer = FileSystemWriter(unfinished, sync_files=True, overwrite=True)
        future = dcp_async_save(
            self._tensors(),
            storage_writer=writer,
            process_group=self._group,
            no_dist=self._group is None,
        )
        assert isinstance(future, Future)
        # The first process's part ends after those of all others: it writes the table of contents.
        self._writing = (
            unfinished,
            self._sealing.submit(_seal, unfinished, future) if self._processes.is_first else future,
        )

    @property
    def seconds_since_save(self) -> float:
        """Since the last save began, or this store was made."""
        return time.monotonic() - self._saved_at_seconds

    def poll(self) -> None:
        """Give a state that has been written meanwhile its name."""
        if self._writing and self._writing[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait until the state that is being written, if any, has its name.

        Raises: OSError if it cannot be written, with its size and what is free; states before it stay.
        """
        if self._writing is None:
            return
        (unfinished, future), self._writing = self._writing, None
        try:
            future.result()
        except (CheckpointException, OSError, RuntimeError) as error:  # DCP wraps what the disk says
            size = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())
            raise OSError(
                f"the training state {unfinished} could not be written: it takes about {size:,} bytes of all processes "
                f"together, and {shutil.disk_usage(self.folder).free:,} are free"
            ) from error
        if not self._processes.is_first:
            return
        unfinished.rename(unfinished.with_name(unfinished.name.removesuffix(_UNFINISHED_SUFFIX)))
        _flush_to_disk(self.folder)
        steps = saved_steps(self.folder)
        kept = {*steps[-self._keep_last :], *self._protected_steps}
        for path in self.folder.iterdir():
            if path not in {step_folder(self.folder, step) for step in kept}:
                _remove(path)

    def load_last(self) -> tuple[Progress | None, tuple[str, ...]]:
        """Restore the last good state into model, optimiser and generators; None if there is none saved.

        Also says which states were found damaged; they are removed once a good one is found.

        Raises: DamagedStateError if all are damaged.
        """
        problems: dict[int, str] = {}
        for step in reversed(self._processes.broadcast(saved_steps(self.folder))):
            try:
                progress = self.load(step)
            except DamagedStateError as error:
                problems[step] = error.problem
                continue
            self._processes.wait()
            for other in problems if self._processes.is_first else ():
                _remove(step_folder(self.folder, other))
            return progress, tuple(f"{problem}; going on from step {step}" for problem in problems.values())
        if problems:
            raise DamagedStateError("; ".join(problems.values()), f"no good state is left: remove {self.folder.parent}")
        return None, ()

    def load(self, step: int) -> Progress:
        """Restore the state saved after ``step`` steps, by however many processes.

        Raises: DamagedStateError naming the file.
        """
        source = step_folder(self.folder, step)
        problem = next(filter(None, self._processes.gather(damage_of(source, self._processes.share))), None)
        progress, reader = open_state(source, step, problem)
        stored = reader.contents.state_dict_metadata
        tensors = self._tensors()
        for name in tensors.keys() - stored.keys():
            # The optimiser starts empty, and other processes may have written the state.
            if not name.startswith(_GENERATOR):
                raise damaged(source, f"{name} is missing")
            del tensors[name]
        parameters = dict(self._state.model.named_parameters())
        for name, entry in stored.items():
            if name.startswith(_OPTIMIZER) and name not in tensors:
                tensors[name] = _room_for(name, entry, parameters)
        read_into(tensors, reader, process_group=self._group, no_dist=self._group is None)
        # What the model keeps was filled in place; the rest is handed over.
        _restore_optimizer(self._state.optimizer, _with_prefix(tensors, _OPTIMIZER))
        self._state.device.restore_generators(_with_prefix(tensors, self._generator_prefix))
        return progress

    @property
    def _generator_prefix(self) -> str:
        return f"{_GENERATOR}{self._processes.rank}/"

    def _tensors(self) -> dict[str, Tensor]:
        groups: dict[str, Mapping[str, Tensor]] = {
            MODEL_PREFIX: self._state.model.state_dict(),
            _OPTIMIZER: _optimizer_tensors(self._state.optimizer),
            self._generator_prefix: self._state.device.generator_states(),
        }
        return {
            prefix + name: tensor.detach() for prefix, tensors in groups.items() for name, tensor in tensors.items()
        }


def _remove(path: Path) -> None:
    """Remove a state, which loses its name first: a kill in between must not leave part of it under that name."""
    unnamed = path.with_name(path.name + _REMOVED_SUFFIX)
    if not path.name.endswith((_UNFINISHED_SUFFIX, _REMOVED_SUFFIX)):
        path = path.rename(unnamed)
    shutil.rmtree(path)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parameter_names(optimizer_state: Mapping[str, Any]) -> dict[int, str]:
    return {
        parameter_id: name
        for group in optimizer_state["param_groups"]
        for parameter_id, name in zip(group["params"], group["param_names"], strict=True)
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor an optimiser keeps, as ``<its name>/<parameter>``."""
    optimizer_state = optimizer.state_dict()
    names = _parameter_names(optimizer_state)
    return {
        f"{key}/{names[parameter_id]}": tensor
        for parameter_id, tensors in optimizer_state["state"].items()
        for key, tensor in tensors.items()
    }


def _room_for(name: str, entry: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    """Memory for one of the optimiser's tensors, split as its parameter is where it has the same shape."""
    parameter = parameters[name.removeprefix(_OPTIMIZER).partition("/")[2]]
    if entry.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
    return torch.zeros(entry.size, dtype=entry.properties.dtype)


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    optimizer_state = optimizer.state_dict()
    ids = {name: parameter_id for parameter_id, name in _parameter_names(optimizer_state).items()}
    by_parameter: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, parameter_name = full_name.partition("/")
        by_parameter.setdefault(ids[parameter_name], {})[key] = tensor
    optimizer.load_state_dict({**optimizer_state, "state": by_parameter})


def _seal(folder: Path, written: Future[Any]) -> None:
    """List the digests of a state once all its files are there, and bring all of it to the disk."""
    written.result()
    write_digests(folder)
    for path in (*folder.iterdir(), folder):
        _flush_to_disk(path)  # or a power cut could keep the new name and lose what is in the files


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
