"""Optimisers over a model's parameters, grouped by what may decay."""

from __future__ import annotations

import torch
from torch import nn

from distill.settings import DistillSettings


def make_optimizer(model: nn.Module, settings: DistillSettings) -> torch.optim.Optimizer:
    """AdamW over two named groups: matrices and convolutions, which decay, and the rest, which does not.

    Norms, biases, A_log, D and dt_bias are one-dimensional; embeddings are rows that rare tokens seldom mend.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[tuple[str, nn.Parameter]] = []
    kept: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        may_decay = parameter.ndim > 1 and id(parameter) not in embeddings
        (decayed if may_decay else kept).append((name, parameter))
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=1e-8, fused=True)
