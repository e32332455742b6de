"""qwen2: like Llama, with biases on queries, keys and values, and a window in the upper blocks if asked for
(arXiv 2407.10671). qwen3: with RMS norms on the queries and keys of each head; qwen3_moe: with experts in the place of
all or some MLPs (arXiv 2505.09388)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.experts import WITH_EXPERTS, dense_blocks, dense_or_experts, tiny_experts
from minipuzzle.architecture.configs.family import Config, require, require_num_layers
from minipuzzle.architecture.configs.paired import PAIRED, tiny, windows_by_layer_type, write_layer_types
from minipuzzle.architecture.model import Architecture


def _is_dense(config: Config) -> list[bool]:
    named, step = config.get("mlp_only_layers") or (), require(config, "decoder_sparse_step")
    return [idx in named or (idx + 1) % step != 0 for idx in range(require_num_layers(config))]


def _complete(config: Config) -> Config:
    """With the older of two names that transformers has for the number of experts, which all engines read."""
    return {**config, "num_experts": config.get("num_experts") or config.get(_NEW_NAME)}


def _name_dense_blocks(config: dict[str, Any], source: Config, architecture: Architecture) -> dict[str, Any]:
    written = {"mlp_only_layers": dense_blocks(architecture), "decoder_sparse_step": 1}
    return {**write_layer_types(config, source, architecture), **written}


_NEW_NAME = "num_local_experts"
_QWEN = replace(PAIRED, adjust=windows_by_layer_type)
_QWEN3: dict[str, dict[str, str | bool]] = {"attention": {"qk_norm": True, "bias": "attention_bias"}}
FAMILIES = (
    replace(
        _QWEN,
        model_type="qwen2",
        options={"attention": {"qkv_bias": True}, "mlp": {"gated": True}},
        head_dim_derived_by=("vLLM", "mlx-lm"),
        tiny_config=tiny(
            "qwen2",
            "Qwen2ForCausalLM",
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=9,
            max_window_layers=1,
        ),
    ),
    replace(
        _QWEN,
        model_type="qwen3",
        options={**_QWEN3, "mlp": {"gated": True}},
        defaults={"head_dim": 128},
        tiny_config=tiny("qwen3", "Qwen3ForCausalLM", head_dim=16),
    ),
    replace(
        WITH_EXPERTS,
        model_type="qwen3_moe",
        kinds=dense_or_experts(_is_dense),
        options={**WITH_EXPERTS.options, **_QWEN3},
        defaults={**WITH_EXPERTS.defaults, "decoder_sparse_step": 1},
        drops=(*PAIRED.drops, _NEW_NAME),
        complete=_complete,
        finish=_name_dense_blocks,
        tiny_config=tiny_experts(
            "qwen3_moe", "Qwen3MoeForCausalLM", num_experts=8, mlp_only_layers=[1], norm_topk_prob=True
        ),
    ),
)
