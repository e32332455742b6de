"""Mixture of experts: norms of the experts' outputs, with and without routing weights, and sizes of their neurons and
the shared expert's.

Shape suffixes: N tokens routed to an expert, K experts a token, H hidden (or latent) channels, F ffn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from importance.observers.base import OBSERVERS, Modules, Observe, Sums, observe_neurons
from minipuzzle.architecture.layers import LayerSpec


@OBSERVERS.register("moe")
def observe_moe(sums: Sums, layer_idx: int, spec: LayerSpec, modules: Modules) -> dict[str, Observe]:
    """Of each expert as a whole, and of its neurons."""
    num_experts = spec.sizes["expert"]
    # Experts see the tokens of all sequences in one list. The router runs before them, and says what each is given.
    seen: dict[str, torch.Tensor] = {}

    def observe_router(_module: nn.Module, _args: tuple[torch.Tensor, ...], routed: Any) -> None:
        _logits, seen["weights_NK"], seen["experts_NK"] = routed
        num_tokens = torch.tensor(float(len(seen["experts_NK"])))
        sums.add_row(sums.totals, f"expert_tokens.{layer_idx}", 1, 0, num_tokens)

    def observe_expert(expert_idx: int) -> Observe:
        def observe(_module: nn.Module, args: tuple[torch.Tensor, ...], weighted_NH: torch.Tensor) -> None:
            tokens_N, _ = torch.where(seen["experts_NK"] == expert_idx)
            weights_N, all_weights_N = args[1][:, 0].double(), seen["weights_NK"][tokens_N].sum(1).double()
            weighted_N = weighted_NH.norm(dim=-1, dtype=torch.promote_types(weighted_NH.dtype, torch.float32)).double()
            norms_N = torch.where(weights_N > 0, weighted_N / weights_N, 0)
            found = (torch.ones_like(norms_N), norms_N, norms_N.square(), norms_N * weights_N / all_weights_N)
            row = torch.stack([values.sum() for values in (*found, weighted_N)])
            sums.add_row(sums.totals, f"expert.{layer_idx}", num_experts, expert_idx, row)

        return observe

    def observe_expert_down_proj(expert_idx: int) -> Observe:
        def observe(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            size_F = args[0].abs().sum(dim=0, dtype=torch.promote_types(args[0].dtype, torch.float32))
            sums.add_row(sums.totals, f"expert_ffn.{layer_idx}", num_experts, expert_idx, size_F)

        return observe

    observers: dict[str, Observe] = {modules["router"][0]: observe_router}
    observers |= {name: observe_neurons(sums, "shared_ffn", layer_idx) for name in modules.get("shared_down", ())}
    for expert_idx, down_proj in enumerate(modules["expert_down"]):
        observers[down_proj.rpartition(".")[0]] = observe_expert(expert_idx)
        observers[down_proj] = observe_expert_down_proj(expert_idx)
    return observers
