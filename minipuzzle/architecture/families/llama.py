"""llama, and what is built alike: rotary attention and a gated MLP in every block (arXiv 2302.13971).

Mistral's attention may slide over a window (arXiv 2310.06825).
"""

from __future__ import annotations

from minipuzzle.architecture.configs.family import Config, require
from minipuzzle.architecture.configs.paired import TINY_CONFIG, paired_family

_MISTRAL_WINDOW = 4096  # where config.json is silent; null means none


def _llama_options(config: Config) -> tuple[frozenset[str], frozenset[str]]:
    attention = frozenset({"bias"} if config.get("attention_bias") else ())
    return attention, frozenset({"gated", "bias"} if config.get("mlp_bias") else {"gated"})


def _mistral_options(_config: Config) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset(), frozenset({"gated"})


def _mistral_windows(config: Config) -> list[int | None]:
    with_default = {"sliding_window": _MISTRAL_WINDOW, **config}
    window = None if with_default["sliding_window"] is None else require(with_default, "sliding_window")
    return [window] * require(config, "num_hidden_layers")


FAMILIES = (
    paired_family(
        "llama", "LlamaForCausalLM", options=_llama_options, tiny_config={**TINY_CONFIG, "tie_word_embeddings": True}
    ),
    paired_family(
        "mistral",
        "MistralForCausalLM",
        options=_mistral_options,
        windows=_mistral_windows,
        tiny_config={**TINY_CONFIG, "sliding_window": 9},
    ),
)
