"""Nemotron-H models of the per-layer layout as engines read them: config.json with ``block_configs``, and back.

vLLM runs it as ``NemotronHPuzzleForCausalLM``. Each layer has its block type and its own widths of MLP, attention heads
or experts; Mamba-2 layers have one state for all of them, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minipuzzle.architecture.configs.family import Config, divide, require
from minipuzzle.architecture.configs.per_layer import PER_LAYER_MODEL_TYPE, base_config
from minipuzzle.architecture.families import FAMILIES
from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.model import Architecture
from minipuzzle.errors import MinipuzzleError

PUZZLE_MODEL_TYPE = "nemotron_h_puzzle"
ARCHITECTURE = "NemotronHPuzzleForCausalLM"
CONFIG_MODULE, CONFIG_CLASS = "configuration_nemotron_h_puzzle", "NemotronHPuzzleConfig"
_BLOCK_CONFIGS = "block_configs"
# Fields of config.json by axis; the query heads of attention follow its groups.
_FIELDS: Mapping[str, Mapping[str, str]] = {
    kind: {axis: FAMILIES["nemotron_h"].fields[kind][axis] for axis in LAYER_KINDS[kind].prunable_axes}
    for kind in FAMILIES["nemotron_h"].names.mixers
}
_QUERIES = "num_attention_heads"


def write_puzzle_config(config: Config, architecture: Architecture) -> dict[str, Any]:
    """config.json with ``block_configs``, from one of the per-layer layout.

    Raises: MinipuzzleError for another family, a model whose layers do not differ, or Mamba layers that do.
    """
    base = base_config(config)
    if base.get("model_type") != "nemotron_h" or config.get("model_type") != PER_LAYER_MODEL_TYPE:
        is_other = base.get("model_type") != "nemotron_h"
        raise MinipuzzleError(
            f"block_configs are for nemotron_h, not for {base.get('model_type')}"
            if is_other
            else "the layers of this model do not differ in width, which every engine's own config.json can say",
            "leave out ‹puzzle›",
        )
    _check_mamba(architecture)
    return {
        **base,
        "model_type": PUZZLE_MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{CONFIG_MODULE}.{CONFIG_CLASS}"},
        _BLOCK_CONFIGS: [_block(layer) for layer in architecture.layers],
    }


def _check_mamba(architecture: Architecture) -> None:
    indices = architecture.layer_indices("mamba")
    for layer_idx in indices:
        first, other = architecture.layers[indices[0]].sizes, architecture.layers[layer_idx].sizes
        if first != other:
            expected = f"{first['ssm_head']} of {first['ssm_head_channel']}"
            raise MinipuzzleError(
                f"layer {layer_idx} (mamba) has {other['ssm_head']} heads of {other['ssm_head_channel']} channels, "
                f"layer {indices[0]} {expected}: engines keep states of one shape",
                "cut ssm_head and ssm_head_channel alike in all layers, or leave out ‹puzzle›",
            )


def _block(layer: LayerSpec) -> dict[str, Any]:
    if layer.kind == "mamba":
        return {"block_type": "mamba"}
    block: dict[str, Any] = {"block_type": layer.kind}
    block |= {field: layer.sizes[axis] for axis, field in _FIELDS[layer.kind].items()}
    if layer.kind == "attention":
        block[_QUERIES] = layer.sizes["kv_group"] * layer.sizes["queries_per_group"]
    return block


def without_blocks(config: Config) -> Config:
    """A config.json with ``block_configs`` in our per-layer layout; any other as it is.

    Raises: MinipuzzleError naming the block that is damaged or says what we do not support.
    """
    if config.get("model_type") != PUZZLE_MODEL_TYPE:
        return config
    blocks = config.get(_BLOCK_CONFIGS)
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, Mapping) for block in blocks):
        raise MinipuzzleError(f"config.json: {_BLOCK_CONFIGS} is not a list of blocks", "restore the file")
    blocks = [{field: value for field, value in block.items() if value is not None} for block in blocks]
    layers = [_layer(block_idx, block, config) for block_idx, block in enumerate(blocks)]
    symbols = "".join(LAYER_KINDS[layer["kind"]].symbol for layer in layers)
    left_out = (_BLOCK_CONFIGS, "auto_map", "layers_block_type", "mtp_block_configs")
    return {
        **{key: value for key, value in config.items() if key not in left_out},
        "model_type": PER_LAYER_MODEL_TYPE,
        "architectures": ["MinipuzzlePerLayer"],
        "base_model_type": "nemotron_h",
        "base_architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": symbols,
        "num_hidden_layers": len(layers),
        **_largest_fields(config, blocks),
        "layers": layers,
    }


def _layer(block_idx: int, block: Mapping[str, Any], config: Config) -> dict[str, Any]:
    kind = str(block.get("block_type"))
    if kind not in _FIELDS:
        raise MinipuzzleError(
            f"config.json: {_BLOCK_CONFIGS}[{block_idx}] has the unsupported type {kind!r}",
            f"supported here: {', '.join(_FIELDS)}",
        )
    allowed = {*_FIELDS[kind].values(), *_queries_of(kind)}
    for field, value in block.items():
        if field not in {*allowed, "block_type"} and value != config.get(field):
            raise MinipuzzleError(
                f"config.json: {_BLOCK_CONFIGS}[{block_idx}] has {field} {value!r} of its own, which is not supported",
                f"own fields of {kind} that are: {', '.join(sorted(allowed))}",
            )
    found = {**config, **block}
    if kind == "attention":
        _check_queries(block_idx, found, config)
    return {
        "block": block_idx,
        "kind": kind,
        **{axis: require(found, field) for axis, field in _FIELDS[kind].items()},
    }


def _check_queries(block_idx: int, block: Config, config: Config) -> None:
    name = f"{_BLOCK_CONFIGS}[{block_idx}]: {_QUERIES} by num_key_value_heads"
    found = divide(require(block, _QUERIES), require(block, "num_key_value_heads"), name)
    expected = divide(require(config, _QUERIES), require(config, "num_key_value_heads"), _QUERIES)
    if found != expected:
        raise MinipuzzleError(
            f"config.json: {_BLOCK_CONFIGS}[{block_idx}] has {found} queries a group, the model {expected}",
            "all attention layers must have as many",
        )


def _largest_fields(config: Config, blocks: list[Mapping[str, Any]]) -> dict[str, int]:
    """Fields of the complete model, in which every layer has the largest width of its kind."""
    fields = [(kind, field) for kind, axes in _FIELDS.items() for field in (*axes.values(), *_queries_of(kind))]
    largest: dict[str, int] = {}
    for kind, field in fields:
        found = [{**config, **block}[field] for block in blocks if block["block_type"] == kind]
        if found:
            largest[field] = max(found)
    return largest


def _queries_of(kind: str) -> tuple[str, ...]:
    return (_QUERIES,) if kind == "attention" else ()
