"""Gated delta nets: what each value head contributes through the output projection, and each key head with its own."""

from __future__ import annotations

from importance.observers.base import OBSERVERS, Modules, Observe, Sums, observe_contributions
from minipuzzle.architecture.layers import LayerSpec


@OBSERVERS.register("gated_delta_net")
def observe_gated_delta_net(sums: Sums, layer_idx: int, spec: LayerSpec, modules: Modules) -> dict[str, Observe]:
    """Of each key head's group, and of each value head in it, through their columns of the output projection."""
    groups = spec.sizes["gdn_key_group"]
    shapes = {
        f"gdn_key_group.{layer_idx}": (groups,),
        f"gdn_value_head.{layer_idx}": (groups, spec.sizes["gdn_value_head"]),
    }
    return {modules["out"][0]: observe_contributions(sums, shapes)}
