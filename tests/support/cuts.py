"""Plans that tests cut models by: every layer to a width, or one axis to half of its units."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from minipuzzle.architecture.kinds import LAYER_KINDS, kind_of_axis
from minipuzzle.architecture.layers import HIDDEN
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import KeptUnits, Plan, Units, keep_everything
from minipuzzle.cut.scores import Scores
from minipuzzle.cut.selection import keep_best_units, norm_scales, rank_layers
from minipuzzle.cut.surgery import kept_positions
from minipuzzle.files.checkpoint import Checkpoint


def best_layers(source: Architecture, layer_scores: np.ndarray[Any, Any], counts: Mapping[str, int]) -> tuple[int, ...]:
    """Layers in order, of each kind as many of the best as asked for."""
    ranked = rank_layers(source, layer_scores)
    kept = (together for kind, count in counts.items() for together in ranked[kind][:count])
    return tuple(sorted(itertools.chain.from_iterable(kept)))


def owners_of(source: Architecture, axis: str) -> list[int | None]:
    """The layers that an axis may be cut in, or None for the one that all share."""
    return [idx for idx in (None, *range(len(source.layers))) if axis in source.own_sizes(idx)]


WINDOWS, TOKENS = 12, 24  # that a cut is mended on


def ranking(size: int, num_kept: int, num_groups: int = 1, seed: int = 0) -> tuple[int, ...]:
    return keep_best_units(np.random.default_rng(seed).random(size), num_kept, num_groups)


def plan_with(checkpoint: Checkpoint, **widths: int) -> Plan:
    """Every layer that has an axis cut to its width, and arbitrary factors for the norms that this touches."""
    source = checkpoint.architecture
    kept_units: dict[str, dict[int | None, Units]] = {}
    scales = {}
    for axis, width in widths.items():
        groups = 2 if axis == "ssm_head" else 1
        kept_units[axis] = {
            idx: ranking(source.sizes(idx)[axis], width, groups, seed=idx or 0) for idx in owners_of(source, axis)
        }
    for placed in source.tensors():
        if placed.spec.rms_groups and placed.spec.axes & widths.keys():
            scales[placed.name] = tuple(1.5 - 0.1 * group for group in range(placed.spec.rms_groups))
    return replace(keep_everything(source), kept_units=kept_units, norm_scales=scales)


def half_of_the_units(source: Architecture, axis: str) -> tuple[int, ...]:
    """The first half of the units of each group."""
    size, kind = source.width(axis), kind_of_axis(axis)
    assert size is not None
    groups = source.width(kind.unit_groups[axis]) or 1 if axis in kind.unit_groups else 1
    per_group = size // groups
    return tuple(unit for unit in range(size) if unit % per_group < per_group // 2)


def plan_keeping(source: Architecture, axis: str, kept: tuple[int, ...]) -> Plan:
    """A plan for one axis, with energies that are one where units stay and zero where they go."""
    plan = replace(keep_everything(source), kept_units={axis: dict.fromkeys(owners_of(source, axis), kept)})
    energies = {"hidden.final": energy(((axis,),), {"hidden": source.hidden}, axis, kept)} if axis == "hidden" else {}
    for placed in source.tensors():
        if placed.spec.rms_groups and placed.layer_idx is not None:
            owner = "hidden" if placed.spec.dims == (HIDDEN,) else LAYER_KINDS[placed.part].inner_norm_energy
            energies[f"{owner}.{placed.layer_idx}"] = energy(placed.spec.dims[0], placed.sizes, axis, kept)
    return replace(plan, norm_scales=norm_scales(source, Scores(layer={}, energies=energies), plan))


def energy(dimension: Any, sizes: Any, axis: str, kept: tuple[int, ...]) -> np.ndarray[Any, Any]:
    values = np.zeros(sum(int(np.prod([sizes[name] for name in segment])) for segment in dimension))
    positions = kept_positions(dimension, sizes, {axis: kept})
    values[slice(None) if positions is None else positions] = 1
    return values


def some_tokens(num_windows: int = WINDOWS) -> torch.Tensor:
    return torch.randint(3, 259, (num_windows, TOKENS), generator=torch.Generator().manual_seed(0))


def half_cut(checkpoint: Checkpoint) -> Plan:
    """Half of the neurons or of the shared expert's, one of two key-value groups, and a layer in the middle dropped."""
    source = checkpoint.architecture
    sizes = {axis: size for layer in source.layers for axis, size in layer.sizes.items()}
    widths = {axis: sizes[axis] // 2 for axis in ("ffn", "shared_ffn", "kv_group") if axis in sizes}
    plan = plan_with(checkpoint, **widths)
    gone = source.blocks[len(source.blocks) // 2]
    kept = tuple(idx for idx in plan.kept_layers if idx not in gone)
    kept_units: KeptUnits = {
        axis: {layer_idx: units for layer_idx, units in by_layer.items() if layer_idx in kept}
        for axis, by_layer in plan.kept_units.items()
    }
    return replace(plan, kept_layers=kept, kept_units=kept_units)
