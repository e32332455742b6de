"""granitemoehybrid: Granite 4, whose blocks pair Mamba-2 or attention with a gated MLP, to which routed experts add.

Granite multiplies embeddings, residual branches, attention scores and logits by constants of its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.experts import ROUTED_AXES
from minipuzzle.architecture.configs.family import (
    Config,
    Family,
    divide,
    require,
    require_as_many,
    require_names,
    require_one_of,
)
from minipuzzle.architecture.configs.paired import (
    ATTENTION_NORM,
    MLP_NORM,
    PAIRED,
    PAIRED_MODULES,
    PAIRED_NAMES,
    STALE_KEYS,
    TINY_CONFIG,
)
from minipuzzle.architecture.model import Architecture, FusedExperts
from minipuzzle.errors import MinipuzzleError

_NAMES = replace(
    PAIRED_NAMES,
    mixers={
        **PAIRED_NAMES.mixers,
        "mamba": ("mamba.", f"{ATTENTION_NORM}.weight"),
        "mlp": ("shared_mlp.", f"{MLP_NORM}.weight"),
        "moe": ("", f"{MLP_NORM}.weight"),
    },
    slots={**PAIRED_NAMES.slots, "mamba": 0, "moe": 1},
    roles={
        "mlp": {"gate_up": "input_linear", "down": "output_linear"},
        "moe": {
            "router": "block_sparse_moe.router.layer",
            "expert_gate": "block_sparse_moe.experts.{unit}.gate_proj",
            "expert_up": "block_sparse_moe.experts.{unit}.up_proj",
            "expert_down": "block_sparse_moe.experts.{unit}.down_proj",
            "shared_gate_up": "shared_mlp.input_linear",
            "shared_down": "shared_mlp.output_linear",
        },
    },
    fused=(
        FusedExperts(name="block_sparse_moe.input_linear.weight", roles=("expert_gate", "expert_up")),
        FusedExperts(name="block_sparse_moe.output_linear.weight", roles=("expert_down",)),
    ),
    is_always_fused=True,
)
_EXPERT_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    "moe": {"gated": True, "softmax_router": True, "fused_shared": True}
}
_KIND_OF_LAYER_TYPE = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
}


def _layer_types(config: Config) -> list[str]:
    field = next((name for name in ("layer_types", "layers_block_type") if config.get(name)), None)
    if field is None:
        raise MinipuzzleError("config.json: layer_types is missing", "it names the kind of every block")
    found = require_names(config, field)
    for block_idx, name in enumerate(found):
        require_one_of({f"layer_types[{block_idx}]": name}, f"layer_types[{block_idx}]", tuple(_KIND_OF_LAYER_TYPE), "")
    require_as_many(config, field, found)
    return found


def _complete(config: Config) -> Config:
    if "mamba" not in _kinds(config) or config["mamba_d_head"] != "auto":
        return config
    inner = require(config, "hidden_size") * require(config, "mamba_expand")
    what = "mamba_expand times hidden_size by mamba_n_heads"
    return {**config, "mamba_d_head": divide(inner, require(config, "mamba_n_heads"), what)}


def _kinds(config: Config) -> list[str]:
    second = "moe" if config["num_local_experts"] else "mlp"
    return [kind for name in _layer_types(config) for kind in (_KIND_OF_LAYER_TYPE[name], second)]


def _finish(config: dict[str, Any], source: Config, architecture: Architecture) -> dict[str, Any]:
    name_of_kind = {_KIND_OF_LAYER_TYPE[name]: name for name in _layer_types(source)}
    firsts = [architecture.layers[block[0]] for block in architecture.blocks]
    config["layer_types"] = [name_of_kind[layer.kind] for layer in firsts]
    for layer in firsts:
        if layer.kind == "mamba":
            inner = layer.sizes["ssm_head"] * layer.sizes["ssm_head_channel"]
            config["mamba_expand"] = _expand(inner, architecture.hidden)
    return config


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
        modules=replace(PAIRED_MODULES, inner={"router.layer": "router"}),
        kinds=_kinds,
        fields={
            **PAIRED.fields,
            "mamba": {
                "ssm_head": "mamba_n_heads",
                "ssm_head_channel": "mamba_d_head",
                "ssm_group": "mamba_n_groups",
                "ssm_state": "mamba_d_state",
                "conv_kernel": "mamba_d_conv",
            },
            "mlp": {"ffn": "shared_intermediate_size"},
            "moe": {
                "expert_ffn": "intermediate_size",
                "expert": "num_local_experts",
                "shared_ffn": "shared_intermediate_size",
                **ROUTED_AXES,
            },
        },
        options={
            "mamba": {"bias": "mamba_proj_bias", "conv_bias": "mamba_conv_bias"},
            "attention": {"bias": "attention_bias"},
            "mlp": {"gated": True, "fused_gate": True},
            **_EXPERT_OPTIONS,
        },
        defaults={
            "mamba_d_head": "auto",
            "mamba_expand": 2,
            "mamba_conv_bias": True,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 1,
        },
        only={"hidden_act": "silu"},
        drops=(*STALE_KEYS, "layers_block_type"),
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
        complete=_complete,
        finish=_finish,
        head_dim_derived_by=("vLLM", "mlx-lm"),
        tiny_config=_TINY_CONFIG,
        # As in the files of the published models: older names, and attention without positions.
        tiny_variants={
            "nope": {
                **_TINY_CONFIG,
                "layer_types": ["mamba", "attention", "mamba"],
                "num_hidden_layers": 3,
                "position_embedding_type": "nope",
                "mamba_n_groups": 1,
            },
            "moe": {
                **_TINY_CONFIG,
                "layer_types": ["mamba", "attention", "mamba"],
                "num_hidden_layers": 3,
                "intermediate_size": 32,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
        },
    ),
)
