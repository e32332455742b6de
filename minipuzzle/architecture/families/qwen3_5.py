"""qwen3_5_text: dense Qwen3.5 to 3.8: gated delta nets, in every fourth block gated attention, and gated MLPs.

All norms but those of the delta nets' heads store their weight minus one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipuzzle.architecture.configs.composite import Composite
from minipuzzle.architecture.configs.family import (
    Config,
    divide,
    require,
    require_length,
    require_num_layers,
    require_one_of,
    state_precision,
)
from minipuzzle.architecture.configs.paired import ATTENTION_NORM, FULL, PAIRED, PAIRED_NAMES, tiny
from minipuzzle.architecture.layers import LayerSpec, NormSpec
from minipuzzle.architecture.model import Architecture

_LINEAR = "linear_attention"
_KIND_OF_LAYER_TYPE = {_LINEAR: "gated_delta_net", FULL: "attention"}
_HEADS_A_GROUP = "value_heads_per_key_head"  # in no file: from it and the key heads follow the value heads


def _complete(config: Config) -> Config:
    num_blocks, interval = require_num_layers(config), require(config, "full_attention_interval")
    types = config.get("layer_types") or [_LINEAR if (idx + 1) % interval else FULL for idx in range(num_blocks)]
    for block_idx, name in enumerate(require_length("layer_types", types, num_blocks)):
        require_one_of({f"layer_types[{block_idx}]": name}, f"layer_types[{block_idx}]", tuple(_KIND_OF_LAYER_TYPE), "")
    require_one_of({"attn_output_gate": str(config["attn_output_gate"])}, "attn_output_gate", ("True",), "")
    value_heads, key_heads = require(config, "linear_num_value_heads"), require(config, "linear_num_key_heads")
    per_group = divide(value_heads, key_heads, "linear_num_value_heads by linear_num_key_heads")
    return {**config, "layer_types": types, _HEADS_A_GROUP: per_group}


def _kinds(config: Config) -> list[str]:
    return [kind for name in config["layer_types"] for kind in (_KIND_OF_LAYER_TYPE[name], "mlp")]


def _adjust(config: Config, architecture: Architecture) -> Architecture:
    def gated(layer: LayerSpec) -> LayerSpec:
        return layer if layer.kind != "attention" else replace(layer, sizes={**layer.sizes, "query_and_gate": 2})

    precision = state_precision(config, "mamba_ssm_dtype")
    return replace(architecture, layers=tuple(map(gated, architecture.layers)), ssm_state_precision=precision)


def _finish(config: dict[str, Any], source: Config, architecture: Architecture) -> dict[str, Any]:
    name_of_kind = {kind: name for name, kind in _KIND_OF_LAYER_TYPE.items()}
    config["layer_types"] = [name_of_kind[architecture.layers[block[0]].kind] for block in architecture.blocks]
    if config["layer_types"] != source.get("layer_types"):
        config.pop("full_attention_interval", None)
    if (per_group := config.pop(_HEADS_A_GROUP, None)) is not None:
        config["linear_num_value_heads"] = per_group * config["linear_num_key_heads"]
    return config


FAMILIES = (
    replace(
        PAIRED,
        model_type="qwen3_5_text",
        names=replace(
            PAIRED_NAMES,
            mixers={"gated_delta_net": ("linear_attn.", f"{ATTENTION_NORM}.weight"), **PAIRED_NAMES.mixers},
            slots={"gated_delta_net": 0, **PAIRED_NAMES.slots},
            norm=NormSpec(weight_offset=1.0),
        ),
        kinds=_kinds,
        fields={
            **PAIRED.fields,
            "gated_delta_net": {
                "gdn_key_group": "linear_num_key_heads",
                "gdn_value_head": _HEADS_A_GROUP,
                "gdn_key_channel": "linear_key_head_dim",
                "gdn_value_channel": "linear_value_head_dim",
                "conv_kernel": "linear_conv_kernel_dim",
            },
        },
        options={"attention": {"qk_norm": True, "bias": "attention_bias"}, "mlp": {"gated": True}},
        defaults={
            "head_dim": 256,
            "full_attention_interval": 4,
            "attn_output_gate": True,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
        },
        modules=replace(PAIRED.modules, ignored="mtp."),
        complete=_complete,
        adjust=_adjust,
        finish=_finish,
        tiny_config=tiny(
            "qwen3_5_text",
            "Qwen3_5ForCausalLM",
            layer_types=[_LINEAR, FULL, _LINEAR],
            head_dim=16,
            linear_num_key_heads=4,
            linear_num_value_heads=8,
            linear_key_head_dim=8,
            linear_value_head_dim=16,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        ),
    ),
)

# Its vision tower, and a head that predicts several tokens: a block of the language model's widths.
COMPOSITES = (
    Composite(
        model_type="qwen3_5",
        text_model_type="qwen3_5_text",
        ties_head=False,
        follows={"model.visual.merger.linear_fc2.": "hidden"},
        dispensable={"mtp.": (frozenset({"hidden", "ffn", "kv_group"}), "mtp_num_hidden_layers")},
    ),
)
