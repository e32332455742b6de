"""gpt_oss: experts with biases and a clamped gate, attention with a sink for each head that slides in every other block
(arXiv 2508.10925)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.experts import ROUTED_AXES, WITH_EXPERTS, tiny_experts
from minipuzzle.architecture.configs.family import Config, require_num_layers
from minipuzzle.architecture.configs.paired import FULL, SLIDING, windows_by_layer_type, write_layer_types
from minipuzzle.architecture.model import Architecture, FusedExperts


def _complete(config: Config) -> Config:
    num_blocks = require_num_layers(config)
    types = config.get("layer_types") or [FULL if idx % 2 else SLIDING for idx in range(num_blocks)]
    return {**config, "layer_types": types, "use_sliding_window": config.get("sliding_window") is not None}


def _finish(config: dict[str, Any], source: Config, architecture: Architecture) -> dict[str, Any]:
    return write_layer_types(config, {**source, "use_sliding_window": True}, architecture)


def _fused(name: str, *roles: str) -> tuple[FusedExperts, FusedExperts]:
    weights = FusedExperts(name=f"mlp.experts.{name}", roles=roles, is_interleaved=len(roles) > 1, is_transposed=True)
    return weights, replace(weights, name=f"{weights.name}_bias", tensor="bias", is_transposed=False)


FAMILIES = (
    replace(
        WITH_EXPERTS,
        model_type="gpt_oss",
        names=replace(
            WITH_EXPERTS.names,
            roles={"moe": {"router": "router"}},
            fused=(*_fused("gate_up_proj", "expert_gate", "expert_up"), *_fused("down_proj", "expert_down")),
            is_always_fused=True,
        ),
        fields={
            "trunk": WITH_EXPERTS.fields["trunk"],
            "attention": WITH_EXPERTS.fields["attention"],
            "moe": {"expert_ffn": "intermediate_size", "expert": "num_local_experts", **ROUTED_AXES},
        },
        options={
            "attention": {"bias": "attention_bias", "sinks": True},
            "moe": {"gated": True, "softmax_router": True, "router_bias": True, "expert_bias": True},
        },
        defaults={**WITH_EXPERTS.defaults, "attention_bias": True, "head_dim": 64, "sliding_window": 128},
        complete=_complete,
        adjust=windows_by_layer_type,
        finish=_finish,
        attention="eager",
        tiny_config=tiny_experts(
            "gpt_oss", "GptOssForCausalLM", intermediate_size=32, num_local_experts=8, sliding_window=9
        ),
    ),
)
