"""A plan: which layers and units of a model stay. Everything that cutting needs besides the weights themselves."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.model import Architecture, PlacedTensor
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import read_json

SCHEMA_VERSION = 1
WHOLE_MODEL = "model"  # key of choices on the hidden axis


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A cut of one architecture.

    ``kept_layers``: indices in the source model, ascending. ``kept_units``: axis -> layer index in the source, or
    WHOLE_MODEL for ``hidden``, -> kept unit indices, ascending; what is not named stays whole. ``norm_scales``: name of
    an RMS norm's weight on disk in the source -> one factor for each of its groups. ``chosen_units``: axis -> layer
    index -> for each unit that chooses for itself (each expert) its kept units, as many as ``kept_units`` has there.
    ``notes``: figures for people.
    """

    source_fingerprint: str
    kept_layers: tuple[int, ...]
    kept_units: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    norm_scales: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    chosen_units: Mapping[str, Mapping[str, tuple[tuple[int, ...], ...]]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def units(self, axis: str, layer_idx: int | None) -> tuple[int, ...] | None:
        """Kept units of an axis in a layer (None: outside the layers); None where all stay."""
        key = WHOLE_MODEL if axis == "hidden" else str(layer_idx)
        return self.kept_units.get(axis, {}).get(key)

    def units_of(self, placed: PlacedTensor) -> dict[str, tuple[int, ...]]:
        """Kept units of all axes of a tensor of the source that are cut."""
        kept = {}
        for axis in {axis for dimension in placed.spec.dims for segment in dimension for axis in segment}:
            chosen = self.chosen_units.get(axis, {}).get(str(placed.layer_idx))
            if chosen is not None and placed.spec.unit is not None:
                kept[axis] = chosen[placed.spec.unit[1]]
            elif (units := self.units(axis, placed.layer_idx)) is not None:
                kept[axis] = units
        return kept

    def keeps(self, placed: PlacedTensor) -> bool:
        """Whether a tensor of a kept layer stays: one that belongs to an expert goes with it."""
        if placed.spec.unit is None:
            return True
        axis, unit = placed.spec.unit
        units = self.units(axis, placed.layer_idx)
        return units is None or unit in units

    def check_against(self, source: Architecture) -> None:
        """Refuse a plan for another architecture, or one with indices that do not exist there.

        Raises: MinipuzzleError naming what is wrong.
        """
        hint = "make a plan for this model with `minipuzzle search`"
        if self.source_fingerprint != source.fingerprint():
            raise MinipuzzleError("the plan was made for another architecture", hint)
        _check_indices("layers", self.kept_layers, len(source.layers), hint)
        for axis, by_layer in self.kept_units.items():
            for key, units in by_layer.items():
                what = f"{axis} of {key}"
                size = source.hidden if key == WHOLE_MODEL else source.layers[int(key)].sizes.get(axis)
                if size is None:
                    raise MinipuzzleError(f"layer {key} has no axis {axis}", hint)
                _check_indices(what, units, size, hint)
                if key != WHOLE_MODEL:
                    self._check_groups(source, axis, int(key), hint)
        for axis, by_chooser in self.chosen_units.items():
            for key, choices in by_chooser.items():
                layer, common = source.layers[int(key)], self.units(axis, int(key)) or ()
                chooser = LAYER_KINDS[layer.kind].chosen_by_unit.get(axis)
                if chooser is None or len(choices) != layer.sizes[chooser]:
                    raise MinipuzzleError(f"layer {key} has no {len(choices)} choices of {axis}", hint)
                for units in choices:
                    _check_indices(f"{axis} of {key}", units, layer.sizes[axis], hint)
                    if len(units) != len(common):
                        raise MinipuzzleError(f"layer {key} keeps unequal numbers of {axis} a {chooser}", hint)

    def _check_groups(self, source: Architecture, axis: str, layer_idx: int, hint: str) -> None:
        layer = source.layers[layer_idx]
        group_axis = LAYER_KINDS[layer.kind].unit_groups.get(axis)
        if group_axis is None:
            return
        units, num_groups = self.units(axis, layer_idx) or (), layer.sizes[group_axis]
        units_per_group = layer.sizes[axis] // num_groups
        kept = [sum(unit // units_per_group == group for unit in units) for group in range(num_groups)]
        if len(set(kept)) != 1:
            raise MinipuzzleError(f"layer {layer_idx} keeps unequal numbers of {axis} a {group_axis}: {kept}", hint)

    def apply(self, source: Architecture) -> Architecture:
        """The architecture that the plan leaves."""
        hidden_units = self.units("hidden", None)
        hidden = source.hidden if hidden_units is None else len(hidden_units)
        layers = []
        for layer_idx in self.kept_layers:
            layer = source.layers[layer_idx]
            new_sizes = {
                axis: len(units)
                for axis in LAYER_KINDS[layer.kind].prunable_axes
                if (units := self.units(axis, layer_idx)) is not None
            }
            layers.append(layer.resized(hidden=hidden, **new_sizes))
        return replace(source, layers=tuple(layers), hidden=hidden)

    def treatment(self, source: Architecture) -> dict[int, object]:
        """What becomes of each layer that stays, for ``num_layers_different``: its axes' kept units."""
        return {
            layer_idx: {axis: self.units(axis, layer_idx) for axis in source.layers[layer_idx].sizes}
            for layer_idx in self.kept_layers
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        record = {
            "schema_version": SCHEMA_VERSION,
            "source_fingerprint": self.source_fingerprint,
            "kept_layers": self.kept_layers,
            "kept_units": self.kept_units,
            "norm_scales": self.norm_scales,
            "chosen_units": self.chosen_units,
            "notes": self.notes,
        }
        return json.dumps(record, allow_nan=False) + "\n"


def num_layers_different(one: Mapping[int, object], other: Mapping[int, object]) -> int:
    """Layers that two cuts treat differently, each given as what becomes of the layers that stay."""
    return sum(one.get(layer_idx) != other.get(layer_idx) for layer_idx in one.keys() | other.keys())


def plan_without(source: Architecture, layers: Collection[int]) -> Plan:
    """The plan that leaves some layers out and the others whole."""
    return Plan(source_fingerprint=source.fingerprint(), kept_layers=source.layers_besides(layers))


def keep_everything(source: Architecture) -> Plan:
    """The plan that cuts nothing."""
    return plan_without(source, ())


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises: MinipuzzleError if it is not a plan of this schema.
    """
    record = read_json(path)
    if record.get("schema_version") != SCHEMA_VERSION:
        raise MinipuzzleError(f"{path} is not a plan of schema {SCHEMA_VERSION}", "make one with `minipuzzle search`")
    try:
        return Plan(
            source_fingerprint=record["source_fingerprint"],
            kept_layers=tuple(record["kept_layers"]),
            kept_units={
                axis: {key: tuple(units) for key, units in by_layer.items()}
                for axis, by_layer in record["kept_units"].items()
            },
            norm_scales={name: tuple(scales) for name, scales in record["norm_scales"].items()},
            chosen_units={
                axis: {key: tuple(map(tuple, choices)) for key, choices in by_layer.items()}
                for axis, by_layer in record.get("chosen_units", {}).items()
            },
            notes=record["notes"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise MinipuzzleError(f"{path} is not a complete plan: {error}", "make one with `minipuzzle search`") from None


def _check_indices(what: str, indices: tuple[int, ...], size: int, hint: str) -> None:
    if not indices:
        raise MinipuzzleError(f"the plan keeps no {what}", hint)
    if list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= size:
        raise MinipuzzleError(f"the plan's {what} are not ascending indices below {size}", hint)


PLAN_FILE = "plan.json"
