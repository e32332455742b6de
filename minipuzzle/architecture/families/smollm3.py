"""smollm3: like Llama, without rotary embeddings in every fourth attention layer (huggingface.co/blog/smollm3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.family import Config, require, require_length
from minipuzzle.architecture.configs.paired import FULL, PAIRED, SLIDING, tiny, windows_by_layer_type, write_layer_types
from minipuzzle.architecture.model import Architecture


def _complete(config: Config) -> Config:
    interval, num_blocks = require(config, "no_rope_layer_interval"), require(config, "num_hidden_layers")
    rotated = config.get("no_rope_layers") or [int((idx + 1) % interval != 0) for idx in range(num_blocks)]
    types = config.get("layer_types") or [FULL if is_rotated else SLIDING for is_rotated in rotated]
    return {**config, "no_rope_layers": require_length("no_rope_layers", rotated, num_blocks), "layer_types": types}


def _adjust(config: Config, architecture: Architecture) -> Architecture:
    rotated = iter(config["no_rope_layers"])  # one where a layer rotates, zero where it does not
    layers = (
        layer if layer.kind != "attention" or next(rotated) else replace(layer, options=layer.options | {"no_rope"})
        for layer in architecture.layers
    )
    return windows_by_layer_type(config, replace(architecture, layers=tuple(layers)))


def _finish(config: dict[str, Any], source: Config, architecture: Architecture) -> dict[str, Any]:
    kept = [int("no_rope" not in layer.options) for layer in architecture.layers if layer.kind == "attention"]
    return {**write_layer_types(config, source, architecture), "no_rope_layers": kept}


_OPTIONS = {"attention": {"bias": "attention_bias"}, "mlp": {"gated": True, "bias": "mlp_bias"}}
_TINY = tiny("smollm3", "SmolLM3ForCausalLM", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=9)
_DATA: dict[str, Any] = {"options": _OPTIONS, "defaults": {"no_rope_layer_interval": 4}, "tiny_config": _TINY}
FAMILIES = (replace(PAIRED, model_type="smollm3", complete=_complete, adjust=_adjust, finish=_finish, **_DATA),)
