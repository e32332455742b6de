"""Saved training state: weights, optimiser, random generators and position, written whole or not at all.

``<folder>/state/step-00000120/`` holds safetensors and one JSON file. It is written under another name and renamed
when complete, and only then is the one before it removed; a run killed at any moment finds the last complete one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipuzzle.checkpoint import read_json, write_json

STATE_FOLDER = "state"
_UNFINISHED_SUFFIX = ".unfinished"
_PROGRESS_FILE = "progress.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after ``step`` steps. ``epoch`` and ``index`` name the next window of the data."""

    step: int = 0
    epoch: int = 0
    index: int = 0
    skipped_steps: int = 0
    train_seconds: float = 0.0
    validation_kl_before: float | None = None
    validation_kl_after: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The tensors that change during a run. The optimiser was given named parameters."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device


def save_training_state(folder: Path, state: TrainingState, progress: Progress) -> None:
    """Save to ``folder/state/`` and forget the state before it."""
    target = folder / STATE_FOLDER / f"step-{progress.step:08d}"
    if target.exists():
        return
    unfinished = target.with_name(target.name + _UNFINISHED_SUFFIX)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file({k: t.contiguous() for k, t in state.model.state_dict().items()}, unfinished / "model.safetensors")
    save_file(_optimizer_tensors(state.optimizer), unfinished / "optimizer.safetensors")
    save_file(_generator_states(state.device), unfinished / "generators.safetensors")
    write_json(unfinished / _PROGRESS_FILE, asdict(progress))
    for path in (*unfinished.iterdir(), unfinished):
        _flush_to_disk(path)  # or a power cut could keep the new name and lose what is in the files
    unfinished.rename(target)
    for other in target.parent.iterdir():
        if other != target:
            shutil.rmtree(other)


def load_training_state(folder: Path, state: TrainingState) -> Progress | None:
    """Restore the last complete state into model, optimiser and generators; None if there is none."""
    complete = [path for path in (folder / STATE_FOLDER).glob("step-*") if not path.name.endswith(_UNFINISHED_SUFFIX)]
    if not complete:
        return None
    source = max(complete)
    state.model.load_state_dict(load_file(source / "model.safetensors"), strict=True)
    _restore_optimizer(state.optimizer, load_file(source / "optimizer.safetensors"))
    _restore_generators(load_file(source / "generators.safetensors"), state.device)
    return Progress(**read_json(source / _PROGRESS_FILE))


def remove_training_state(folder: Path) -> None:
    """Remove all saved state, once the run's result is written."""
    shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)


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
        f"{key}/{names[parameter_id]}": tensor.contiguous()
        for parameter_id, tensors in optimizer_state["state"].items()
        for key, tensor in tensors.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    optimizer_state = optimizer.state_dict()
    ids = {name: parameter_id for parameter_id, name in _parameter_names(optimizer_state).items()}
    by_parameter: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, parameter_name = full_name.partition("/")
        by_parameter.setdefault(ids[parameter_name], {})[key] = tensor
    optimizer.load_state_dict({**optimizer_state, "state": by_parameter})


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
