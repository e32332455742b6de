"""The score file: what was measured about each layer and unit, on which tokens, of which model.

``scores.safetensors`` holds ``layer.<metric>`` [num_layers] float64 (NaN for layers that were not asked for),
``variant.<metric>.<axis>.<width>`` [num_layers] float64 (the score of each layer at a smaller width of one of its
axes, 0 where a layer has no such axis or is no wider), ``block.<metric>`` [num_layers] float64 (the score of leaving
out a whole decoder block, at the place of its first layer, for families with several layers in a block),
``unit.<axis>.<layer_idx>`` [num_units] float32 (``unit.hidden`` for the axis of the whole model),
``energy.ssm.<layer_idx>`` and ``energy.hidden.<layer_idx|final>`` (mean squares of what each RMS norm averages, needed
to correct the norms of a cut model), and ``token_ids`` [samples, length] int32. Layer scores measured elsewhere may
come as JSON: ``{"layer": {"mse": [...]}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minipuzzle.architecture.kinds import TRUNK, kind_of_axis
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.expert_criteria import EXPERT, EXPERT_CRITERIA, criterion_axis
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.digests import CHECKSUM, digest_of_arrays
from minipuzzle.files.json_files import parse_json, record_of, require_regular_file

SCHEMA_VERSION = "1"
_JSON_FORM = '{"layer": {"mse": [...]}} is expected, a number for each layer'
_CONTRIBUTION = "_contribution"  # ends the name of another score of the same units
_EXPERT_SCORES = frozenset(map(criterion_axis, EXPERT_CRITERIA))
_ROUNDING = 1e-4  # a divergence of equal models may come out a little below zero
_TOKEN_IDS, _PREFIXES = "token_ids", ("layer.", "variant.", "block.", "unit.", "energy.")
FINAL = "final"  # stands for the layer index of the final norm


Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class ScoreFacts:
    """How scores were measured. In the file each is a string: numbers, ``removed_layers`` and ``counters`` are JSON."""

    removed_layers: tuple[int, ...]
    samples: int
    channel_samples: int
    sequence_length: int
    processes: int
    counters: Mapping[str, int]
    model_fingerprint: str
    token_ids_sha256: str
    scan: str

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ScoreFacts | None:
        """The facts in a file's metadata; None where they are not all there.

        Raises: ValueError naming the one that cannot be; MinipuzzleError for what should be JSON.
        """
        names = {field.name: field.type == "str" for field in fields(cls)}
        if not metadata.keys() >= names.keys():
            return None
        values = {n: metadata[n] if is_text else parse_json(metadata[n], n) for n, is_text in names.items()}
        return record_of(cls, values)


def unit_key(axis: str, layer_idx: int | None) -> str:
    """The name of the scores of an axis of a layer, or of the whole model (None), without ``unit.``."""
    return axis if layer_idx is None else f"{axis}.{layer_idx}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Scores:
    """Scores of one model. Keys of all but ``layer`` are tensor names without the first part."""

    layer: Mapping[str, Array]
    units: Mapping[str, Array] = field(default_factory=dict)
    variants: Mapping[str, Array] = field(default_factory=dict)
    blocks: Mapping[str, Array] = field(default_factory=dict)
    energies: Mapping[str, Array] = field(default_factory=dict)
    token_ids: NDArray[np.int32] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def unit_scores(self, axis: str, layer_idx: int | None) -> Array:
        """Scores of the units of one axis in one layer, or in the whole model (None).

        Raises: MinipuzzleError if that axis was not measured.
        """
        key = unit_key(axis, layer_idx)
        if key not in self.units:
            raise MinipuzzleError(
                f"the scores hold nothing about {axis} of {'the model' if layer_idx is None else f'layer {layer_idx}'}",
                "measure with `minipuzzle score`, or leave that axis uncut",
            )
        return self.units[key]

    def ranking_experts_by(self, criterion: str) -> Scores:
        """These scores with experts ranked by a criterion in the place of the default.

        Raises: MinipuzzleError if that was not measured.
        """
        axis = criterion_axis(criterion)
        named = ((key.partition("."), values) for key, values in self.units.items())
        chosen = {f"{EXPERT}.{place}": values for (name, _, place), values in named if name == axis}
        if axis != EXPERT and not chosen and any(key.startswith(f"{EXPERT}.") for key in self.units):
            raise MinipuzzleError(
                f"the scores hold nothing of experts by {criterion}", "measure with `minipuzzle score`"
            )
        return replace(self, units={**self.units, **chosen})

    def energy(self, norm: str) -> Array:
        """Mean squares under one RMS norm: ``ssm.<layer_idx>``, ``hidden.<layer_idx>`` or ``hidden.final``."""
        if norm not in self.energies:
            raise MinipuzzleError(
                f"the scores hold no energies for {norm}, which the norm of a cut layer needs",
                "measure with `minipuzzle score`",
            )
        return self.energies[norm]

    def check_against(self, architecture: Architecture, fingerprint: str | None = None) -> None:
        """Refuse scores of another model or with values that are not finite numbers.

        Raises: MinipuzzleError naming what differs.
        """
        for table, values in self._tables():
            for name, array in values.items():
                _check_array(table, name, array, _wanted_shape(table, name, architecture))
        missing = sorted({int(idx) for values in self.layer.values() for idx in np.flatnonzero(np.isnan(values))})
        if missing and self.metadata.get("layers", "all") != "all":
            raise MinipuzzleError(
                f"the scores lack layers {', '.join(map(str, missing))}: they were measured with ‹layers›",
                "measure all layers to search or cut",
            )
        for table, values in self._tables():
            for name, array in values.items():
                if not np.isfinite(array).all():
                    raise MinipuzzleError(f"scores {table}.{name} hold NaN or infinite values", "measure again")
                metric = LAYER_METRICS.get(name.partition(".")[0])
                if array.min(initial=0) < -_ROUNDING and not (metric and metric.may_be_negative):
                    raise MinipuzzleError(f"scores {table}.{name} are negative", "measure again")
        if (
            self.token_ids is not None
            and not 0 <= self.token_ids.min(initial=0) <= self.token_ids.max(initial=0) < architecture.vocabulary
        ):
            raise MinipuzzleError("the scores' token_ids lie outside the model's vocabulary", "measure this model")
        measured = self.metadata.get("model_fingerprint")
        if fingerprint is not None and measured is not None and measured != fingerprint:
            raise MinipuzzleError(
                f"the scores belong to a model with fingerprint {measured}, not {fingerprint}",
                "measure this model with `minipuzzle score`",
            )

    def _tables(self) -> tuple[tuple[str, Mapping[str, Array]], ...]:
        """The tables by the first part of their tensors' names."""
        named = {"layer": self.layer, "variant": self.variants, "block": self.blocks}
        return (*named.items(), ("unit", self.units), ("energy", self.energies))

    def to_json(self) -> dict[str, Any]:
        """The scores of layers (None: not measured), and what was measured how; of units their numbers."""
        return {
            "layer": {name: [None if v != v else v for v in values.tolist()] for name, values in self.layer.items()},
            "variants": {name: values.tolist() for name, values in self.variants.items()},
            "units": {name: values.size for name, values in self.units.items()},
            **(asdict(self.facts) if self.facts else {}),
        }

    @property
    def facts(self) -> ScoreFacts | None:
        """How they were measured; None for scores that come from elsewhere."""
        return ScoreFacts.from_metadata(self.metadata)

    def __repr__(self) -> str:
        """One line, without the arrays."""
        num_units = sum(values.size for values in self.units.values())
        num_layers = max((values.size for values in self.layer.values()), default=0)
        return f"Scores({num_layers} layers by {', '.join(self.layer)}; {num_units:,} units)"

    @property
    def is_measured_here(self) -> bool:
        """False for plain-JSON scores, whose origin cannot be verified."""
        return "model_fingerprint" in self.metadata


def _wanted_shape(table: str, name: str, architecture: Architecture) -> tuple[int, ...] | None:
    """The shape of one array of scores of a model; None where the model has nothing of that name."""
    if table in ("layer", "variant", "block"):
        return (len(architecture.layers),)
    axis, _, place = name.partition(".")
    if place and place != FINAL and not (place.isdecimal() and int(place) < len(architecture.layers)):
        return None
    layer_idx = int(place) if place.isdecimal() else None
    if table == "energy" and axis != TRUNK.inner_norm_energy:
        inner = [t.shape for t in architecture.layer_tensors(layer_idx or 0) if t.spec.rms_groups]
        return (prod(inner[-1]),) if inner and layer_idx is not None else None
    axis = EXPERT if axis in _EXPERT_SCORES else axis.removesuffix(_CONTRIBUTION)
    sizes = architecture.sizes(None if axis == "hidden" else layer_idx)
    if axis not in sizes:
        return None
    chooser = kind_of_axis(axis).chosen_by_unit.get(axis)
    return (sizes[axis],) if chooser is None else (sizes[chooser], sizes[axis])


def _check_array(table: str, name: str, array: Array, wanted: tuple[int, ...] | None) -> None:
    hint = "measure this model with `minipuzzle score`"
    if wanted is None:
        raise MinipuzzleError(f"the model has nothing that scores {table}.{name} could be of", hint)
    if array.shape != wanted:
        raise MinipuzzleError(f"scores {table}.{name} have shape {array.shape}; the model's are {wanted}", hint)
    if not np.issubdtype(array.dtype, np.floating):
        raise MinipuzzleError(f"scores {table}.{name} are {array.dtype}, no floating-point numbers", hint)


def write_scores(scores: Scores, path: Path) -> None:
    """Write a score file. The caller stages it (``outputs.output_file``)."""
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[Any]] = {f"layer.{name}": np.asarray(v, np.float64) for name, v in scores.layer.items()}
    tensors |= {f"variant.{name}": np.asarray(v, np.float64) for name, v in scores.variants.items()}
    tensors |= {f"block.{name}": np.asarray(v, np.float64) for name, v in scores.blocks.items()}
    tensors |= {f"unit.{name}": np.asarray(v, np.float32) for name, v in scores.units.items()}
    tensors |= {f"energy.{name}": np.asarray(v, np.float32) for name, v in scores.energies.items()}
    if scores.token_ids is not None:
        tensors[_TOKEN_IDS] = np.asarray(scores.token_ids, np.int32)
    metadata = {"schema_version": SCHEMA_VERSION, **scores.metadata}
    save_file(tensors, path, metadata={**metadata, CHECKSUM: digest_of_arrays(tensors, metadata)})


def read_scores(path: Path) -> Scores:
    """Read a score file, or plain JSON with layer scores.

    Raises: MinipuzzleError for anything unreadable, of another schema, or no longer what was written.
    """
    require_regular_file(path, "measure with `minipuzzle score`")
    return _read_json_scores(path) if path.suffix == ".json" else _read_safetensors_scores(path)


def _read_json_scores(path: Path) -> Scores:
    record = parse_json(path.read_bytes(), str(path), _JSON_FORM)
    layer = record.get("layer") if isinstance(record, dict) else None
    if not isinstance(layer, dict) or not layer:
        raise MinipuzzleError(f"{path} is not a score file: it has no object `layer`", _JSON_FORM)
    for metric, values in layer.items():
        if not isinstance(values, list) or not all(value is None or type(value) in (int, float) for value in values):
            raise MinipuzzleError(f"{path}: layer.{metric} is no list of numbers", _JSON_FORM)
    try:
        return Scores(layer={metric: np.asarray(values, np.float64) for metric, values in layer.items()})
    except OverflowError:
        raise MinipuzzleError(f"{path} holds numbers of hundreds of digits", _JSON_FORM) from None


def _read_safetensors_scores(path: Path) -> Scores:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise MinipuzzleError(f"{path} is not a score file: {error}", "measure with `minipuzzle score`") from None
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise MinipuzzleError(f"{path} has another schema than version {SCHEMA_VERSION}", "measure again")
    if metadata.pop(CHECKSUM, None) not in (None, digest_of_arrays(tensors, metadata)):
        raise MinipuzzleError(f"{path} is not as it was written", "measure again, or copy it again from its source")
    try:
        ScoreFacts.from_metadata(metadata)
    except (ValueError, MinipuzzleError) as error:
        raise MinipuzzleError(f"{path} says how it was measured, but {error}", "measure again") from None

    for name, array in tensors.items():
        is_tokens = name == _TOKEN_IDS and array.ndim == 2 and np.issubdtype(array.dtype, np.integer)
        if not is_tokens and not name.startswith(_PREFIXES):
            problem = f"{path} holds {name} {list(array.shape)} {array.dtype}, which no score file has"
            raise MinipuzzleError(problem, "measure again")

    def under(prefix: str) -> dict[str, Array]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return Scores(
        layer=under("layer."),
        units=under("unit."),
        variants=under("variant."),
        blocks=under("block."),
        energies=under("energy."),
        token_ids=tensors.get(_TOKEN_IDS),
        metadata=metadata,
    )
