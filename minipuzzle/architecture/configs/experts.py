"""What families share whose decoder blocks pair attention with an MLP or with routed experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.family import Config, require_num_layers
from minipuzzle.architecture.configs.paired import MLP_NORM, PAIRED, PAIRED_NAMES, tiny
from minipuzzle.architecture.model import Architecture, FusedExperts

# transformers' own names and shapes, in files too where experts were saved together.
FUSED = (
    FusedExperts(name="mlp.experts.gate_up_proj", roles=("expert_gate", "expert_up")),
    FusedExperts(name="mlp.experts.down_proj", roles=("expert_down",)),
)
ROUTED_AXES = {"expert_group": "n_group", "experts_per_token": "num_experts_per_tok"}


def dense_or_experts(is_dense: Callable[[Config], Sequence[bool]]) -> Callable[[Config], list[str]]:
    """The kinds of layers of a config.json in which some blocks have an MLP and the others experts."""
    return lambda config: [kind for dense in is_dense(config) for kind in ("attention", "mlp" if dense else "moe")]


def all_experts(config: Config) -> list[str]:
    """Attention and experts in every block."""
    return ["attention", "moe"] * require_num_layers(config)


def dense_blocks(architecture: Architecture) -> list[int]:
    """Positions of the blocks with an MLP."""
    return [architecture.block_of(layer_idx) for layer_idx in architecture.layer_indices("mlp")]


def tiny_experts(model_type: str, class_name: str, **changes: Any) -> dict[str, Any]:
    """A config.json for tests, of eight experts of which two a token."""
    return tiny(model_type, class_name, **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, **changes})


WITH_EXPERTS = replace(
    PAIRED,
    names=replace(
        PAIRED_NAMES,
        mixers={**PAIRED_NAMES.mixers, "moe": ("mlp.", f"{MLP_NORM}.weight")},
        slots={**PAIRED_NAMES.slots, "moe": 1},
        fused=FUSED,
    ),
    kinds=all_experts,
    fields={**PAIRED.fields, "moe": {"expert_ffn": "moe_intermediate_size", "expert": "num_experts", **ROUTED_AXES}},
    options={"mlp": {"gated": True}, "moe": {"gated": True, "softmax_router": True}},
    defaults={"n_group": 1},
)
