"""Mamba-2: sizes of the x slice by head and by channel, and the energy under the gated norm.

Shape suffixes: B batch, T tokens, I ssm inner channels, N ssm heads, P channels a head.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import silu

from importance.observers.base import OBSERVERS, Modules, Observe, Sums, mean_size, mean_square
from minipuzzle.architecture.layers import LayerSpec


@OBSERVERS.register("mamba")
def observe_mamba(sums: Sums, layer_idx: int, spec: LayerSpec, modules: Modules) -> dict[str, Observe]:
    """Of the x slice that goes into the convolution, and of what the gated norm averages."""
    num_heads, num_channels = spec.sizes["ssm_head"], spec.sizes["ssm_head_channel"]
    inner = num_heads * num_channels

    def observe_in_proj(_module: nn.Module, _args: tuple[torch.Tensor, ...], zxbcdt: torch.Tensor) -> None:
        x_BTI = zxbcdt[..., inner : 2 * inner]
        squares_BNP = mean_size(x_BTI).square().view(-1, num_heads, num_channels)
        sums.add(sums.squares, f"ssm_head.{layer_idx}", squares_BNP.sum(2))
        sums.add(sums.squares, f"ssm_head_channel.{layer_idx}", squares_BNP.sum(1))

    def observe_gated_norm(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        y_BTI, gate_BTI = args
        precision = torch.promote_types(y_BTI.dtype, torch.float32)
        sums.add(sums.energies, f"ssm.{layer_idx}", mean_square(y_BTI.to(precision) * silu(gate_BTI.to(precision))))

    return {modules["in"][0]: observe_in_proj, modules["norm"][0]: observe_gated_norm}
