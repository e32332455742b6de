"""llama, and what is built alike: rotary attention and a gated MLP in every block (arXiv 2302.13971).

Ministral 3 scales its queries by their position (``llama_4_scaling_beta``). Mistral's attention may slide over a window
(arXiv 2310.06825), in some layers only where ``layer_types`` says so; the class that computes that is transformers'
``ministral``. Mixtral has experts in the place of MLPs (arXiv 2401.04088).
"""

from __future__ import annotations

from dataclasses import replace

from minipuzzle.architecture.configs.composite import inside_language_model
from minipuzzle.architecture.configs.experts import FUSED, ROUTED_AXES, WITH_EXPERTS, tiny_experts
from minipuzzle.architecture.configs.paired import (
    MLP_NORM,
    PAIRED,
    PAIRED_MODULES,
    one_window,
    one_window_or_by_type,
    tiny,
)

_EXPERT_MODULES = {"expert_gate": "w1", "expert_up": "w3", "expert_down": "w2"}
FAMILIES = (
    replace(
        PAIRED,
        model_type="llama",
        options={"attention": {"bias": "attention_bias"}, "mlp": {"gated": True, "bias": "mlp_bias"}},
        tiny_config=tiny("llama", "LlamaForCausalLM", tie_word_embeddings=True),
    ),
    replace(
        PAIRED,
        model_type="mistral",
        defaults={"sliding_window": 4096},
        runs_as=lambda config: "mistral" if config.get("layer_types") is None else "ministral",
        adjust=one_window_or_by_type,
        tiny_config=tiny("mistral", "MistralForCausalLM", sliding_window=9),
    ),
    replace(
        WITH_EXPERTS,
        model_type="mixtral",
        names=replace(
            WITH_EXPERTS.names,
            mixers={**WITH_EXPERTS.names.mixers, "moe": ("block_sparse_moe.", f"{MLP_NORM}.weight")},
            roles={"moe": {role: f"experts.{{unit}}.{name}" for role, name in _EXPERT_MODULES.items()}},
            fused=tuple(replace(form, name=form.name.replace("mlp", "block_sparse_moe")) for form in FUSED),
        ),
        modules=replace(PAIRED_MODULES, inner={"block_sparse_moe": "mlp"}),
        fields={
            **PAIRED.fields,
            "moe": {"expert_ffn": "intermediate_size", "expert": "num_local_experts", **ROUTED_AXES},
        },
        adjust=one_window,
        tiny_config=tiny_experts("mixtral", "MixtralForCausalLM", intermediate_size=32, num_local_experts=8),
    ),
    replace(
        PAIRED,
        model_type="ministral3",
        defaults={"head_dim": 128},
        adjust=one_window,
        tiny_config=tiny(
            "ministral3",
            "Ministral3ForCausalLM",
            head_dim=16,
            rope_parameters={
                "rope_type": "yarn",
                "type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        ),
    ),
)

COMPOSITES = (inside_language_model("mistral3", "mistral", ties_head=True, follows="multi_modal_projector.linear_"),)
