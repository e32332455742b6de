"""Layers of a LayerStack at smaller widths: transformers' own modules, built from the cut config and run in its place.

Weights are cut as ``surgery`` cuts them, so that a narrowed layer computes what the pruned checkpoint will compute.
Where an axis allows it (``ffn``, ``kv_group``: one block of units in every tensor), the layer's weights are put in
the order in which units are kept, and each width is a view of their beginning: any number of widths of one ranking
takes no second copy. Other cuts are copies of what they keep.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from minipuzzle.architecture.families import family_of
from minipuzzle.architecture.kinds import LAYER_KINDS, owner_of_axis
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan, Units
from minipuzzle.cut.surgery import cut_tensor
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import ModelParts, build_on_meta, parts_of


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """What a plan does to one layer that stays. Equal cuts of a layer are equal functions of its input.

    ``kept_units``: (axis, ascending indices of the units that stay) for each axis that is cut. ``norm_scales``: (name
    on disk, one factor for each group) for each RMS norm whose weight is corrected. ``chosen_units``: (axis, what each
    expert keeps) as in the plan.
    """

    layer_idx: int
    kept_units: tuple[tuple[str, Units], ...] = ()
    norm_scales: tuple[tuple[str, tuple[float, ...]], ...] = ()
    chosen_units: tuple[tuple[str, tuple[Units, ...]], ...] = ()

    def resized(self, layer: LayerSpec) -> LayerSpec:
        """The layer that is left."""
        return layer.resized(**{axis: len(units) for axis, units in self.kept_units})

    def as_plan(self, source: Architecture) -> Plan:
        """The part of a plan that cuts this layer."""
        plan = _plan_of(source, self.layer_idx, dict(self.kept_units), dict(self.norm_scales))
        return replace(plan, chosen_units={axis: {self.layer_idx: units} for axis, units in self.chosen_units})


def layer_cut(source: Architecture, plan: Plan, layer_idx: int) -> LayerCut:
    """What a plan does to one of the layers that it keeps."""
    names = {tensor.name for tensor in source.layer_tensors(layer_idx)}
    axes = source.layers[layer_idx].sizes
    return LayerCut(
        layer_idx=layer_idx,
        kept_units=tuple((axis, units) for axis in axes if (units := plan.units(axis, layer_idx)) is not None),
        norm_scales=tuple((name, tuple(scales)) for name, scales in plan.norm_scales.items() if name in names),
        chosen_units=tuple(
            (axis, by_layer[layer_idx]) for axis, by_layer in plan.chosen_units.items() if layer_idx in by_layer
        ),
    )


class NarrowedLayers:
    """Builds modules of a stack's layers at smaller widths."""

    def __init__(self, stack: LayerStack) -> None:
        """Nothing is built or read until a layer is asked for."""
        self.stack = stack
        self._blanks: dict[object, ModelParts] = {}

    @contextmanager
    def modules(self, cuts: Sequence[LayerCut]) -> Iterator[list[nn.Module]]:
        """One module for each cut of one layer, for ``stack.apply(layer_idx, ..., module=module)``.

        They hold views of the layer's weights or copies of parts of them, and are of no use once the block is left or
        another layer is loaded. Inside the block the units of the layer itself may stand in another order; that
        changes nothing it computes, apart from rounding.
        """
        assert cuts and len({cut.layer_idx for cut in cuts}) == 1, "cuts of one layer are built together"
        layer_idx = cuts[0].layer_idx
        source = self.stack.architecture
        layer = self.stack.loaded_layer(layer_idx)
        orders = unit_orders(source.layers[layer_idx], cuts)
        self._reorder(layer_idx, layer, orders)
        try:
            bases: dict[LayerCut, Mapping[str, torch.Tensor]] = {}
            modules = []
            for cut in cuts:
                copied = _without_prefixes(cut, orders)
                if copied not in bases:
                    bases[copied] = self._cut_weights(layer, copied)
                modules.append(self._module(cut, bases[copied]))
            yield modules
        finally:
            if not any(parameter.is_meta for parameter in layer.parameters()):
                self._reorder(layer_idx, layer, {axis: _inverse(order) for axis, order in orders.items()})

    def final_norm(self, plan: Plan) -> nn.Module:
        """The final norm at the width that a plan leaves."""
        source, units = self.stack.architecture, plan.units("hidden", None)
        norm = self.stack.loaded_final_norm()
        if units is None:
            return norm
        narrowed = copy.deepcopy(self._blank_parts(replace(source, hidden=len(units))).final_norm)
        placed = {self.stack.parameter_name(t): t for t in source.outer_tensors() if t.part == "final_norm"}
        cut = {name: cut_tensor(norm.get_parameter(name).detach(), tensor, plan) for name, tensor in placed.items()}
        narrowed.load_state_dict(cut, strict=True, assign=True)
        return narrowed

    def _reorder(self, layer_idx: int, layer: nn.Module, orders: Mapping[str, Units]) -> None:
        """Put the units of a layer in another order, one tensor at a time."""
        plan = _plan_of(self.stack.architecture, layer_idx, orders)
        for placed in self.stack.architecture.layer_tensors(layer_idx):
            if orders.keys() & placed.spec.axes:
                weight = _weight(layer, self.stack.parameter_name(placed))
                weight.data = cut_tensor(weight.data, placed, plan)

    def _cut_weights(self, layer: nn.Module, cut: LayerCut) -> dict[str, torch.Tensor]:
        """The layer's weights by their names on disk, cut; those that the cut does not touch are not copied, and those
        of experts that go are left out."""
        plan = cut.as_plan(self.stack.architecture)
        weights = {}
        for placed in filter(plan.keeps, self.stack.architecture.layer_tensors(cut.layer_idx)):
            weight = _weight(layer, self.stack.parameter_name(placed)).detach()
            is_cut = placed.name in plan.norm_scales or plan.kept_units.keys() & placed.spec.axes
            weights[placed.name] = cut_tensor(weight, placed, plan) if is_cut else weight
        return weights

    def _module(self, cut: LayerCut, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """A module with the beginnings of some weights, along every dimension, as views."""
        layers = list(self.stack.architecture.layers)
        layers[cut.layer_idx] = cut.resized(layers[cut.layer_idx])
        narrowed = replace(self.stack.architecture, layers=tuple(layers))
        state = {}
        for weight, placed in zip(weights.values(), narrowed.layer_tensors(cut.layer_idx), strict=True):
            for dim_idx, length in enumerate(placed.shape):
                weight = weight.narrow(dim_idx, 0, length)
            state[self.stack.parameter_name(placed)] = weight
        module = copy.deepcopy(self._blank_layer(cut))
        module.load_state_dict(state, strict=True, assign=True)
        return module

    def _blank_layer(self, cut: LayerCut) -> nn.Module:
        """transformers' module for a cut layer, without weights.

        It comes from a model with one block for each kind: families may need all of them to describe a model, and
        complete blocks.
        """
        source = self.stack.architecture
        layer = cut.resized(source.layers[cut.layer_idx])
        blocks = {source.block_of(source.layer_indices(kind)[0]) for kind in source.layer_counts}
        layers = [
            layer if source.layers[idx].kind == layer.kind else source.layers[idx].resized(hidden=layer.sizes["hidden"])
            for block_idx in sorted(blocks)
            for idx in source.blocks[block_idx]
        ]
        position = [other.kind for other in layers].index(layer.kind)
        parts = self._blank_parts(replace(source, layers=tuple(layers), hidden=layer.sizes["hidden"]))
        return parts.layers[position]

    def _blank_parts(self, architecture: Architecture) -> ModelParts:
        key = architecture.fingerprint()
        if key not in self._blanks:
            checkpoint = self.stack.checkpoint
            config = checkpoint.family.write(checkpoint.config, architecture)
            model = build_on_meta(config, self.stack.dtype)
            self._blanks[key] = parts_of(model.eval(), family_of(config))
        return self._blanks[key]


def prefix_axes(layer: LayerSpec) -> tuple[str, ...]:
    """Axes of a layer whose units are consecutive blocks in every tensor and free to change places.

    Then the first units of a reordered layer are the beginning of each of its tensors. Not so for Mamba heads, whose
    projections stand one after another in ``in_proj``, nor for ``hidden``, whose order all layers share.
    """
    kind = LAYER_KINDS[layer.kind]
    specs = kind.tensors(layer)
    return tuple(
        axis
        for axis in kind.prunable_axes
        if axis in layer.sizes
        and axis not in (*kind.unit_groups, *kind.chosen_by_unit)
        and all(
            spec.rms_groups == 0 and len(dimension) == 1 and dimension[0][0] == axis
            for spec in specs
            for dimension in spec.dims
            if any(axis in segment for segment in dimension)
        )
    )


def unit_orders(layer: LayerSpec, cuts: Sequence[LayerCut]) -> dict[str, Units]:
    """For each prefix axis that some cuts narrow: all its units, in an order that begins with those cuts' units.

    The widest cut counts first; one that is not a part of the next wider one keeps its own copy. Of six units, cuts
    that keep (0, 2, 3, 5) and (2, 5) give the order 2, 5, 0, 3, 1, 4: both are beginnings of it. A third that keeps
    (1, 2) is not, and is copied.
    """
    orders = {}
    for axis in prefix_axes(layer):
        kept = {units for cut in cuts if (units := dict(cut.kept_units).get(axis)) is not None}
        remaining = tuple(range(layer.sizes[axis]))
        backwards: list[int] = []
        for units in sorted(kept, key=len, reverse=True):
            inner = set(units)
            if inner <= set(remaining):
                backwards += [unit for unit in reversed(remaining) if unit not in inner]
                remaining = units
        if kept:
            orders[axis] = (*remaining, *reversed(backwards))
    return orders


def _without_prefixes(cut: LayerCut, orders: Mapping[str, Units]) -> LayerCut:
    """What has to be cut from reordered weights before the rest of the cut is their beginning: nothing of an axis whose
    kept units begin its order; else the kept units by their places in it, so (1, 2) in 2, 5, 0, 3, 1, 4 is (4, 0)."""
    copied = []
    for axis, units in cut.kept_units:
        order = orders.get(axis)
        if order is None:
            copied.append((axis, units))
        elif set(order[: len(units)]) != set(units):
            position_of = {unit: position for position, unit in enumerate(order)}
            copied.append((axis, tuple(position_of[unit] for unit in units)))
    return replace(cut, kept_units=tuple(copied))


def _plan_of(
    source: Architecture,
    layer_idx: int,
    kept_units: Mapping[str, Units],
    norm_scales: Mapping[str, tuple[float, ...]] | None = None,
) -> Plan:
    return Plan(
        source_fingerprint=source.fingerprint(),
        kept_layers=(layer_idx,),
        kept_units={axis: {owner_of_axis(axis, layer_idx): units} for axis, units in kept_units.items()},
        norm_scales=norm_scales or {},
    )


def _weight(layer: nn.Module, name: str) -> torch.Tensor:
    """A parameter, or a buffer that checkpoints store, such as the correction bias of a router."""
    path, _, last = name.rpartition(".")
    weight = getattr(layer.get_submodule(path), last)
    assert isinstance(weight, torch.Tensor)
    return weight


def _inverse(order: Units) -> Units:
    positions = sorted(range(len(order)), key=order.__getitem__)
    return tuple(positions)
