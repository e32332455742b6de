"""Observers of layers, one file a kind: modules are found by their roles, so that no name of a family matters."""

from importance.observers import attention, gated_delta_net, mamba, mlp, moe
from importance.observers.base import OBSERVERS

__all__ = ["OBSERVERS", "attention", "gated_delta_net", "mamba", "mlp", "moe"]
