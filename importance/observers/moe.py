"""Mixture of experts: outputs of the experts by routing weight, and sizes of their neurons and the shared expert's.

Shape suffixes: N tokens routed to an expert, H hidden (or latent) channels, F ffn.
"""

from __future__ import annotations

import torch
from torch import nn

from importance.observers.base import OBSERVERS, Modules, Observe, Sums, observe_neurons
from minipuzzle.architecture.layers import LayerSpec


@OBSERVERS.register("moe")
def observe_moe(sums: Sums, layer_idx: int, spec: LayerSpec, modules: Modules) -> dict[str, Observe]:
    """Of each expert as a whole, and of its neurons."""
    num_experts = spec.sizes["expert"]
    # Experts see the tokens of all sequences in one list. How many a sequence has is seen at the router, which runs
    # before them: of sequences of 512 tokens, an expert that is given 40 adds the sum over these, divided by 512.
    seen = {"tokens": 1}

    def observe_gate(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        seen["tokens"] = args[0].shape[-2]

    def observe_expert(expert_idx: int) -> Observe:
        def observe(_module: nn.Module, _args: tuple[torch.Tensor, ...], weighted_NH: torch.Tensor) -> None:
            norms_N = weighted_NH.norm(dim=-1, dtype=torch.promote_types(weighted_NH.dtype, torch.float32))
            sums.add_row(sums.means, f"expert.{layer_idx}", num_experts, expert_idx, norms_N.sum() / seen["tokens"])

        return observe

    def observe_expert_down_proj(expert_idx: int) -> Observe:
        def observe(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            size_F = args[0].abs().sum(dim=0, dtype=torch.promote_types(args[0].dtype, torch.float32)) / seen["tokens"]
            sums.add_row(sums.means, f"expert_ffn.{layer_idx}", num_experts, expert_idx, size_F)

        return observe

    observers: dict[str, Observe] = {modules["router"][0]: observe_gate}
    observers |= {name: observe_neurons(sums, "shared_ffn", layer_idx) for name in modules["shared_down"]}
    for expert_idx, down_proj in enumerate(modules["expert_down"]):
        observers[down_proj.rpartition(".")[0]] = observe_expert(expert_idx)
        observers[down_proj] = observe_expert_down_proj(expert_idx)
    return observers
