"""nemotron_h: Mamba-2, attention, MLP and mixture-of-experts layers, one a block (arXiv 2504.03624, 2512.20848)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minipuzzle.architecture.configs.family import (
    Config,
    Family,
    ModulePaths,
    divide,
    require,
    require_one_of,
    uniform_sizes,
)
from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.model import Architecture, TensorNames
from minipuzzle.errors import MinipuzzleError

_NAMES = TensorNames(
    block_prefix="backbone.layers.{block_idx}.",
    mixers=dict.fromkeys(LAYER_KINDS, ("mixer.", "norm.weight")),
    embeddings="backbone.embeddings.weight",
    final_norm="backbone.norm_f.weight",
    head="lm_head.weight",
    # vLLM does not look at tie_word_embeddings here and computes garbage from a missing head.
    ties_head=False,
)
_FIELDS = {
    "trunk": {"hidden": "hidden_size"},
    "mamba": {
        "ssm_head": "mamba_num_heads",
        "ssm_head_channel": "mamba_head_dim",
        "ssm_group": "n_groups",
        "ssm_state": "ssm_state_size",
        "conv_kernel": "conv_kernel",
    },
    "attention": {"kv_group": "num_key_value_heads", "head_dim": "head_dim"},
    "mlp": {"ffn": "intermediate_size"},
    "moe": {
        "expert": "n_routed_experts",
        "expert_group": "n_group",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn": "moe_intermediate_size",
        "shared_ffn": "moe_shared_expert_intermediate_size",
        "latent": "moe_latent_size",
    },
}
_KIND_OF_SYMBOL = {kind.symbol: kind.name for kind in LAYER_KINDS.values()}
_KIND_OF_BLOCK_TYPE = {
    "linear_attention": "mamba",
    "mamba": "mamba",
    "full_attention": "attention",
    "attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
# Keys that make engines misread a dense cut model. transformers adds the MoE defaults to any file it saves, and
# llama.cpp then builds an MoE; SGLang and vLLM <= 0.31 reject layers_block_type; Infinity is not JSON.
_UNPORTABLE_KEYS = (
    "layers_block_type",
    "layer_types",
    "mtp_layers_block_type",
    "mtp_hybrid_override_pattern",
    "num_nextn_predict_layers",
    "time_step_limit",
    "auto_map",
    "_name_or_path",
    "transformers_version",
    "quantization_config",
    "num_local_experts",
)
_MOE_KEYS = (
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_overlap",
    "routed_scaling_factor",
    "norm_topk_prob",
    "n_group",
    "topk_group",
    "output_router_logits",
)


def _kinds(config: Config) -> list[str]:
    if "hybrid_override_pattern" in config:
        table, found = _KIND_OF_SYMBOL, list(config["hybrid_override_pattern"])
    else:
        table, found = _KIND_OF_BLOCK_TYPE, list(config.get("layers_block_type") or config.get("layer_types") or ())
    if not found:
        raise MinipuzzleError("config.json names no layers", "it needs hybrid_override_pattern or layers_block_type")
    for layer_idx, block_type in enumerate(found):
        if block_type not in table:
            raise MinipuzzleError(
                f"layer {layer_idx} has the unsupported type {block_type!r}",
                f"supported here: {', '.join(table)}",
            )
    return [table[block_type] for block_type in found]


def _layer(kind: str, config: Config) -> LayerSpec:
    hidden = require(config, "hidden_size")
    if kind == "mamba":
        heads, groups = require(config, "mamba_num_heads"), require(config, "n_groups")
        divide(heads, groups, "mamba_num_heads by n_groups")
        sizes = {
            "ssm_head": heads,
            "ssm_head_channel": require(config, "mamba_head_dim"),
            "ssm_group": groups,
            "ssm_state": require(config, "ssm_state_size"),
            "conv_kernel": require(config, "conv_kernel"),
        }
        # transformers builds in_proj and out_proj with use_bias; mamba_proj_bias is read by other engines.
        flags = {"bias": config.get("use_bias", False), "conv_bias": config.get("use_conv_bias", True)}
    elif kind == "attention":
        queries, kv_groups = require(config, "num_attention_heads"), require(config, "num_key_value_heads")
        head_dim = config.get("head_dim") or config.get("attention_head_dim")
        sizes = {
            "kv_group": kv_groups,
            "queries_per_group": divide(queries, kv_groups, "num_attention_heads by num_key_value_heads"),
            "head_dim": int(head_dim) if head_dim else divide(hidden, queries, "hidden_size by num_attention_heads"),
        }
        if config.get("attention_bias"):
            raise MinipuzzleError("config.json: attention_bias is not supported", "transformers ignores it, too")
        flags = {}
    elif kind == "moe":
        sizes, flags = _moe_sizes(config), {"bias": config.get("mlp_bias", False)}
    else:
        sizes, flags = {"ffn": require(config, "intermediate_size")}, {"bias": config.get("mlp_bias", False)}
    options = frozenset(name for name, is_on in flags.items() if is_on)
    return LayerSpec(kind=kind, sizes={"hidden": hidden, **sizes}, options=options)


def _moe_sizes(config: Config) -> dict[str, int]:
    experts, groups = require(config, "n_routed_experts"), require({"n_group": 1, **config}, "n_group")
    divide(experts, groups, "n_routed_experts by n_group")
    sizes = {
        "expert": experts,
        "expert_group": groups,
        "experts_per_token": require(config, "num_experts_per_tok"),
        "expert_ffn": require(config, "moe_intermediate_size"),
        "shared_ffn": require(config, "moe_shared_expert_intermediate_size"),
    }
    if config.get("moe_latent_size") is not None:
        sizes["latent"] = require(config, "moe_latent_size")
    return sizes


_PRECISION_OF_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _ssm_state_precision(config: Config) -> str:
    dtype = config.get("mamba_ssm_cache_dtype") or "float32"
    if dtype not in _PRECISION_OF_DTYPE:
        raise MinipuzzleError(
            f"config.json: mamba_ssm_cache_dtype is {dtype!r}", f"use one of {', '.join(_PRECISION_OF_DTYPE)}"
        )
    return _PRECISION_OF_DTYPE[dtype]


def _read(config: Config) -> Architecture:
    require_one_of(config, "mlp_hidden_act", ("relu2",), "relu2")
    require_one_of(config, "mamba_hidden_act", ("silu",), "silu")
    return Architecture(
        model_type="nemotron_h",
        layers=tuple(_layer(kind, config) for kind in _kinds(config)),
        hidden=require(config, "hidden_size"),
        vocabulary=require(config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        names=_NAMES,
        ssm_state_precision=_ssm_state_precision(config),
    )


def _write(source: Config, architecture: Architecture) -> dict[str, Any]:
    moe = uniform_sizes(architecture, "moe")
    left_out = _UNPORTABLE_KEYS if moe else (*_UNPORTABLE_KEYS, *_MOE_KEYS)
    config = {key: value for key, value in source.items() if key not in left_out}
    config |= {
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": architecture.pattern,
        "num_hidden_layers": len(architecture.layers),
        "hidden_size": architecture.hidden,
        "tie_word_embeddings": False,
    }
    if mamba := uniform_sizes(architecture, "mamba"):
        config |= {"mamba_num_heads": mamba["ssm_head"], "mamba_head_dim": mamba["ssm_head_channel"]}
    if attention := uniform_sizes(architecture, "attention"):
        config |= {
            "num_attention_heads": attention["kv_group"] * attention["queries_per_group"],
            "num_key_value_heads": attention["kv_group"],
            "head_dim": attention["head_dim"],
        }
    if mlp := uniform_sizes(architecture, "mlp"):
        config["intermediate_size"] = mlp["ffn"]
    if moe:
        _check_routing(moe, source)
        config |= {
            "n_routed_experts": moe["expert"],
            "moe_intermediate_size": moe["expert_ffn"],
            "moe_shared_expert_intermediate_size": moe["shared_ffn"],
        }
    dtype = source.get("dtype") or source.get("torch_dtype") or "bfloat16"
    # Engines differ in which of the two names they read; keys with defaults are spelled out for mlx-lm.
    config |= {"dtype": dtype, "torch_dtype": dtype}
    defaults = {"mamba_proj_bias": False, "use_bias": False, "mlp_bias": False, "attention_bias": False}
    return {**defaults, "use_conv_bias": True, **config}


def _check_routing(moe: Mapping[str, int], source: Config) -> None:
    """The router picks the best groups by their two best experts, then experts within those."""
    per_group = moe["expert"] // moe["expert_group"]
    within_reach = per_group * source.get("topk_group", 1)
    if per_group < 2 or moe["experts_per_token"] > within_reach:
        raise MinipuzzleError(
            f"{moe['expert']} experts in {moe['expert_group']} groups are too few for a router that picks "
            f"{moe['experts_per_token']} a token",
            "keep more experts",
        )


_TINY_CONFIG: Config = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "hybrid_override_pattern": "M-M*-M-",
    "num_hidden_layers": 7,
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "mlp_hidden_act": "relu2",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "chunk_size": 16,
    "max_position_embeddings": 256,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
    "torch_dtype": "float32",
}

_NEMOTRON_H = Family(
    model_type="nemotron_h",
    names=_NAMES,
    modules=ModulePaths(
        layers="model.layers",
        embeddings="model.embeddings",
        final_norm="model.norm_f",
        head="lm_head",
        disk_prefix="backbone.",
        module_prefix="model.",
    ),
    read=_read,
    write=_write,
    fields=_FIELDS,
    tiny_config=_TINY_CONFIG,
    tiny_variants={
        "moe": {
            **_TINY_CONFIG,
            "hybrid_override_pattern": "ME*E-",
            "num_hidden_layers": 5,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "moe_latent_size": 16,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        }
    },
)

FAMILIES = (_NEMOTRON_H,)
