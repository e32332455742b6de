"""transformers models with shapes and no weights: what everything else is built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from minipuzzle.architecture.configs.per_layer import base_config
from minipuzzle.architecture.families import family_of, read_architecture
from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.errors import MinipuzzleError
from minipuzzle.runtime.experts import SplitExperts
from minipuzzle.runtime.mamba_scan import fast_mamba2


def transformers_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration of a config.json, by its own rules for every field. The one place that makes it.

    Raises: MinipuzzleError with the field that transformers refuses.
    """
    from transformers import AutoConfig

    base, runs_as = family_of(config).language_config(config), family_of(config).runs_as
    settings = {key: value for key, value in base.items() if key not in ("model_type", "quantization_config")}
    try:
        return AutoConfig.for_model(runs_as(base) if runs_as else base["model_type"], **settings)
    except Exception as error:  # its checks raise classes of several libraries
        raise _refused(error) from error


def _refused(error: Exception) -> MinipuzzleError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return MinipuzzleError(f"config.json: transformers refuses it: {' '.join(lines)[:400]}", "correct the file")


def uniform_on_meta(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model of a config.json, or the complete one that a per-layer config.json begins with, on meta tensors.

    Its tables of positions are there: they come from the config, not from weights. Its layers are prepared.
    """
    from transformers import AutoModelForCausalLM

    hf_config = transformers_config(config)
    family = family_of(config)
    if dtype == torch.float64:
        hf_config._experts_implementation = "eager"  # joint products of experts know no float64
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, attn_implementation=family.attention
            )
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise _refused(error) from error
    prepare_layers(model, base_config(config))
    rotary = dict(model.named_modules()).get(family.modules.rotary)
    if family.modules.rotary and rotary is not None:
        model.set_submodule(family.modules.rotary, type(rotary)(model.config))
    return model


def prepare_layers(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Let each layer of a transformers model compute what serving engines compute, as its kind asks for."""
    architecture, modules = read_architecture(config), family_of(config).modules
    for layer_idx, layer in enumerate(architecture.layers):
        prefix = architecture.names.block(architecture.block_of(layer_idx)) + architecture.names.mixers[layer.kind][0]
        path = modules.module_name(prefix).rstrip(".")
        if layer.kind == "mamba":
            # transformers clamps Nemotron-H's dt at time_step_min, which serves initialisation; no engine and no kernel
            # does.
            model.set_submodule(path, fast_mamba2(model.get_submodule(path), time_step_limit=(0.0, float("inf"))))
        elif layer.kind == "moe":
            roles = LAYER_KINDS["moe"].unit_modules(layer, architecture.names.roles.get("moe"))
            experts = modules.module_name(prefix + roles["expert_down"]).partition(".{unit}")[0]
            names = {role: name.rpartition(".")[2] for role, name in roles.items()}
            model.set_submodule(experts, SplitExperts(model.get_submodule(experts), names))
