"""The per-layer layout: models whose layers differ in width, or whose blocks lack their attention or their MLP.

No family's own config.json can say that. Ours keeps the family's fields, for a model with complete blocks and the
largest widths, and adds ``layers``: kind, block and widths of each layer. Its ``model_type`` is one that other loaders
do not know and refuse, because they would fill the gaps with random weights. ``minipuzzle.load`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from minipuzzle.architecture.configs.family import Config, Family, require
from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.model import Architecture
from minipuzzle.errors import MinipuzzleError

PER_LAYER_MODEL_TYPE = "minipuzzle_per_layer"
_OWN_KEYS = ("layers", "base_model_type", "base_architectures")
_BROKEN = "write the file again, or restore it from its source"


def is_uniform(architecture: Architecture) -> bool:
    """Whether a family's own config.json can describe a model: complete blocks, and one width an axis."""
    complete = all(len(block) == architecture.names.layers_per_block for block in architecture.blocks)
    widths = {(layer.kind, *sorted(_widths(layer).items())) for layer in architecture.layers}
    return complete and len(widths) == len(architecture.layer_counts)


def write_config(family: Family, source: Config, architecture: Architecture) -> dict[str, Any]:
    """config.json of a cut model: the family's own where it suffices, else that of the per-layer layout.

    Raises: MinipuzzleError for widths that the family does not allow even in one layer.
    """
    base = base_config(source)
    if is_uniform(architecture):
        return family.write(base, architecture)
    written = family.write(base, complete(architecture, family.read(base)))
    layers = [
        {"block": architecture.block_of(layer_idx), "kind": layer.kind, **_widths(layer)}
        for layer_idx, layer in enumerate(architecture.layers)
    ]
    return {
        **written,
        "model_type": PER_LAYER_MODEL_TYPE,
        "architectures": ["MinipuzzlePerLayer"],
        "base_model_type": written["model_type"],
        "base_architectures": written.get("architectures"),
        "layers": layers,
    }


def base_config(config: Config) -> dict[str, Any]:
    """The family's own config.json within one of the per-layer layout; any other as it is."""
    if config.get("model_type") != PER_LAYER_MODEL_TYPE:
        return dict(config)
    base = {key: value for key, value in config.items() if key not in _OWN_KEYS}
    return {**base, "model_type": config.get("base_model_type"), "architectures": config.get("base_architectures")}


def complete(architecture: Architecture, source: Architecture) -> Architecture:
    """The model with complete blocks and one width an axis, the largest, in which a model has its place.

    ``source`` has layers of all kinds that the blocks may need.
    """
    largest = {kind: _largest(architecture, source, kind) for kind in source.layer_counts}
    slots = architecture.names.slots
    layers: list[LayerSpec] = []
    kind_in = {slots.get(kind, 0): kind for kind in reversed(source.layer_counts)}  # of the nearest block that has one
    for block in architecture.blocks:
        in_slot = {slots.get(architecture.layers[idx].kind, 0): architecture.layers[idx] for idx in block}
        for slot in range(architecture.names.layers_per_block):
            if slot in in_slot:
                kind_in[slot] = in_slot[slot].kind
                layers.append(in_slot[slot].resized(**largest[kind_in[slot]]))
            else:
                kind = kind_in[slot]
                model = source.layers[source.layer_indices(kind)[0]]
                layers.append(model.resized(hidden=architecture.hidden, **largest[kind]))
    return replace(architecture, layers=tuple(layers))


def _largest(architecture: Architecture, source: Architecture, kind: str) -> dict[str, int]:
    layers = [layer for layer in architecture.layers if layer.kind == kind]
    layers = layers or [source.layers[source.layer_indices(kind)[0]]]
    return {axis: max(layer.sizes[axis] for layer in layers) for axis in _widths(layers[0])}


def _widths(layer: LayerSpec) -> dict[str, int]:
    return {axis: layer.sizes[axis] for axis in LAYER_KINDS[layer.kind].prunable_axes if axis in layer.sizes}


@dataclass(frozen=True, kw_only=True)
class PerLayerFamily(Family):
    """The models of a family in the per-layer layout."""

    base: Family

    def language_config(self, config: Config) -> dict[str, Any]:
        """config.json of the complete language model alone."""
        return self.base.language_config(base_config(config))

    def carries(self, name: str) -> bool:
        """As in the family."""
        return self.base.carries(name)

    def followed_axes(self, name: str) -> tuple[frozenset[str], bool]:
        """As in the family."""
        return self.base.followed_axes(name)

    def read(self, config: Config) -> Architecture:
        """The layers that are there, at their widths.

        Raises: MinipuzzleError if ``layers`` is damaged.
        """
        whole = self.base.read(base_config(config))
        layers = [
            whole.layers[position].resized(**{axis: require(entry, axis) for axis in _widths(whole.layers[position])})
            for position, entry in zip(_kept_layers(whole, config), config["layers"], strict=True)
        ]
        return replace(whole, layers=tuple(layers))

    def write(self, source: Config, architecture: Architecture) -> dict[str, Any]:
        """config.json of a cut model, uniform again where that suffices."""
        return write_config(self.base, source, architecture)


def per_layer_family(base: Family) -> PerLayerFamily:
    """The family of models in the per-layer layout."""
    data = {field.name: getattr(base, field.name) for field in fields(Family)}
    return PerLayerFamily(**{**data, "model_type": PER_LAYER_MODEL_TYPE}, base=base)


def _kept_layers(whole: Architecture, config: Config) -> list[int]:
    """Positions of a model's layers among those of the complete model."""
    entries = config.get("layers")
    kept: list[int] = []
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise MinipuzzleError("config.json: layers is not a list of layers", _BROKEN)
    for layer_idx, entry in enumerate(entries):
        block_idx, kind = entry.get("block"), entry.get("kind")
        if not isinstance(block_idx, int) or not 0 <= block_idx < len(whole.blocks):
            raise MinipuzzleError(f"config.json: layers[{layer_idx}] has no block {block_idx!r}", _BROKEN)
        found = [position for position in whole.blocks[block_idx] if whole.layers[position].kind == kind]
        if not found or (kept and found[0] <= kept[-1]):
            raise MinipuzzleError(f"config.json: layers[{layer_idx}] names {kind!r} out of place", _BROKEN)
        kept += found
    return kept
