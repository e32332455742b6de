"""nemotron_h: Mamba-2, attention, MLP and mixture-of-experts layers, one a block (arXiv 2504.03624, 2512.20848)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.family import (
    Config,
    Family,
    ModulePaths,
    require,
    require_as_many,
    require_names,
    state_precision,
    uniform_sizes,
)
from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.model import Architecture, TensorNames
from minipuzzle.errors import MinipuzzleError

_KINDS = ("mamba", "attention", "mlp", "moe")
_NAMES = TensorNames(
    block_prefix="backbone.layers.{block_idx}.",
    mixers=dict.fromkeys(_KINDS, ("mixer.", "norm.weight")),
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
    "attention": {"kv_group": "num_key_value_heads"},
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
_HEAD_DIM = 128  # where config.json is silent; in this family it does not follow from the hidden size
_KIND_OF_SYMBOL = {LAYER_KINDS[kind].symbol: kind for kind in _KINDS}
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
    fields = ("hybrid_override_pattern", "layers_block_type", "layer_types")
    field = next((name for name in fields if config.get(name) not in (None, "", [])), None)
    if field is None:
        raise MinipuzzleError("config.json names no layers", "it needs hybrid_override_pattern or layers_block_type")
    table = _KIND_OF_SYMBOL if field == fields[0] else _KIND_OF_BLOCK_TYPE
    found = require_names(config, field)
    for layer_idx, block_type in enumerate(found):
        if block_type not in table:
            raise MinipuzzleError(
                f"layer {layer_idx} has the unsupported type {block_type!r}",
                f"supported here: {', '.join(table)}",
            )
    require_as_many(config, field, found)
    return [table[block_type] for block_type in found]


def _complete(config: Config) -> Config:
    if "attention" in _kinds(config):
        require(config, "num_key_value_heads")
        if config.get("attention_bias"):
            raise MinipuzzleError("config.json: attention_bias is not supported", "transformers ignores it, too")
    given = (config[name] for name in ("head_dim", "attention_head_dim") if config.get(name) is not None)
    return {**config, "head_dim": next(given, _HEAD_DIM)}


def _adjust(config: Config, architecture: Architecture) -> Architecture:
    return replace(architecture, ssm_state_precision=state_precision(config, "mamba_ssm_cache_dtype"))


def _finish(config: dict[str, Any], _source: Config, architecture: Architecture) -> dict[str, Any]:
    if "moe" not in architecture.layer_counts:
        config = {key: value for key, value in config.items() if key not in _MOE_KEYS}
    config |= {
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": architecture.pattern,
        "tie_word_embeddings": False,
    }
    if "attention" in architecture.layer_counts:
        config["head_dim"] = uniform_sizes(architecture, "attention")["head_dim"]
    # Keys with defaults are spelled out for mlx-lm.
    defaults = {"mamba_proj_bias": False, "use_bias": False, "mlp_bias": False, "attention_bias": False}
    return {**defaults, "use_conv_bias": True, **config}


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
        # The second is what transformers 5.13 to 5.15 saved.
        other_prefixes={"model.": "backbone.", "backbone.embedding.": "backbone.embeddings."},
        ignored="mtp.",
    ),
    kinds=_kinds,
    fields=_FIELDS,
    options={
        # transformers builds in_proj and out_proj with use_bias; mamba_proj_bias is read by other engines.
        "mamba": {"bias": "use_bias", "conv_bias": "use_conv_bias"},
        "mlp": {"bias": "mlp_bias"},
        "moe": {"bias": "mlp_bias"},
    },
    defaults={"use_conv_bias": True, "n_group": 1},
    only={"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"},
    drops=_UNPORTABLE_KEYS,
    complete=_complete,
    adjust=_adjust,
    finish=_finish,
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
