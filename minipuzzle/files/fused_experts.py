"""Experts in files: one tensor for all of a block, read as one an expert without copies, and written as it was read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from minipuzzle.architecture.model import Architecture, StoredTensor
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.safetensors_files import Slab, TensorEntry

if TYPE_CHECKING:
    import torch


def split_entries(
    architecture: Architecture, entries: Mapping[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], bool]:
    """Entries with one for each expert's tensors in the place of fused ones, and whether there were any.

    Raises: MinipuzzleError for a fused tensor of another shape than config.json says.
    """
    found = dict(entries)
    for stored in architecture.stored_tensors(is_fused=True) if architecture.names.fused else ():
        entry = found.get(stored.name)
        if stored.form is None or entry is None:
            continue
        if entry.shape != stored.shape:
            raise MinipuzzleError(
                f"{entry.shard.parent}: {stored.name} has shape {list(entry.shape)}, not {list(stored.shape)}",
                "config.json and the weights do not belong together",
            )
        del found[stored.name]
        found |= _parts(stored, entry)
    return found, len(found) != len(entries)


def _parts(stored: StoredTensor, entry: TensorEntry) -> Iterator[tuple[str, TensorEntry]]:
    form, num_experts = stored.form, stored.shape[0]
    assert form is not None
    num_roles, expert_bytes = len(form.roles), entry.num_bytes // num_experts
    for position, placed in enumerate(stored.parts):
        expert_idx, role_idx = position // num_roles, form.roles.index(placed.spec.role)
        part = replace(
            entry,
            shape=placed.shape,
            num_bytes=expert_bytes // num_roles,
            offset=entry.offset + expert_idx * expert_bytes,
        )
        if form.is_transposed or form.is_interleaved:
            num_rows = placed.shape[0]
            step = num_roles if form.is_interleaved else 1
            start = role_idx if form.is_interleaved else role_idx * num_rows
            slab = Slab(shape=stored.shape[1:], start=start, step=step, is_transposed=form.is_transposed)
            yield placed.name, replace(part, slab=slab)
        else:
            yield placed.name, replace(part, offset=part.offset + role_idx * part.num_bytes)


def assembled(stored: StoredTensor, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A tensor as a file has it, from those of the model by their names."""
    import torch

    form, tensors = stored.form, [read(placed.name) for placed in stored.parts]
    if form is None:
        return tensors[0]
    num_roles = len(form.roles)
    experts = [tensors[first : first + num_roles] for first in range(0, len(tensors), num_roles)]
    join = torch.stack if form.is_interleaved else torch.cat
    dim = 1 if form.is_interleaved else 0
    fused = torch.stack([join(parts, dim).flatten(0, dim) for parts in experts])
    return fused.transpose(1, 2) if form.is_transposed else fused


def as_stored(
    architecture: Architecture, tensors: Iterable[tuple[str, torch.Tensor]], *, is_fused: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a model by name, those of experts fused as soon as all of a block are there."""
    forms = {
        placed.name: stored
        for stored in (architecture.stored_tensors(is_fused=True) if is_fused else ())
        if stored.form is not None
        for placed in stored.parts
    }
    pending: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        if name not in forms:
            yield name, tensor
            continue
        stored = forms[name]
        parts = pending.setdefault(stored.name, {})
        parts[name] = tensor
        if len(parts) == len(stored.parts):
            yield stored.name, assembled(stored, pending.pop(stored.name).__getitem__)
    assert not pending, f"experts are missing of {sorted(pending)}"
