"""Grid search: every combination of layer counts and widths, those that fit, those worth measuring.

Given how many layers of a kind stay, the best of them stay. So costs and predicted losses of a kind follow from its
count and the widths of its own axes, and the whole grid is a sum of small tables, one a kind, by array arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.selection import rank_layers
from minipuzzle.errors import MinipuzzleError
from minipuzzle.search.candidates import Candidate
from minipuzzle.search.costs import COSTS, Costs, Floats, Limits, Pricing
from minipuzzle.search.infeasible import Infeasibility
from minipuzzle.search.predicted_loss import LossModel
from minipuzzle.search.space import SearchSpace

MAX_GRID_POINTS = 5_000_000
Bools = NDArray[np.bool_]
Index = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All points of a search space, priced. Dimensions: the kinds' counts, then the axes' widths, as in the space.

    ``costs``: [costs, *grid]; ``losses``: [*grid]; ``ranked``: kind -> what stays or goes together, best first.
    """

    source: Architecture
    pricing: Pricing
    space: SearchSpace
    ranked: Mapping[str, Sequence[tuple[int, ...]]]
    costs: Floats
    losses: Floats

    def candidates(self, limits: Limits) -> list[Candidate]:
        """Points that fit and that no other one dominates, by predicted loss, best first.

        A point is dominated if another one that fits keeps the same or more of everything.

        Raises: InfeasibleBudgetError naming the smallest memory within the space.
        """
        bounds = limits.as_array().reshape(-1, *[1] * self.losses.ndim)
        fits: Bools = np.all(self.costs <= bounds, axis=0)
        if not fits.any():
            raise self._infeasibility(limits).error()
        points = np.argwhere(fits & ~_dominated(fits))
        at = tuple(points.T)
        order = np.lexsort((-self.costs[1][at], self.losses[at]))
        return [self._candidate(tuple(map(int, points[position])), limits) for position in order]

    def _candidate(self, point: tuple[int, ...], limits: Limits) -> Candidate:
        counts, widths = self._numbers(point)
        kept = [idx for kind, count in counts.items() for together in self.ranked[kind][:count] for idx in together]
        at: Index = (..., *point)
        return Candidate(
            source=self.source,
            kept_layers=tuple(sorted(kept)),
            widths=widths,
            costs=Costs.from_array(self.costs[at], is_timed=self.pricing.timings is not None),
            predicted_loss=float(self.losses[point]),
            layout=self.space.layout,
            pricing=self.pricing,
            limits=limits,
        )

    def _numbers(self, point: tuple[int, ...]) -> tuple[dict[str, int], dict[str, int]]:
        allowed = (*self.space.counts.values(), *self.space.widths.values())
        chosen = [values[idx] for values, idx in zip(allowed, point, strict=True)]
        num_kinds = len(self.space.counts)
        counts = dict(zip(self.space.counts, chosen[:num_kinds], strict=True))
        return counts, dict(zip(self.space.widths, chosen[num_kinds:], strict=True))

    def _infeasibility(self, limits: Limits) -> Infeasibility:
        point = np.unravel_index(int(self.costs[0].argmin()), self.losses.shape)
        smallest = self._candidate(tuple(map(int, point)), limits)
        least = self.costs.reshape(len(COSTS), -1).min(axis=1)
        return Infeasibility(
            limits=limits, smallest=smallest.architecture, least=least, pricing=self.pricing, space=self.space
        )


def price_grid(loss: LossModel, pricing: Pricing, space: SearchSpace) -> Grid:
    """Price every point of a space.

    Raises: MinipuzzleError for a grid too large to hold.
    """
    source = loss.source
    shape = tuple(len(values) for values in (*space.counts.values(), *space.widths.values()))
    if prod(shape) > MAX_GRID_POINTS:
        raise MinipuzzleError(
            f"the grid has {prod(shape):,} points; {MAX_GRID_POINTS:,} are the most that are held",
            "take larger steps (‹depth_step›, ‹widths› AXIS=LOW:HIGH:STEP) or narrower bounds (‹minimum›, ‹maximum›)",
        )
    ranked = rank_layers(source, loss.removal_in(space.layout), space.layout, space.keep_layers)
    costs, losses = np.zeros((len(COSTS), *shape)), np.zeros(shape)
    dims = {name: dim for dim, name in enumerate((*space.counts, *space.widths))}
    outer = np.array([pricing.outer(hidden) for hidden in space.widths.get("hidden", (source.hidden,))])
    is_varied = "hidden" in dims
    costs += _spread(outer.T if is_varied else outer[0], dims, ("hidden",) if is_varied else (), len(shape))
    for kind in space.counts:
        axes = _axes_of(source, space, ranked[kind])
        kind_costs, kind_losses = _kind_tables(loss, pricing, space, ranked[kind], kind, axes)
        costs += _spread(kind_costs, dims, (kind, *axes), len(shape))
        losses += _spread(kind_losses[None], dims, (kind, *axes), len(shape))[0]
    return Grid(source=source, pricing=pricing, space=space, ranked=ranked, costs=costs, losses=losses)


def _axes_of(source: Architecture, space: SearchSpace, ranked: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
    had = {axis for together in ranked for idx in together for axis in source.layers[idx].sizes}
    return tuple(axis for axis in space.widths if axis in had)


def _kind_tables(
    loss: LossModel,
    pricing: Pricing,
    space: SearchSpace,
    ranked: Sequence[tuple[int, ...]],
    kind: str,
    axes: tuple[str, ...],
) -> tuple[Floats, Floats]:
    """Costs [costs, counts, *widths] and losses [counts, *widths] of the layers of one kind."""
    source, counts = loss.source, list(space.counts[kind])
    width_shape = tuple(len(space.widths[axis]) for axis in axes)
    costs = np.empty((len(COSTS), len(counts), *width_shape))
    losses = np.empty((len(counts), *width_shape))
    of_layers = loss.removal_in(space.layout)
    removal = np.array([of_layers[list(together)].sum() for together in ranked])
    lost = np.concatenate([removal[::-1].cumsum()[::-1], [0.0]])
    for point in itertools.product(*map(range, width_shape)):
        widths = {axis: space.widths[axis][idx] for axis, idx in zip(axes, point, strict=True)}
        layer_costs, narrowing = [], []
        for together in ranked:
            layers = [source.layers[idx] for idx in together]
            cut = [layer.resized(**{a: w for a, w in widths.items() if a in layer.sizes}) for layer in layers]
            layer_costs.append(np.sum([pricing.layer(layer) for layer in cut], axis=0))
            narrowing.append(sum(loss.narrowing(idx, widths) for idx in together))
        # By the number that stays, from none to all.
        kept_costs = np.cumsum([np.zeros(len(COSTS)), *layer_costs], axis=0)
        kept_losses = np.cumsum([0.0, *narrowing])
        at: Index = (..., *point)
        costs[at] = kept_costs[counts].T
        losses[at] = (kept_losses + lost)[counts]
    return costs, losses


def _spread(table: Floats, dims: Mapping[str, int], names: tuple[str, ...], num_dims: int) -> Floats:
    """A table [values, *sizes of the named dimensions], broadcast-ready against the whole grid.

    On a grid of mamba x mlp x ffn a table [costs, 4 counts of mlp, 3 widths of ffn] becomes [costs, 1, 4, 3].
    """
    missing = [dim for dim in range(num_dims) if dim not in {dims[name] for name in names}]
    table = np.expand_dims(table, [1 + len(names) + idx for idx in range(len(missing))])
    places = [1 + dim for dim in (*(dims[name] for name in names), *missing)]
    return np.moveaxis(table, range(1, 1 + num_dims), places)


def _dominated(fits: Bools) -> Bools:
    """Points below another one that fits: the same or less of everything, less of something."""
    above = fits.copy()  # whether the point itself or any above it fits
    for dim in range(fits.ndim):
        above = np.flip(np.logical_or.accumulate(np.flip(above, dim), axis=dim), dim)
    dominated = np.zeros_like(fits)
    for dim in range(fits.ndim):
        lower, upper = [slice(None)] * fits.ndim, [slice(None)] * fits.ndim
        lower[dim], upper[dim] = slice(None, -1), slice(1, None)
        dominated[tuple(lower)] |= above[tuple(upper)]
    return dominated
