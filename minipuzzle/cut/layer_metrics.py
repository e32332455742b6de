"""The table of layer metrics: how far a model is from another, from sums over tokens that one pass gathers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minipuzzle.table import Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class LayerSums:
    """Sums over tokens between a full model and several altered ones.

    Shapes: the first four ``[streams]``, one stream for each altered model. ``squared_difference`` and
    ``cosine_distance`` are of the LM head's input, whose ``num_elements`` have the energy ``full_energy``; ``kl`` and
    ``loss_rise`` in nats, the latter over ``num_labels`` tokens.
    """

    squared_difference: NDArray[np.float64]
    cosine_distance: NDArray[np.float64]
    kl: NDArray[np.float64]
    loss_rise: NDArray[np.float64]
    num_tokens: int
    num_labels: int
    num_elements: int
    full_energy: float


@dataclass(frozen=True, kw_only=True)
class LayerMetric:
    """A metric in words, and what it is for each stream."""

    definition: str
    of: Callable[[LayerSums], NDArray[np.float64]]
    may_be_negative: bool = False


LAYER_METRICS = Table(
    "metric",
    "metrics",
    entries={
        "mse": LayerMetric(
            definition="mean squared change of the LM head's input (arXiv 2504.03624, section 3.2)",
            of=lambda sums: sums.squared_difference / sums.num_elements,
        ),
        "nmse": LayerMetric(
            definition="that change's energy divided by the energy of the LM head's input",
            of=lambda sums: sums.squared_difference / sums.full_energy,
        ),
        "cosine": LayerMetric(
            definition="one minus the cosine of the LM head's inputs, mean over tokens",
            of=lambda sums: sums.cosine_distance / sums.num_tokens,
        ),
        "kl": LayerMetric(
            definition="forward KL of the next-token distributions, nats/token",
            of=lambda sums: sums.kl / sums.num_tokens,
        ),
        "delta_loss": LayerMetric(
            definition="rise of the next-token loss, nats/token",
            of=lambda sums: sums.loss_rise / max(1, sums.num_labels),
            may_be_negative=True,
        ),
    },
)
