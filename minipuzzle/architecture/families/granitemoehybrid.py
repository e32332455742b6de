"""granitemoehybrid: Granite 4, whose blocks pair Mamba-2 or attention with a gated MLP, without routed experts.

Granite multiplies embeddings, residual branches, attention scores and logits by constants of its config.json.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.family import (
    Config,
    Family,
    divide,
    require,
    require_one_of,
    require_whole_blocks,
    uniform_sizes,
)
from minipuzzle.architecture.configs.paired import (
    ATTENTION_NORM,
    MLP_NORM,
    PAIRED_MODULES,
    PAIRED_NAMES,
    STALE_KEYS,
    TINY_CONFIG,
    attention_sizes,
)
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.model import Architecture
from minipuzzle.errors import MinipuzzleError

_NAMES = replace(
    PAIRED_NAMES,
    mixers={
        "mamba": ("mamba.", f"{ATTENTION_NORM}.weight"),
        "attention": ("self_attn.", f"{ATTENTION_NORM}.weight"),
        "mlp": ("shared_mlp.", f"{MLP_NORM}.weight"),
    },
    slots={"mamba": 0, "attention": 0, "mlp": 1},
    roles={"mlp": {"gate_up": "input_linear", "down": "output_linear"}},
)
_KIND_OF_LAYER_TYPE = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
}
_EXPAND = 2  # where config.json is silent


def _layer_types(config: Config) -> list[str]:
    found = config.get("layer_types") or config.get("layers_block_type")
    if not found:
        raise MinipuzzleError("config.json: layer_types is missing", "it names the kind of every block")
    for block_idx, name in enumerate(found):
        require_one_of({f"layer_types[{block_idx}]": name}, f"layer_types[{block_idx}]", tuple(_KIND_OF_LAYER_TYPE), "")
    return list(found)


def _mamba(config: Config) -> LayerSpec:
    hidden, heads, groups = (require(config, field) for field in ("hidden_size", "mamba_n_heads", "mamba_n_groups"))
    divide(heads, groups, "mamba_n_heads by mamba_n_groups")
    if config.get("mamba_d_head", "auto") == "auto":
        inner = hidden * require({"mamba_expand": _EXPAND, **config}, "mamba_expand")
        channels = divide(inner, heads, "mamba_expand times hidden_size by mamba_n_heads")
    else:
        channels = require(config, "mamba_d_head")
    flags = {"bias": config.get("mamba_proj_bias", False), "conv_bias": config.get("mamba_conv_bias", True)}
    sizes = {
        "hidden": hidden,
        "ssm_head": heads,
        "ssm_head_channel": channels,
        "ssm_group": groups,
        "ssm_state": require(config, "mamba_d_state"),
        "conv_kernel": require(config, "mamba_d_conv"),
    }
    return LayerSpec(kind="mamba", sizes=sizes, options=frozenset(name for name, is_on in flags.items() if is_on))


def _read(config: Config) -> Architecture:
    require_one_of(config, "hidden_act", ("silu",), "silu")
    if config.get("num_local_experts"):
        problem = (
            f"config.json: num_local_experts is {config['num_local_experts']}; routed experts are not supported here"
        )
        raise MinipuzzleError(problem, "use a Granite 4 model without experts, such as h-micro")
    hidden = require(config, "hidden_size")
    ffn = require(config, "shared_intermediate_size")
    mlp = LayerSpec(kind="mlp", sizes={"hidden": hidden, "ffn": ffn}, options=frozenset({"gated", "fused_gate"}))
    layers: list[LayerSpec] = []
    for name in _layer_types(config):
        if _KIND_OF_LAYER_TYPE[name] == "mamba":
            layers += [_mamba(config), mlp]
        else:
            options = frozenset({"bias"} if config.get("attention_bias") else ())
            layers += [LayerSpec(kind="attention", sizes=attention_sizes(config), options=options), mlp]
    return Architecture(
        model_type="granitemoehybrid",
        layers=tuple(layers),
        hidden=hidden,
        vocabulary=require(config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        names=_NAMES,
    )


def _write(source: Config, architecture: Architecture) -> dict[str, Any]:
    require_whole_blocks(architecture)
    name_of_kind = {_KIND_OF_LAYER_TYPE[name]: name for name in _layer_types(source)}
    firsts = [architecture.layers[block[0]].kind for block in architecture.blocks]
    config = {key: value for key, value in source.items() if key not in (*STALE_KEYS, "layers_block_type")}
    config |= {
        "num_hidden_layers": len(firsts),
        "layer_types": [name_of_kind[kind] for kind in firsts],
        "hidden_size": architecture.hidden,
    }
    if mamba := uniform_sizes(architecture, "mamba"):
        inner = mamba["ssm_head"] * mamba["ssm_head_channel"]
        config |= {
            "mamba_n_heads": mamba["ssm_head"],
            "mamba_d_head": mamba["ssm_head_channel"],
            "mamba_expand": _expand(inner, architecture.hidden),
        }
    if attention := uniform_sizes(architecture, "attention"):
        queries = attention["kv_group"] * attention["queries_per_group"]
        config |= {"num_attention_heads": queries, "num_key_value_heads": attention["kv_group"]}
        if "head_dim" in source or architecture.hidden != queries * attention["head_dim"]:
            config["head_dim"] = attention["head_dim"]
    if mlp := uniform_sizes(architecture, "mlp"):
        config["shared_intermediate_size"] = mlp["ffn"]
    dtype = source.get("dtype") or source.get("torch_dtype") or "bfloat16"
    return {**config, "dtype": dtype, "torch_dtype": dtype}


def _expand(inner: int, hidden: int) -> int:
    if inner % hidden:
        raise MinipuzzleError(
            f"ssm_head times ssm_head_channel ({inner}) must be a multiple of hidden ({hidden}) in this family",
            "cut ssm_head, ssm_head_channel and hidden together so that they divide",
        )
    return inner // hidden


_TINY_CONFIG: Config = {
    **TINY_CONFIG,
    "model_type": "granitemoehybrid",
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 48,
    "intermediate_size": 48,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "attention_bias": False,
    "position_embedding_type": "rope",
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
    "tie_word_embeddings": True,
}

FAMILIES = (
    Family(
        model_type="granitemoehybrid",
        names=_NAMES,
        modules=PAIRED_MODULES,
        read=_read,
        write=_write,
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
        tiny_config=_TINY_CONFIG,
        # As in the files of the published models: older names, and attention without positions.
        tiny_variants={
            "nope": {
                **_TINY_CONFIG,
                "layer_types": ["mamba", "attention", "mamba"],
                "num_hidden_layers": 3,
                "position_embedding_type": "nope",
                "mamba_n_groups": 1,
            }
        },
    ),
)
