"""Feed-forward layers: sizes of the neurons."""

from __future__ import annotations

from importance.observers.base import OBSERVERS, Modules, Observe, Sums, observe_neurons
from minipuzzle.architecture.layers import LayerSpec


@OBSERVERS.register("mlp")
def observe_mlp(sums: Sums, layer_idx: int, _layer: LayerSpec, modules: Modules) -> dict[str, Observe]:
    """Of all neurons, at the input of the projection back."""
    return {modules["down"][0]: observe_neurons(sums, "ffn", layer_idx)}
