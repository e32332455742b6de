"""qwen3: like Llama, with RMS norms on the queries and keys of each head (arXiv 2505.09388)."""

from __future__ import annotations

from minipuzzle.architecture.configs.family import Config
from minipuzzle.architecture.configs.paired import TINY_CONFIG, paired_family, windows_by_layer_type

_HEAD_DIM = 128  # where config.json is silent


def _options(config: Config) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset({"qk_norm", "bias"} if config.get("attention_bias") else {"qk_norm"}), frozenset({"gated"})


FAMILIES = (
    paired_family(
        "qwen3",
        "Qwen3ForCausalLM",
        options=_options,
        windows=windows_by_layer_type,
        head_dim=_HEAD_DIM,
        tiny_config={**TINY_CONFIG, "head_dim": 16},
    ),
)
