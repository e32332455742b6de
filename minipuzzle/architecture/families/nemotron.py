"""nemotron: Nemotron-4, with squared ReLU, LayerNorm1P and rotary embeddings on half of each head (arXiv 2402.16819).

LayerNorm1P stores its weight minus one. It subtracts the mean, so on the hidden axis a unit is silent where it equals
the mean of all, and the correction of a cut norm uses mean squares around the mean.
"""

from __future__ import annotations

from dataclasses import replace

from minipuzzle.architecture.configs.paired import PAIRED, PAIRED_NAMES, tiny
from minipuzzle.architecture.layers import NormSpec

_TINY_CONFIG = tiny("nemotron", "NemotronForCausalLM", hidden_act="relu2", norm_eps=1e-5, partial_rotary_factor=0.5)

FAMILIES = (
    replace(
        PAIRED,
        model_type="nemotron",
        names=replace(PAIRED_NAMES, norm=NormSpec(has_bias=True, is_centered=True, weight_offset=1.0)),
        options={"attention": {"bias": "attention_bias"}, "mlp": {"bias": "mlp_bias"}},
        only={"hidden_act": "relu2"},
        tiny_config={key: value for key, value in _TINY_CONFIG.items() if key != "rms_norm_eps"},
    ),
)
