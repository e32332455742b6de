"""nemotron: Nemotron-4, with squared ReLU, LayerNorm1P and rotary embeddings on half of each head (arXiv 2402.16819).

LayerNorm1P stores its weight minus one. It subtracts the mean, so on the hidden axis a unit is silent where it equals
the mean of all, and the correction of a cut norm uses mean squares around the mean.
"""

from __future__ import annotations

from minipuzzle.architecture.configs.family import Config
from minipuzzle.architecture.configs.paired import TINY_CONFIG, paired_family
from minipuzzle.architecture.layers import NormSpec


def _options(config: Config) -> tuple[frozenset[str], frozenset[str]]:
    attention = frozenset({"bias"} if config.get("attention_bias") else ())
    return attention, frozenset({"bias"} if config.get("mlp_bias") else ())


_TINY_CONFIG = {key: value for key, value in TINY_CONFIG.items() if key != "rms_norm_eps"}

FAMILIES = (
    paired_family(
        "nemotron",
        "NemotronForCausalLM",
        options=_options,
        activation="relu2",
        norm=NormSpec(has_bias=True, is_centered=True, weight_offset=1.0),
        tiny_config={**_TINY_CONFIG, "hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    ),
)
