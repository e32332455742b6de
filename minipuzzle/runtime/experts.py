"""Routed experts with one module each, as engines quantise them.

transformers keeps all experts of a layer in one tensor. Apart, each of their matrices has a name, can be cut, observed
by hooks, and rounded on its own.

Shape suffixes: N tokens, K experts a token, H hidden (or latent) channels, F ffn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class ClampedSwiglu(nn.Module):
    """gpt-oss's activation: gate and input are clamped, and the input is shifted by one (arXiv 2508.10925)."""

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
        """What the projection back sees."""
        gate_NF = gate_NF.clamp(max=self.limit)
        return (up_NF.clamp(-self.limit, self.limit) + 1) * gate_NF * torch.sigmoid(gate_NF * self.alpha)


class Gated(nn.Module):
    """The input times the activated gate."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act_fn = activation

    def forward(self, gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
        """What the projection back sees."""
        gated_NF: torch.Tensor = self.act_fn(gate_NF) * up_NF
        return gated_NF


class Expert(nn.Module):
    """One expert: two linear layers or, with a gate, three. Its output is already weighted.

    ``linears``: under the names of their roles; ``names``: those that they have in the module.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], names: Mapping[str, str], activation: nn.Module) -> None:
        super().__init__()
        self.names, self.activation = names, activation
        for role, linear in linears.items():
            self.add_module(names[role], linear)

    def forward(self, tokens_NH: torch.Tensor, weights_N1: torch.Tensor) -> torch.Tensor:
        """What the expert adds to the tokens that are routed to it, times the weight that the router gives it."""
        widened = (self.get_submodule(name)(tokens_NH) for role, name in self.names.items() if role != "expert_down")
        output_NH: torch.Tensor = self.get_submodule(self.names["expert_down"])(self.activation(*widened))
        return output_NH * weights_N1


class SplitExperts(nn.Module):
    """The experts of a layer, called like transformers' module in whose place it stands."""

    def __init__(self, fused: nn.Module, names: Mapping[str, str]) -> None:
        """``names``: of the linear layers of an expert by their roles, in the order gate, up, down."""
        super().__init__()
        alpha = getattr(fused, "alpha", None)
        if alpha is not None:
            activation: nn.Module = ClampedSwiglu(float(alpha), float(fused.limit))  # type: ignore[arg-type]
        else:
            activation = fused.get_submodule("act_fn")
            activation = Gated(activation) if "expert_gate" in names else activation
        self.whole = (fused,)  # not registered: it is empty once the weights are in the experts
        for expert_idx, linears in enumerate(_linears(fused, tuple(names))):
            self.add_module(str(expert_idx), Expert(linears, names, activation))

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


def _linears(fused: nn.Module, roles: tuple[str, ...]) -> list[dict[str, nn.Linear]]:
    """The linear layers of each expert by role: views of transformers' tensors, whichever way those lie."""
    into = "gate_up_proj" if "expert_gate" in roles else "up_proj"
    widening = roles[:-1]
    found: list[dict[str, nn.Linear]] = [{} for _ in fused.get_parameter(into)]
    for name, own in ((into, widening), ("down_proj", roles[-1:])):
        weights, biases = fused.get_parameter(name).detach(), getattr(fused, f"{name}_bias", None)
        if getattr(fused, "is_transposed", False):
            weights = weights.transpose(1, 2)
        for role_idx, role in enumerate(own):
            size = weights.shape[1] // len(own)
            is_mixed = not getattr(fused, "is_concatenated", True)
            rows = slice(role_idx, None, len(own)) if is_mixed else slice(role_idx * size, (role_idx + 1) * size)
            for expert_idx, linears in enumerate(found):
                bias = None if biases is None else biases.detach()[expert_idx, rows]
                linears[role] = _linear(weights[expert_idx, rows], bias)
    return found


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def join_experts(model: nn.Module) -> None:
    """Give a model transformers' own modules back, with one tensor for all experts, which it saves as it reads them."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, SplitExperts):
            continue
        fused, experts = module.whole[0], [expert for expert in module.children() if isinstance(expert, Expert)]
        roles = tuple(experts[0].names)
        like = next(experts[0].parameters())
        fused = fused.to_empty(device=like.device).to(like.dtype)
        with torch.no_grad():
            for linears, expert in zip(_linears(fused, roles), experts, strict=True):
                for role, linear in linears.items():
                    own = expert.get_submodule(expert.names[role])
                    for name, parameter in linear.named_parameters():
                        parameter.copy_(own.get_parameter(name))
        model.set_submodule(path, fused)
