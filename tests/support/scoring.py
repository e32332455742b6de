"""Scores of leaving out each layer of a stack."""

from __future__ import annotations

import torch

from importance.layers import Hooks, Metrics, removal_plans, score_plans
from minipuzzle.runtime.layer_stack import LayerStack


def score_layers(
    stack: LayerStack, token_ids_BT: torch.Tensor, slice_samples: int | None = None, hooks: Hooks | None = None
) -> Metrics:
    plans = removal_plans(stack.architecture, range(stack.num_layers))
    return score_plans(stack, plans, token_ids_BT, slice_samples=slice_samples, hooks=hooks)
