"""The table of model families: how each maps config.json to an Architecture and back, and how its layers run.

A family is one module of this package that defines ``FAMILIES``, and ``COMPOSITES`` for models around such a language
model. Adding one means adding such a file; parameter
counts, memory, scores, search, cuts and exports work from the Architecture that it reads.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from minipuzzle.architecture.configs.composite import Composite
from minipuzzle.architecture.configs.family import Config, Family, ModulePaths
from minipuzzle.architecture.configs.per_layer import PER_LAYER_MODEL_TYPE, base_config, per_layer_family
from minipuzzle.architecture.model import Architecture
from minipuzzle.table import Table

__all__ = ["COMPOSITES", "FAMILIES", "Config", "Family", "ModulePaths", "family_of", "read_architecture"]


def _entries(name: str) -> Iterator[Any]:
    for module in pkgutil.iter_modules(__path__):
        yield from getattr(importlib.import_module(f"{__name__}.{module.name}"), name, ())


FAMILIES: Table[Family] = Table("model type", "families", entries={f.model_type: f for f in _entries("FAMILIES")})
COMPOSITES: Table[Composite] = Table(
    "model type", "composites", entries={composite.model_type: composite for composite in _entries("COMPOSITES")}
)


def family_of(config: Config) -> Family:
    """The family of a config.json.

    Raises: MinipuzzleError for an unknown ``model_type``, with the nearest names.
    """
    base = base_config(config)
    model_type: Any = base.get("model_type")
    if model_type in COMPOSITES:
        family: Family = _composite_family(COMPOSITES[model_type], base)
    else:
        FAMILIES.check(model_type)
        family = FAMILIES[model_type]
    is_per_layer = config.get("model_type") == PER_LAYER_MODEL_TYPE
    return per_layer_family(family) if is_per_layer else family


def _composite_family(composite: Composite, config: Config) -> Family:
    text_type = composite.text_config(config)["model_type"]
    FAMILIES.check(text_type)
    return composite.around(FAMILIES[text_type])


def read_architecture(config: Config) -> Architecture:
    """The architecture that a config.json describes."""
    return family_of(config).read(config)
