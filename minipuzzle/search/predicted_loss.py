"""What a cut should cost in quality, added up from scores of single layers.

A removed layer costs its score. A narrowed one costs what was measured for that width (``score --variants``); between
measured widths the loss is interpolated, with the whole layer (0) and the removed layer (its score) as the two ends.
Where no width was measured, it costs the share of its score that the lost units have in its units' squared scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from minipuzzle.architecture.kinds import kind_of_axis, owner_of_axis
from minipuzzle.architecture.model import UNIFORM, Architecture
from minipuzzle.cut.scores import Array, Scores, unit_key
from minipuzzle.cut.selection import layer_scores
from minipuzzle.errors import MinipuzzleError


@dataclass(frozen=True, kw_only=True)
class LossModel:
    """Predicted losses of cuts of single layers; those of a whole cut are their sum."""

    source: Architecture
    scores: Scores
    metric: str
    _lost_by_number: dict[tuple[str, int], Array] = field(default_factory=dict, repr=False, compare=False)
    _measured: dict[str, list[tuple[int, Array]]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises: MinipuzzleError if the metric was not measured, or not of every layer."""
        if missing := np.flatnonzero(~np.isfinite(self.removal)).tolist():
            raise MinipuzzleError(
                f"the scores hold no {self.metric} of layers {', '.join(map(str, missing))}",
                "a search needs scores of all layers: measure without ‹layers›",
            )
        for key, losses in self.scores.variants.items():
            metric, axis, width = key.split(".")
            if metric == self.metric:
                self._measured.setdefault(axis, []).append((int(width), losses))
        for measured in self._measured.values():
            measured.sort(key=lambda pair: pair[0])

    @property
    def removal(self) -> Array:
        """Loss of removing each layer, ``[layers]``."""
        return layer_scores(self.scores, self.metric)

    def removal_in(self, layout: str) -> Array:
        """Loss of removing each layer, ``[layers]``, so that layers which go together add up to what was measured for
        removing them together; where that was not measured, each has its own."""
        together = self.scores.blocks.get(self.metric)
        if layout != UNIFORM or together is None:
            return self.removal
        losses = self.removal.copy()
        for block in (block for block in self.source.blocks if len(block) > 1):
            losses[list(block)] = together[block[0]] / len(block)
        return losses

    def narrowing(self, layer_idx: int, widths: Mapping[str, int]) -> float:
        """Loss of narrowing one layer; losses of several axes add up. Axes that it does not have cost nothing."""
        sizes = self.source.layers[layer_idx].sizes
        total = 0.0
        for axis, width in widths.items():
            if axis in sizes and width < sizes[axis]:
                total += self._narrowing_on(axis, layer_idx, width)
        return total

    def _narrowing_on(self, axis: str, layer_idx: int, width: int) -> float:
        size, removal = self.source.layers[layer_idx].sizes[axis], float(self.removal[layer_idx])
        measured = [(known, float(losses[layer_idx])) for known, losses in self._measured.get(axis, ()) if known < size]
        if measured:
            widths, losses = zip((0, removal), *measured, (size, 0.0), strict=True)
            return float(np.interp(width, widths, losses))
        return removal * self._lost_share(axis, layer_idx, width)

    def _lost_share(self, axis: str, layer_idx: int, width: int) -> float:
        size = self.source.layers[layer_idx].sizes[axis]
        key = unit_key(axis, owner_of_axis(axis, layer_idx))
        if key not in self.scores.units:  # only layer scores are known, as in files measured elsewhere
            return (size - width) / size
        if (axis, layer_idx) not in self._lost_by_number:
            self._lost_by_number[axis, layer_idx] = self._lost_shares(self.scores.units[key], axis, layer_idx)
        shares = self._lost_by_number[axis, layer_idx]
        return float(shares[(size - width) * (len(shares) - 1) // size])

    def _lost_shares(self, unit_scores: Array, axis: str, layer_idx: int) -> Array:
        """The share of all squared scores that goes with the lowest n units of each group, by n from 0 to all."""
        energy = unit_scores.astype(np.float64) ** 2
        group_axis = kind_of_axis(axis).unit_groups.get(axis)
        num_groups = self.source.layers[layer_idx].sizes[group_axis] if group_axis else 1
        by_group = np.sort(energy.reshape(*energy.shape[:-1], num_groups, -1))
        lost = by_group.reshape(-1, by_group.shape[-1]).sum(axis=0).cumsum()
        shares: Array = np.concatenate([[0.0], lost]) / max(lost[-1], np.finfo(np.float64).tiny)
        return shares
