"""Cutting: a plan applied tensor by tensor through the registry's named axes. Nothing here knows a layer kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minipuzzle.architecture.layers import Dimension
from minipuzzle.architecture.model import PlacedTensor
from minipuzzle.cut.plan import Choices, Plan, Units
from minipuzzle.files.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

Positions = NDArray[np.int64]


def kept_positions(
    dimension: Dimension, sizes: Mapping[str, int], kept_units: Mapping[str, Units | Choices]
) -> Positions | None:
    """Positions along one dimension that survive when only some units of some axes stay; None if all do.

    Where each unit of a segment's first axis chooses for itself, an axis has the choices of all of them.

    Shapes: ``[kept elements]``, ascending. A segment is a row-major product of its axes.
    """
    if not any(axis in kept_units for segment in dimension for axis in segment):
        return None
    kept, offset = [], 0
    for segment in dimension:
        shape = tuple(sizes[axis] for axis in segment)
        positions = offset + np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        units = [kept_units.get(axis, tuple(range(sizes[axis]))) for axis in segment]
        kept += [positions[np.ix_(*choice)].ravel() for choice in _choices(units)]
        offset += positions.size
    return np.concatenate(kept)


def _choices(units: Sequence[Units | Choices]) -> list[list[Units]]:
    """What stays of each axis of a segment: once for all, or for each unit of the first, where it chooses."""
    first, *others = units
    assert not isinstance(first, Choices), "what chooses stands before what is chosen"
    if not any(isinstance(of_axis, Choices) for of_axis in others):
        return [[first, *(of_axis for of_axis in others if not isinstance(of_axis, Choices))]]
    return [
        [(unit,), *(of_axis.of_each[unit] if isinstance(of_axis, Choices) else of_axis for of_axis in others)]
        for unit in first
    ]


def cut_tensor(tensor: torch.Tensor, placed: PlacedTensor, plan: Plan) -> torch.Tensor:
    """The part of one source tensor that a plan keeps, in the same precision.

    The weight of an RMS norm is scaled where the plan says so: cutting channels changes the mean square that the norm
    divides by, and the scale undoes it. The product is rounded once.
    """
    import torch

    kept_units = plan.units_of(placed)
    for dim_idx, dimension in enumerate(placed.spec.dims):
        positions = kept_positions(dimension, placed.sizes, kept_units)
        if positions is not None:
            tensor = tensor.index_select(dim_idx, torch.from_numpy(positions).to(tensor.device))
    scales = plan.norm_scales.get(placed.name)
    if scales is None:
        return tensor
    assert len(scales) == placed.spec.rms_groups, f"{placed.name} needs {placed.spec.rms_groups} scales"
    precise = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    by_group = (precise + placed.spec.norm_offset).view(len(scales), -1) * precise.new_tensor(scales)[:, None]
    return (by_group.view(-1) - placed.spec.norm_offset).to(tensor.dtype)


def cut_tensors(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the cut model by their new names, one at a time.

    A head that is tied to the embeddings is written out where engines would not look for it there.

    Raises: MinipuzzleError for a plan that does not fit the checkpoint, or values that are not finite.
    """
    source = checkpoint.architecture
    plan.check_against(source)
    target = plan.apply(source)
    for new_idx, old_idx in enumerate(plan.kept_layers):
        kept = (tensor for tensor in source.layer_tensors(old_idx) if plan.keeps(tensor))
        for old, new in zip(kept, target.layer_tensors(new_idx), strict=True):
            yield new.name, _cut_to_shape(checkpoint, old, new, plan)
    for placed in target.carried:
        yield placed.name, checkpoint.tensor(placed.name)
    for old, new in zip(source.outer_tensors(), target.outer_tensors(), strict=True):
        yield new.name, _cut_to_shape(checkpoint, old, new, plan)
        if source.tied_embeddings and not source.names.ties_head and new.part == "embeddings":
            yield source.names.head, _cut_to_shape(checkpoint, old, new, plan).clone()


def _cut_to_shape(checkpoint: Checkpoint, old: PlacedTensor, new: PlacedTensor, plan: Plan) -> torch.Tensor:
    tensor = cut_tensor(checkpoint.tensor(old.name), old, plan)
    assert tuple(tensor.shape) == new.shape, f"{old.name}: cut to {tuple(tensor.shape)}, planned {new.shape}"
    return tensor
