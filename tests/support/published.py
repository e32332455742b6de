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
_GLM = {
    "vocab_size": 151552,
    "head_dim": 128,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "use_qk_norm": False,
}
_GPT_OSS = {"vocab_size": 201088, "head_dim": 64, "num_experts_per_tok": 4, "sliding_window": 128}
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
    # Files of both hold a layer more, which predicts a second token: 110,468,824,832 and 358,337,791,296 in all.
    "GLM-4.5-Air": (
        "glm4_moe",
        {**_GLM, **_sizes(46, 4096, 10944, 96, 8), "moe_intermediate_size": 1408},
        106_852_251_264,
        13_424_129_664,
    ),
    "GLM-4.5": (
        "glm4_moe",
        {
            **_GLM,
            **_sizes(92, 5120, 12288, 96, 8),
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "first_k_dense_replace": 3,
            "use_qk_norm": True,
        },
        352_797_829_024,
        33_632_266_144,
    ),
    # The model card counts 3.61 B and 5.13 B active ones, which leave out the 0.58 B of the embeddings.
    "gpt-oss-20b": (
        "gpt_oss",
        {**_GPT_OSS, **_sizes(24, 2880, 2880, 64, 8), "num_local_experts": 32},
        20_914_757_184,
        4_187_440_704,
    ),
    "gpt-oss-120b": (
        "gpt_oss",
        {**_GPT_OSS, **_sizes(36, 2880, 2880, 64, 8), "num_local_experts": 128},
        116_829_156_672,
        5_711_982_912,
    ),
}


def published_config(name: str) -> dict[str, Any]:
    """config.json of a published model, as far as it shapes what is computed."""
    model_type, fields, _all, _active = PUBLISHED[name]
    tiny = {key: value for key, value in FAMILIES[model_type].tiny_config.items() if key not in _OF_TESTS}
    return {**tiny, **fields}
