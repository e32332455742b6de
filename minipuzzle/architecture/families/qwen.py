"""qwen2: like Llama, with biases on queries, keys and values, and a window in the upper blocks if asked for
(arXiv 2407.10671). qwen3: with RMS norms on the queries and keys of each head (arXiv 2505.09388)."""

from __future__ import annotations

from dataclasses import replace

from minipuzzle.architecture.configs.paired import PAIRED, tiny, windows_by_layer_type

_QWEN = replace(PAIRED, adjust=windows_by_layer_type)
FAMILIES = (
    replace(
        _QWEN,
        model_type="qwen2",
        options={"attention": {"qkv_bias": True}, "mlp": {"gated": True}},
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
        options={"attention": {"qk_norm": True, "bias": "attention_bias"}, "mlp": {"gated": True}},
        defaults={"head_dim": 128},
        tiny_config=tiny("qwen3", "Qwen3ForCausalLM", head_dim=16),
    ),
)
