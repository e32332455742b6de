"""What families share whose decoder blocks pair attention with an MLP, each under a norm of its own.

In the Architecture such a block is two layers. They run as residual branches of transformers' block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.family import (
    Config,
    Family,
    ModulePaths,
    require,
    require_length,
    require_num_layers,
    require_one_of,
)
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.model import Architecture, TensorNames

ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
PAIRED_NAMES = TensorNames(
    block_prefix="model.layers.{block_idx}.",
    mixers={"attention": ("self_attn.", f"{ATTENTION_NORM}.weight"), "mlp": ("mlp.", f"{MLP_NORM}.weight")},
    slots={"attention": 0, "mlp": 1},
    embeddings="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
)
PAIRED_MODULES = ModulePaths(
    layers="model.layers",
    embeddings="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    disk_prefix="model.",
    module_prefix="model.",
    rotary="model.rotary_emb",
)
FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")
_QWEN_MAX_WINDOW_LAYERS = 28  # where config.json is silent
# Of the file's own history, or no longer true of weights that were read as plain numbers.
STALE_KEYS = ("_name_or_path", "transformers_version", "auto_map")
TINY_CONFIG: Mapping[str, Any] = {
    "num_hidden_layers": 3,
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
    "torch_dtype": "float32",
}


def tiny(model_type: str, class_name: str, **changes: Any) -> dict[str, Any]:
    """A config.json for tests."""
    return {"model_type": model_type, "architectures": [class_name], **TINY_CONFIG, **changes}


def pairs(config: Config) -> list[str]:
    """Attention and an MLP in every block."""
    return ["attention", "mlp"] * require_num_layers(config)


def with_windows(architecture: Architecture, windows: Sequence[int | None]) -> Architecture:
    """Give each attention layer its window in tokens; None where it sees everything."""
    of_layers = iter(require_length("layer_types", windows, architecture.layer_counts["attention"]))

    def windowed(layer: LayerSpec) -> LayerSpec:
        window = next(of_layers) if layer.kind == "attention" else None
        return layer if window is None else replace(layer, sizes={**layer.sizes, "window": window})

    return replace(architecture, layers=tuple(map(windowed, architecture.layers)))


def one_window(config: Config, architecture: Architecture) -> Architecture:
    """The same window in all attention layers, if there is one."""
    window = None if config.get("sliding_window") is None else require(config, "sliding_window")
    return with_windows(architecture, [window] * architecture.layer_counts["attention"])


def one_window_or_by_type(config: Config, architecture: Architecture) -> Architecture:
    """Windows as Mistral's configs give them: one for all, or for those blocks that ``layer_types`` lets slide."""
    if config.get("layer_types") is None:
        return one_window(config, architecture)
    is_sliding = config.get("sliding_window") is not None
    return windows_by_layer_type({**config, "use_sliding_window": is_sliding}, architecture)


def windows_by_layer_type(config: Config, architecture: Architecture) -> Architecture:
    """Windows as Qwen's configs give them: for each block in ``layer_types``, or from ``max_window_layers`` on.

    Raises: MinipuzzleError for an unknown layer type.
    """
    window = require(config, "sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", _QWEN_MAX_WINDOW_LAYERS)
        types = [SLIDING if block_idx >= first else FULL for block_idx in range(len(architecture.blocks))]
    for block_idx, name in enumerate(types):
        require_one_of({f"layer_types[{block_idx}]": name}, f"layer_types[{block_idx}]", LAYER_TYPES, "")
    return with_windows(architecture, [window if name == SLIDING else None for name in types])


def write_layer_types(config: dict[str, Any], source: Config, architecture: Architecture) -> dict[str, Any]:
    """``layer_types`` of the attention layers that stay, where the source has windows by layer."""
    if source.get("layer_types") is None and not source.get("use_sliding_window"):
        return config
    kept = [layer for layer in architecture.layers if layer.kind == "attention"]
    return {**config, "layer_types": [SLIDING if "window" in layer.sizes else FULL for layer in kept]}


# What most families of the kind share; each replaces what it does otherwise.
PAIRED = Family(
    model_type="",
    names=PAIRED_NAMES,
    modules=PAIRED_MODULES,
    kinds=pairs,
    fields={
        "trunk": {"hidden": "hidden_size"},
        "attention": {"kv_group": "num_key_value_heads"},
        "mlp": {"ffn": "intermediate_size"},
    },
    options={"mlp": {"gated": True}},
    only={"hidden_act": "silu"},
    drops=STALE_KEYS,
    finish=write_layer_types,
    tiny_config={},
)
