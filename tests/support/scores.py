"""Architectures without weights, and random scores of them, for tests of searching."""

from __future__ import annotations

import numpy as np

from minipuzzle.architecture.families import FAMILIES, read_architecture
from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.scores import Scores


def tiny_architecture(pattern: str) -> Architecture:
    """The tiny Nemotron-H with a pattern of layers, wide enough to be narrowed."""
    config = FAMILIES["nemotron_h"].tiny_config
    layers = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    return read_architecture({**config, **layers, "intermediate_size": 64})


def random_scores(source: Architecture, seed: int = 0) -> Scores:
    """A score for each layer and each unit; silent nowhere."""
    generator = np.random.default_rng(seed)
    units = {
        f"{axis}.{idx}": generator.random(layer.sizes[axis]).astype(np.float32)
        for idx, layer in enumerate(source.layers)
        for axis in LAYER_KINDS[layer.kind].prunable_axes
    }
    energies = {f"ssm.{idx}": np.ones(32, np.float32) for idx in range(len(source.layers))}
    return Scores(layer={"mse": generator.random(len(source.layers))}, units=units, energies=energies)
