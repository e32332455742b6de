"""qwen2: like Llama, with biases on queries, keys and values, and a window in the upper blocks if asked for
(arXiv 2407.10671)."""

from __future__ import annotations

from minipuzzle.architecture.configs.family import Config
from minipuzzle.architecture.configs.paired import TINY_CONFIG, paired_family, windows_by_layer_type


def _options(_config: Config) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset({"qkv_bias"}), frozenset({"gated"})


FAMILIES = (
    paired_family(
        "qwen2",
        "Qwen2ForCausalLM",
        options=_options,
        windows=windows_by_layer_type,
        tiny_config={
            **TINY_CONFIG,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ),
)
