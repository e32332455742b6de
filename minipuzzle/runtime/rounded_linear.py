"""Linear layers that round what they multiply, as engines do with the layers of a quantised export."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Rounding = Callable[[torch.Tensor], torch.Tensor]


class RoundedLinear(nn.Linear):
    """A linear layer with the weight and bias of another, in whose place it is put.

    ``round_inputs`` is also for those who multiply by ``weight`` without a call, as they do with large heads.
    """

    def __init__(self, linear: nn.Module, *, round_inputs: Rounding, round_weight: Rounding | None = None) -> None:
        """Take over the parameters of a linear layer. ``round_weight``: in every call; None: they are rounded."""
        assert isinstance(linear, nn.Linear), f"{linear} is not a linear layer"
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.round_inputs, self.round_weight = round_inputs, round_weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The product of rounded inputs and weights."""
        weight = self.weight if self.round_weight is None else self.round_weight(self.weight)
        return F.linear(self.round_inputs(inputs), weight, self.bias)
