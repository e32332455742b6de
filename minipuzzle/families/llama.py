"""llama: attention with rotary embeddings and a gated MLP in every block (arXiv 2302.13971)."""

from __future__ import annotations

from minipuzzle.families.base import Config
from minipuzzle.families.paired import TINY_CONFIG, paired_family


def _options(config: Config) -> tuple[frozenset[str], frozenset[str]]:
    attention = frozenset({"bias"} if config.get("attention_bias") else ())
    return attention, frozenset({"gated", "bias"} if config.get("mlp_bias") else {"gated"})


FAMILIES = (
    paired_family(
        "llama", "LlamaForCausalLM", options=_options, tiny_config={**TINY_CONFIG, "tie_word_embeddings": True}
    ),
)
