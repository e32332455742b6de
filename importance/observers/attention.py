"""Attention: what each key-value group contributes through the output projection."""

from __future__ import annotations

from importance.observers.base import OBSERVERS, Modules, Observe, Sums, observe_contributions
from minipuzzle.architecture.layers import LayerSpec


@OBSERVERS.register("attention")
def observe_attention(sums: Sums, layer_idx: int, spec: LayerSpec, modules: Modules) -> dict[str, Observe]:
    """Of each group, through its columns of the output projection."""
    return {modules["o"][0]: observe_contributions(sums, {f"kv_group.{layer_idx}": (spec.sizes["kv_group"],)})}
