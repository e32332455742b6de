"""Attention: what each key-value group contributes through the output projection.

Shape suffixes: B batch, T tokens, H hidden, W columns of a group in the output projection.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from importance.observers.base import OBSERVERS, Modules, Observe, Sums
from minipuzzle.architecture.layers import LayerSpec


@OBSERVERS.register("attention")
def observe_attention(sums: Sums, layer_idx: int, spec: LayerSpec, modules: Modules) -> dict[str, Observe]:
    """Of each group, through its columns of the output projection."""
    group_width = spec.sizes["queries_per_group"] * spec.sizes["head_dim"]

    def observe_o_proj(module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        inputs_BTW = torch.split(args[0], group_width, dim=-1)
        weights_HW = torch.split(module.get_parameter("weight"), group_width, dim=-1)
        sizes = [
            linear(input_BTW, weight_HW).norm(dim=-1, dtype=torch.promote_types(input_BTW.dtype, torch.float32)).mean(1)
            for input_BTW, weight_HW in zip(inputs_BTW, weights_HW, strict=True)
        ]
        sums.add(sums.squares, f"kv_group.{layer_idx}", torch.stack(sizes, dim=-1).square())

    return {modules["o"][0]: observe_o_proj}
