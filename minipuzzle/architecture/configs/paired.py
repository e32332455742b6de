"""What families share whose decoder blocks pair attention with an MLP, each under a norm of its own.

In the Architecture such a block is two layers. They run as residual branches of transformers' block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.family import (
    Config,
    Family,
    ModulePaths,
    divide,
    require,
    require_one_of,
    require_whole_blocks,
    uniform_sizes,
)
from minipuzzle.architecture.layers import LayerSpec, NormSpec
from minipuzzle.architecture.model import Architecture, TensorNames
from minipuzzle.errors import MinipuzzleError

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


def attention_sizes(config: Config) -> dict[str, int]:
    """Sizes of grouped-query attention by the field names that most families share."""
    hidden, queries = require(config, "hidden_size"), require(config, "num_attention_heads")
    kv_groups = queries if config.get("num_key_value_heads") is None else require(config, "num_key_value_heads")
    if config.get("head_dim") is None:
        head_dim = divide(hidden, queries, "hidden_size by num_attention_heads")
    else:
        head_dim = require(config, "head_dim")
    return {
        "hidden": hidden,
        "kv_group": kv_groups,
        "queries_per_group": divide(queries, kv_groups, "num_attention_heads by num_key_value_heads"),
        "head_dim": head_dim,
    }


def paired_layers(
    config: Config, attention_options: frozenset[str], mlp_options: frozenset[str], windows: Sequence[int | None]
) -> tuple[LayerSpec, ...]:
    """Attention and MLP of every block. ``windows``: of each attention, in tokens; None where it sees everything."""
    num_blocks = require(config, "num_hidden_layers")
    if len(windows) != num_blocks:
        problem = f"config.json: layer_types names {len(windows)} layers, num_hidden_layers {num_blocks}"
        raise MinipuzzleError(problem, "correct the file")
    mlp_sizes = {"hidden": require(config, "hidden_size"), "ffn": require(config, "intermediate_size")}
    mlp = LayerSpec(kind="mlp", sizes=mlp_sizes, options=mlp_options)
    layers = []
    for window in windows:
        sizes = attention_sizes(config) | ({} if window is None else {"window": window})
        layers += [LayerSpec(kind="attention", sizes=sizes, options=attention_options), mlp]
    return tuple(layers)


def no_windows(config: Config) -> list[int | None]:
    """Full attention in every block."""
    return [None] * require(config, "num_hidden_layers")


def windows_by_layer_type(config: Config) -> list[int | None]:
    """Windows as Qwen's configs give them: for each block in ``layer_types``, or from ``max_window_layers`` on.

    Raises: MinipuzzleError for an unknown layer type.
    """
    num_blocks = require(config, "num_hidden_layers")
    window = require(config, "sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", _QWEN_MAX_WINDOW_LAYERS)
        return [window if block_idx >= first else None for block_idx in range(num_blocks)]
    for block_idx, name in enumerate(types):
        require_one_of({f"layer_types[{block_idx}]": name}, f"layer_types[{block_idx}]", LAYER_TYPES, "")
    return [window if name == SLIDING else None for name in types]


def write_paired(source: Config, architecture: Architecture) -> dict[str, Any]:
    """config.json of a cut model, for families with the common field names; everything that is not cut stays.

    Raises: MinipuzzleError for layers of unequal widths, or blocks without their attention or MLP.
    """
    require_whole_blocks(architecture)
    config = {key: value for key, value in source.items() if key not in STALE_KEYS}
    config |= {"num_hidden_layers": len(architecture.blocks), "hidden_size": architecture.hidden}
    if attention := uniform_sizes(architecture, "attention"):
        queries = attention["kv_group"] * attention["queries_per_group"]
        if "layer_types" in source or source.get("use_sliding_window"):
            kept = [layer for layer in architecture.layers if layer.kind == "attention"]
            config["layer_types"] = [SLIDING if "window" in layer.sizes else FULL for layer in kept]
        config |= {"num_attention_heads": queries, "num_key_value_heads": attention["kv_group"]}
        if "head_dim" in source or architecture.hidden != queries * attention["head_dim"]:
            config["head_dim"] = attention["head_dim"]
    if mlp := uniform_sizes(architecture, "mlp"):
        config["intermediate_size"] = mlp["ffn"]
    dtype = source.get("dtype") or source.get("torch_dtype") or "bfloat16"
    return {**config, "dtype": dtype, "torch_dtype": dtype}


def paired_family(
    model_type: str,
    architectures: str,
    *,
    options: Callable[[Config], tuple[frozenset[str], frozenset[str]]],
    tiny_config: Config,
    activation: str = "silu",
    windows: Callable[[Config], Sequence[int | None]] = no_windows,
    norm: NormSpec | None = None,
    head_dim: int | None = None,
) -> Family:
    """An entry of the table with the common names.

    ``options`` reads those of attention and of the MLP, ``windows`` the window of each attention. ``head_dim``: what
    transformers assumes where config.json is silent; None: hidden size by heads.
    """
    names = replace(PAIRED_NAMES, norm=norm or NormSpec())

    def read(config: Config) -> Architecture:
        if head_dim is not None:
            config = {"head_dim": head_dim, **config}
        require_one_of(config, "hidden_act", (activation,), activation)
        return Architecture(
            model_type=model_type,
            layers=paired_layers(config, *options(config), windows(config)),
            hidden=require(config, "hidden_size"),
            vocabulary=require(config, "vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            names=names,
        )

    return Family(
        model_type=model_type,
        names=names,
        modules=PAIRED_MODULES,
        read=read,
        write=write_paired,
        tiny_config={"model_type": model_type, "architectures": [architectures], **tiny_config},
    )
