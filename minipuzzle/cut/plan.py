"""A plan: which layers and units of a model stay. Everything that cutting needs besides the weights themselves."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from minipuzzle.architecture.kinds import VOCABULARY, kind_of_axis
from minipuzzle.architecture.model import Architecture, PlacedTensor
from minipuzzle.cut.figures import FIGURES, REQUIRED_FIGURES, Figures
from minipuzzle.errors import MinipuzzleError, warn
from minipuzzle.files.digests import checked_record, unchanged_record
from minipuzzle.files.json_files import read_json

PLAN_FILE = "plan.json"
SCHEMA_VERSION = 2  # version 1 had its figures among the notes
_LARGEST_SCALE = 1e4  # of a norm: the root of a ratio of mean squares, which no cut changes a hundred-million-fold
_WHOLE_MODEL = "model"  # instead of a layer's index, in files

# How units are chosen: by the scores alone, or by what a refit can make up, where held-out text agrees.
PUBLISHED, OBS = CRITERIA = ("published", "obs")

Units = tuple[int, ...]
# By axis, then by position of the layer in the source; None: the whole model, for the axis that all layers share.
KeptUnits = Mapping[str, Mapping[int | None, Units]]
ChosenUnits = Mapping[str, Mapping[int | None, tuple[Units, ...]]]


class Choices(NamedTuple):
    """The kept units of an axis for each unit of another that chooses for itself."""

    of_each: tuple[Units, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A cut of one architecture.

    ``kept_layers``: indices in the source model, ascending. ``kept_units``: indices of the units that stay, ascending;
    what is not named stays whole. ``norm_scales``: name of an RMS norm's weight on disk in the source -> one factor for
    each of its groups. ``chosen_units``: for each unit that chooses for itself (each expert) its kept units, as many as
    ``kept_units`` has there. ``figures``: what it was chosen by. ``model_fingerprint``: of the weights whose scores
    chose, where that is known. ``notes``: remarks for people, which nothing reads.
    """

    source_fingerprint: str
    kept_layers: tuple[int, ...]
    kept_units: KeptUnits = field(default_factory=dict)
    norm_scales: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    chosen_units: ChosenUnits = field(default_factory=dict)
    figures: Figures | None = None
    model_fingerprint: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def units(self, axis: str, layer_idx: int | None) -> Units | None:
        """Kept units of an axis in a layer (None: outside the layers); None where all stay."""
        by_layer = self.kept_units.get(axis, {})
        return by_layer.get(layer_idx, by_layer.get(None))

    def units_of(self, placed: PlacedTensor) -> dict[str, Units | Choices]:
        """Kept units of all axes of a tensor of the source that are cut; those of each unit that chooses for itself,
        where the tensor holds several."""
        kept: dict[str, Units | Choices] = {}
        for axis in placed.spec.axes:
            chosen = self.chosen_units.get(axis, {}).get(placed.layer_idx)
            if chosen is not None:
                kept[axis] = Choices(chosen) if placed.spec.unit is None else chosen[placed.spec.unit[1]]
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

    def check_against(self, source: Architecture, fingerprint: str | None = None) -> None:
        """Refuse a plan for another architecture, or one with indices that do not exist there.

        ``fingerprint``: of the weights; that scores of others chose is said, for it may be meant.

        Raises: MinipuzzleError naming what is wrong.
        """
        hint = "make a plan for this model with `minipuzzle search`"
        if self.source_fingerprint != source.fingerprint():
            raise MinipuzzleError("the plan was made for another architecture", hint)
        if None not in (fingerprint, self.model_fingerprint) and fingerprint != self.model_fingerprint:
            warn(
                f"the plan was chosen by scores of other weights of the same shape: their fingerprint is "
                f"{self.model_fingerprint}, this model's {fingerprint}"
            )
        _check_indices("layers", self.kept_layers, len(source.layers), hint)
        for axis, by_layer in self.kept_units.items():
            for layer_idx, units in by_layer.items():
                sizes = source.own_sizes(layer_idx)
                if axis not in sizes:
                    raise MinipuzzleError(f"{_name(layer_idx)} has no axis {axis} to cut", hint)
                _check_indices(f"{axis} of {_name(layer_idx)}", units, sizes[axis], hint)
                source.require_free(axis)
                self._check_groups(source, axis, layer_idx, hint)
        for axis, by_chooser in self.chosen_units.items():
            for layer_idx, choices in by_chooser.items():
                sizes, common = source.own_sizes(layer_idx), self.units(axis, layer_idx) or ()
                chooser = kind_of_axis(axis).chosen_by_unit.get(axis) if axis in sizes else None
                if chooser is None or len(choices) != sizes[chooser]:
                    raise MinipuzzleError(f"{_name(layer_idx)} has no {len(choices)} choices of {axis}", hint)
                for units in choices:
                    _check_indices(f"{axis} of {_name(layer_idx)}", units, sizes[axis], hint)
                    if len(units) != len(common):
                        problem = f"{_name(layer_idx)} keeps unequal numbers of {axis} a {chooser}"
                        raise MinipuzzleError(problem, hint)

        num_groups = {placed.name: placed.spec.rms_groups for placed in source.tensors() if placed.spec.rms_groups}
        for name, scales in self.norm_scales.items():
            are_factors = all(type(scale) in (int, float) and 0 < scale <= _LARGEST_SCALE for scale in scales)
            if len(scales) != num_groups.get(name) or not are_factors:
                raise MinipuzzleError(
                    f"the plan's scales of {name} are not one positive factor for each group of a norm", hint
                )

    def _check_groups(self, source: Architecture, axis: str, layer_idx: int | None, hint: str) -> None:
        group_axis = kind_of_axis(axis).unit_groups.get(axis)
        if group_axis is None or layer_idx is None:
            return
        sizes = source.layers[layer_idx].sizes
        units_per_group = sizes[axis] // sizes[group_axis]
        units = self.units(axis, layer_idx) or ()
        kept = [sum(unit // units_per_group == group for unit in units) for group in range(sizes[group_axis])]
        if len(set(kept)) != 1:
            raise MinipuzzleError(f"layer {layer_idx} keeps unequal numbers of {axis} a {group_axis}: {kept}", hint)

    def sizes(self, source: Architecture, layer_idx: int | None) -> dict[str, int]:
        """What is left of the axes that are cut in a layer, or outside the layers."""
        found = ((axis, self.units(axis, layer_idx)) for axis in source.sizes(layer_idx))
        return {axis: len(units) for axis, units in found if units is not None}

    def apply(self, source: Architecture) -> Architecture:
        """The architecture that the plan leaves."""
        layers = (source.layers[layer_idx].resized(**self.sizes(source, layer_idx)) for layer_idx in self.kept_layers)
        outer = {"hidden": source.hidden, VOCABULARY: source.vocabulary} | self.sizes(source, None)
        return replace(source.cut_to(tuple(layers), outer["hidden"]), vocabulary=outer[VOCABULARY])

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
            "kept_units": _with_names(self.kept_units),
            "norm_scales": self.norm_scales,
            "chosen_units": _with_names(self.chosen_units),
            **({} if self.figures is None else {"figures": self.figures.to_json()}),
            **({} if self.model_fingerprint is None else {"model_fingerprint": self.model_fingerprint}),
            "notes": self.notes,
        }
        return json.dumps(checked_record(record), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_json``, of files of both versions.

        Raises: KeyError, TypeError, ValueError, AttributeError for anything that is not such a record.
        """
        if unknown := record.keys() - {"schema_version", *(field.name for field in fields(cls))}:
            raise ValueError(f"it has no {', '.join(sorted(unknown))}")
        if record["schema_version"] == 1 and record["notes"].keys() >= REQUIRED_FIGURES:
            known = {name: value for name, value in record["notes"].items() if name in FIGURES}
            record = {**record, "figures": known, "notes": {}}
        return cls(
            source_fingerprint=_text(record["source_fingerprint"]) or "",
            kept_layers=_indices(record["kept_layers"]),
            kept_units={
                axis: {_position(key): _indices(units) for key, units in by_layer.items()}
                for axis, by_layer in record["kept_units"].items()
            },
            norm_scales={name: tuple(scales) for name, scales in record["norm_scales"].items()},
            chosen_units={
                axis: {_position(key): tuple(map(_indices, choices)) for key, choices in by_layer.items()}
                for axis, by_layer in record.get("chosen_units", {}).items()
            },
            figures=Figures.from_json(record["figures"]) if "figures" in record else None,
            model_fingerprint=_text(record.get("model_fingerprint")),
            notes=record["notes"],
        )


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

    Raises: MinipuzzleError if it is not a plan of this schema, or no longer what was written.
    """
    record = unchanged_record(read_json(path), str(path), may_be_by_hand=True)
    if record.get("schema_version") not in (1, SCHEMA_VERSION):
        raise MinipuzzleError(f"{path} is not a plan of schema {SCHEMA_VERSION}", "make one with `minipuzzle search`")
    try:
        return Plan.from_json(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MinipuzzleError(f"{path} is not a complete plan: {error}", "make one with `minipuzzle search`") from None


def _name(layer_idx: int | None) -> str:
    return "the model" if layer_idx is None else f"layer {layer_idx}"


def _with_names(by_axis: Mapping[str, Mapping[int | None, object]]) -> dict[str, dict[str, object]]:
    """As JSON has it, whose keys are strings."""
    return {
        axis: {_WHOLE_MODEL if key is None else str(key): units for key, units in by_layer.items()}
        for axis, by_layer in by_axis.items()
    }


def _position(key: str) -> int | None:
    return None if key == _WHOLE_MODEL else int(key)


def _text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]} is no text")
    return value


def _indices(value: object) -> Units:
    if not isinstance(value, list) or not all(type(index) is int for index in value):
        raise TypeError(f"{str(value)[:40]} is no list of indices")
    return tuple(value)


def _check_indices(what: str, indices: tuple[int, ...], size: int, hint: str) -> None:
    if not indices:
        raise MinipuzzleError(f"the plan keeps no {what}", hint)
    if list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= size:
        raise MinipuzzleError(f"the plan's {what} are not ascending indices below {size}", hint)
