"""Published models: what their config.json says of sizes, their parameters, and those that one token uses."""

from __future__ import annotations

from typing import Any

from minipuzzle.architecture.families import FAMILIES

_OF_TESTS = ("head_dim", "mlp_only_layers")  # fields of tiny configs that published ones do not have


def _sizes(blocks: int, hidden: int, ffn: int, queries: int, groups: int) -> dict[str, int]:
    fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return dict(zip(fields, (blocks, hidden, ffn, queries, groups), strict=True))


_QWEN3_MOE = {"vocab_size": 151936, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
_MIXTRAL = {"vocab_size": 32000, "num_local_experts": 8}
_GRANITE = {
    "vocab_size": 100352,
    "num_hidden_layers": 40,
    "layer_types": ["attention" if idx in (5, 15, 25, 35) else "mamba" for idx in range(40)],
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
}
# name: (model type, fields, all parameters, active ones)
PUBLISHED: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {**_QWEN3_MOE, **_sizes(48, 2048, 6144, 32, 4), "moe_intermediate_size": 768},
        30_532_122_624,
        3_353_032_704,
    ),
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        {**_QWEN3_MOE, **_sizes(94, 4096, 12288, 64, 4), "moe_intermediate_size": 1536},
        235_093_634_560,
        22_190_763_520,
    ),
    "Qwen3-Coder-480B-A35B": (
        "qwen3_moe",
        {**_QWEN3_MOE, **_sizes(62, 6144, 8192, 96, 8), "moe_intermediate_size": 2560, "num_experts": 160},
        480_154_875_392,
        35_474_765_312,
    ),
    "Mixtral-8x7B": ("mixtral", {**_MIXTRAL, **_sizes(32, 4096, 14336, 32, 8)}, 46_702_792_704, 12_879_925_248),
    "Mixtral-8x22B": ("mixtral", {**_MIXTRAL, **_sizes(56, 6144, 16384, 48, 8)}, 140_620_634_112, 39_152_031_744),
    "granite-4.0-h-tiny": (
        "granitemoehybrid",
        {
            **_GRANITE,
            **_sizes(40, 1536, 512, 12, 4),
            "mamba_n_heads": 48,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "shared_intermediate_size": 1024,
        },
        6_939_037_248,
        1_465_470_528,
    ),
    "granite-4.0-h-small": (
        "granitemoehybrid",
        {
            **_GRANITE,
            **_sizes(40, 4096, 768, 32, 8),
            "mamba_n_heads": 128,
            "num_local_experts": 72,
            "num_experts_per_tok": 10,
            "shared_intermediate_size": 1536,
        },
        32_207_337_984,
        8_803_115_904,
    ),
}


def published_config(name: str) -> dict[str, Any]:
    """config.json of a published model, as far as it shapes what is computed."""
    model_type, fields, _all, _active = PUBLISHED[name]
    tiny = {key: value for key, value in FAMILIES[model_type].tiny_config.items() if key not in _OF_TESTS}
    return {**tiny, **fields}
