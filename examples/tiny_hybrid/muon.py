"""Muon in float32 with one batched orthogonalisation per weight shape.

`torch.optim.Muon` orthogonalises one matrix at a time in bfloat16, which most CPUs only emulate.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return matrices [count, rows, columns] with all singular values pushed near 1 (Newton-Schulz)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    first, second, third = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = first * x + (second * gram + third * gram @ gram) @ x
    result: Tensor = x.transpose(1, 2) if tall else x
    return result


class BatchedMuon:
    """Momentum with orthogonalised updates for two-dimensional weights, grouped by shape."""

    def __init__(self, parameters: list[Tensor], *, momentum: float, weight_decay: float) -> None:
        self._groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            self._groups[tuple(parameter.shape)].append(parameter)
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._buffers = {shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every weight from its gradient; decoupled weight decay uses the same rate."""
        for shape, group in self._groups.items():
            gradients = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            buffer = self._buffers[shape]
            buffer.lerp_(gradients, 1 - self._momentum)
            updates = orthogonalise(gradients.lerp(buffer, self._momentum))
            scale = learning_rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(group, updates, strict=True):
                parameter.mul_(1 - learning_rate * self._weight_decay).add_(update, alpha=-scale)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the momentum buffers, keyed by shape."""
        return {"x".join(map(str, shape)): buffer for shape, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the buffers of `state_dict`."""
        for shape, buffer in self._buffers.items():
            buffer.copy_(state["x".join(map(str, shape))])
