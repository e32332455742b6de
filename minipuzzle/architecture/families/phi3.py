"""phi3: like Llama, with queries, keys and values in one matrix, and gate and input in another (arXiv 2404.14219)."""

from __future__ import annotations

from dataclasses import replace

from minipuzzle.architecture.configs.family import Config, require_one_of
from minipuzzle.architecture.configs.paired import PAIRED, one_window, tiny


def _without_longrope(config: Config) -> Config:
    # Its factors are as many as transformers takes half a head to be wide, which a cut of groups would change.
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        kind = f"{name}.rope_type"
        require_one_of({kind: rope.get("rope_type", rope.get("type", "default"))}, kind, ("default",), "")
    return config


FAMILIES = (
    replace(
        PAIRED,
        model_type="phi3",
        options={"attention": {"fused_qkv": True}, "mlp": {"gated": True, "fused_gate": True}},
        complete=_without_longrope,
        adjust=one_window,
        head_dim_derived_by=("mlx-lm",),
        tiny_config=tiny("phi3", "Phi3ForCausalLM", partial_rotary_factor=0.5, sliding_window=9),
    ),
)
