"""llama, and what is built alike: rotary attention and a gated MLP in every block (arXiv 2302.13971).

Mistral's attention may slide over a window (arXiv 2310.06825), in some layers only where ``layer_types`` says so; the
class that computes that is transformers' ``ministral``.
"""

from __future__ import annotations

from dataclasses import replace

from minipuzzle.architecture.configs.paired import PAIRED, one_window_or_by_type, tiny

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
)
