"""Routed experts with one module each, as checkpoints store them and engines quantise them.

transformers keeps all experts of a layer in one tensor. Apart, each of their matrices has a name, can be cut, observed
by hooks, and rounded on its own.

Shape suffixes: N tokens, K experts a token, H hidden (or latent) channels.
"""

from __future__ import annotations

import torch
from torch import nn


class Expert(nn.Module):
    """One expert without a gate: two linear layers and an activation. Its output is already weighted."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, activation: nn.Module) -> None:
        super().__init__()
        self.up_proj, self.down_proj = _linear(up), _linear(down)
        self.act_fn = activation

    def forward(self, tokens_NH: torch.Tensor, weights_N1: torch.Tensor) -> torch.Tensor:
        """What the expert adds to the tokens that are routed to it, times the weight that the router gives it."""
        output_NH: torch.Tensor = self.down_proj(self.act_fn(self.up_proj(tokens_NH))) * weights_N1
        return output_NH


class SplitExperts(nn.Module):
    """The experts of a layer, called like transformers' module in whose place it stands."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        ups, downs = fused.get_parameter("up_proj"), fused.get_parameter("down_proj")
        activation = fused.get_submodule("act_fn")
        for expert_idx in range(len(ups)):
            self.add_module(str(expert_idx), Expert(ups[expert_idx], downs[expert_idx], activation))

    def forward(
        self, tokens_NH: torch.Tensor, expert_indices_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        """The sum over the experts of each token."""
        sum_NH = torch.zeros_like(tokens_NH, dtype=weights_NK.dtype)
        for expert_idx, expert in enumerate(self.children()):
            tokens_N, places_N = torch.where(expert_indices_NK == expert_idx)
            # In training every expert takes part, if with no tokens: processes must agree on what has a gradient.
            if len(tokens_N) or torch.is_grad_enabled():
                weighted_NH = expert(tokens_NH[tokens_N], weights_NK[tokens_N, places_N, None])
                sum_NH.index_add_(0, tokens_N, weighted_NH.to(sum_NH.dtype))
        return sum_NH.to(tokens_NH.dtype)


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    return linear
