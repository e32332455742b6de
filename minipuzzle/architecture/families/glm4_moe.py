"""glm4_moe: GLM-4.5 and its successors: MLPs in the first blocks, then experts behind a router of sigmoids, and one
that serves all tokens (arXiv 2508.06471)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.experts import WITH_EXPERTS, dense_blocks, dense_or_experts, tiny_experts
from minipuzzle.architecture.configs.family import Config, require, require_num_layers
from minipuzzle.architecture.configs.paired import PAIRED_MODULES, STALE_KEYS
from minipuzzle.architecture.model import Architecture
from minipuzzle.errors import MinipuzzleError

_SHARED = "shared_expert_size"  # no field of theirs: the shared expert is as wide as so many routed ones


def _complete(config: Config) -> Config:
    if _kinds(config)[-1] == "mlp":
        return config
    return {**config, _SHARED: require(config, "moe_intermediate_size") * require(config, "n_shared_experts")}


def _is_dense(config: Config) -> list[bool]:
    num_dense = config.get("first_k_dense_replace") or 0
    return [block_idx < num_dense for block_idx in range(require_num_layers(config))]


_kinds = dense_or_experts(_is_dense)


def _finish(config: dict[str, Any], _source: Config, architecture: Architecture) -> dict[str, Any]:
    shared = config.pop(_SHARED, None)
    if shared is not None:
        if shared % config["moe_intermediate_size"]:
            raise MinipuzzleError(
                f"shared_ffn ({shared}) must be a multiple of expert_ffn ({config['moe_intermediate_size']}) here",
                "cut shared_ffn and expert_ffn together so that they divide",
            )
        config["n_shared_experts"] = shared // config["moe_intermediate_size"]
    return {**config, "first_k_dense_replace": len(dense_blocks(architecture)), "num_nextn_predict_layers": 0}


FAMILIES = (
    replace(
        WITH_EXPERTS,
        model_type="glm4_moe",
        # The layer behind the last predicts a second token.
        modules=replace(PAIRED_MODULES, ignored="model.layers.{num_hidden_layers}."),
        kinds=_kinds,
        fields={
            **WITH_EXPERTS.fields,
            "moe": {**WITH_EXPERTS.fields["moe"], "expert": "n_routed_experts", "shared_ffn": _SHARED},
        },
        options={
            "attention": {"qkv_bias": "attention_bias", "qk_norm": "use_qk_norm"},
            "mlp": {"gated": True},
            "moe": {"gated": True},
        },
        defaults={**WITH_EXPERTS.defaults, "n_shared_experts": 1, "first_k_dense_replace": 1},
        drops=(*STALE_KEYS, "num_mtp_layers"),
        complete=_complete,
        finish=_finish,
        tiny_config=tiny_experts(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            n_routed_experts=8,
            n_shared_experts=2,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            use_qk_norm=True,
            attention_bias=True,
            partial_rotary_factor=0.5,
        ),
    ),
)
