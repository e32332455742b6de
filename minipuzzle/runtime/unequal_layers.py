"""transformers models in the per-layer layout: complete ones, of which some layers are narrower and others missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from minipuzzle.architecture.configs.per_layer import base_config
from minipuzzle.architecture.families import family_of
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.model import Architecture
from minipuzzle.runtime.meta_models import uniform_on_meta
from minipuzzle.runtime.sublayers import NoLayer


def narrow_on_meta(model: nn.Module, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Give a complete model without weights the layers of a config.json in the per-layer layout."""
    family, base = family_of(config), family_of(base_config(config))
    target, whole = family.read(config), base.read(base_config(config))
    kept = {(target.block_of(idx), layer.kind): layer for idx, layer in enumerate(target.layers)}
    donors: dict[tuple[object, ...], nn.Module] = {}
    for position, layer in enumerate(whole.layers):
        block_idx, wanted = whole.block_of(position), kept.get((whole.block_of(position), layer.kind))
        mixers, norm = base.mixer_modules(layer.kind), whole.names.mixers[layer.kind][1].removesuffix(".weight")
        path = f"{base.modules.layers}.{block_idx}"
        block = model.get_submodule(path)
        if wanted is None:
            for mixer in mixers:
                block.set_submodule(mixer, NoLayer(is_attention=layer.kind == "attention"))
            block.set_submodule(norm, nn.Identity())
            _generate_without_cache(model)
        elif wanted.sizes != layer.sizes:
            key = (layer.kind, *wanted.sizes.items(), wanted.options)
            if key not in donors:
                donors[key] = _model_of_widths(config, whole, wanted, dtype)
            for mixer in mixers:
                block.set_submodule(mixer, donors[key].get_submodule(f"{path}.{mixer}"))


def _model_of_widths(
    config: Mapping[str, Any], whole: Architecture, wanted: LayerSpec, dtype: torch.dtype
) -> nn.Module:
    """A model in which all layers of a kind are as wide as the wanted one."""
    base = base_config(config)
    layers = tuple(wanted if layer.kind == wanted.kind else layer for layer in whole.layers)
    return uniform_on_meta(family_of(base).write(base, replace(whole, layers=layers)), dtype)


def _generate_without_cache(model: nn.Module) -> None:
    """transformers counts the tokens in a cache by its first layer, which may be one that keeps none."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.use_cache = False  # type: ignore[union-attr]
