"""transformers models with shapes and no weights: what everything else is built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from minipuzzle.architecture.configs.per_layer import base_config
from minipuzzle.architecture.families import family_of


def uniform_on_meta(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model of a config.json, or the complete one that a per-layer config.json begins with, on meta tensors.

    Its tables of positions are there: they come from the config, not from weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    base = base_config(config)
    settings = {key: value for key, value in base.items() if key not in ("model_type", "quantization_config")}
    hf_config = AutoConfig.for_model(base["model_type"], **settings)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="sdpa")
    family = family_of(config)
    family.unpack(model)
    rotary = dict(model.named_modules()).get(family.modules.rotary)
    if family.modules.rotary and rotary is not None:
        model.set_submodule(family.modules.rotary, type(rotary)(model.config))
    return model
