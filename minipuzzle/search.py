"""Grid search: every combination of layer counts and widths, those that fit, those worth measuring.

Memory and parameters are linear in the layer counts once the widths are fixed, so one layer of each kind is priced
per width and the whole grid follows by array arithmetic. The chosen candidates are priced again exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minipuzzle.architecture import Architecture
from minipuzzle.errors import InfeasibleBudgetError, MinipuzzleError
from minipuzzle.layer_kinds import LAYER_KINDS, kind_of_axis
from minipuzzle.memory import Deployment, memory_breakdown
from minipuzzle.plan import Plan
from minipuzzle.scores import Array, Scores
from minipuzzle.selection import keep_best_layers, layer_scores, make_plan
from minipuzzle.units import format_gib, parse_budget_bytes

DEFAULT_GRANULARITY = 128


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What a user asks for: a budget, fixed numbers, bounds, or any mix of them.

    ``memory``: a size or a share of the source such as ``75%``; None: everything that is not fixed stays.
    ``keep``, ``width``: fixed counts by kind and widths by axis. ``minimum``: lower bounds on counts.
    """

    memory: str | None = None
    keep: Mapping[str, int] = field(default_factory=dict)
    width: Mapping[str, int] = field(default_factory=dict)
    minimum: Mapping[str, int] = field(default_factory=dict)
    min_kept_fraction: float = 0.5
    min_ffn_fraction: float = 0.75
    depth_step: int = 1
    granularity: int = DEFAULT_GRANULARITY
    metric: str = "mse"

    def __post_init__(self) -> None:
        if self.memory is None and not self.keep and not self.width:
            raise MinipuzzleError("nothing says how small the model should be", "give --memory, --keep or --width")

    def budget_bytes(self, source_bytes: int) -> int:
        """The budget in bytes; without one, what the source needs."""
        return source_bytes if self.memory is None else parse_budget_bytes(self.memory, source_bytes)


def find_candidates(
    source: Architecture, scores: Scores, request: SearchRequest, deployment: Deployment
) -> list[Candidate]:
    """Candidates for a request, best predicted first.

    Raises: InfeasibleBudgetError, or MinipuzzleError for impossible targets or missing scores.
    """
    scores.check_against(source)
    source_bytes = memory_breakdown(source, deployment).total_bytes
    return search(
        source,
        scores,
        requested_space(source, request),
        deployment,
        budget_bytes=request.budget_bytes(source_bytes),
        metric=request.metric,
    )


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What may vary. ``counts``: kind -> allowed numbers of layers; ``widths``: axis -> allowed widths. Ascending."""

    counts: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One point of the grid: how much of everything stays, what that needs, and what it should cost in quality."""

    counts: Mapping[str, int]
    widths: Mapping[str, int]
    memory_bytes: int
    num_parameters: int
    predicted_loss: float
    architecture: Architecture = field(repr=False)

    def describe(self) -> str:
        """A short name for tables."""
        counts = " ".join(f"{n}{LAYER_KINDS[kind].symbol}" for kind, n in self.architecture.layer_counts.items())
        widths = " ".join(f"{axis} {width}" for axis, width in self.widths.items())
        return f"{counts}  {widths}".strip()

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "counts": dict(self.counts),
            "widths": dict(self.widths),
            "memory_bytes": self.memory_bytes,
            "num_parameters": self.num_parameters,
            "predicted_loss": self.predicted_loss,
        }


def requested_space(source: Architecture, request: SearchRequest) -> SearchSpace:
    """The grid of the published search (layer counts by kind, one FFN width), narrowed by what the user fixed.

    Raises: MinipuzzleError for kinds and axes the model does not have.
    """
    counts_to_choose = source.removable_counts()
    for kind in (*request.keep, *request.minimum):
        if kind not in source.layer_counts:
            raise MinipuzzleError(f"the model has no {kind} layers", f"it has {', '.join(source.layer_counts)}")
        if kind not in counts_to_choose:
            raise MinipuzzleError(
                f"{kind} layers of this model stay or go with the layer before them in their block",
                f"give a number for {' and '.join(counts_to_choose)} layers only",
            )
    for axis, size in request.width.items():
        _check_width(source, axis, size)
    counts = {kind: _count_steps(kind, available, request) for kind, available in counts_to_choose.items()}
    widths: dict[str, tuple[int, ...]] = {axis: (size,) for axis, size in request.width.items()}
    ffn = source.width("ffn")
    if ffn is not None and "ffn" not in widths and request.memory is not None:
        multiples = range(request.granularity, ffn, request.granularity)
        widths["ffn"] = (*(size for size in multiples if size >= ffn * request.min_ffn_fraction), ffn)
    return SearchSpace(counts=counts, widths=widths)


def _count_steps(kind: str, available: int, request: SearchRequest) -> tuple[int, ...]:
    if kind in request.keep:
        if not 0 <= request.keep[kind] <= available:
            raise MinipuzzleError(
                f"cannot keep {request.keep[kind]} {kind} layers: the model has {available}", "lower --keep"
            )
        return (request.keep[kind],)
    if request.memory is None:
        return (available,)
    lowest = max(request.minimum.get(kind, 0), int(np.ceil(available * request.min_kept_fraction)))
    return tuple(range(available, min(lowest, available) - 1, -request.depth_step))[::-1]


def _check_width(source: Architecture, axis: str, width: int) -> None:
    available = source.width(axis)
    if available is None:
        raise MinipuzzleError(f"the model has no axis {axis!r} of one width", "see `minipuzzle inspect`")
    if not 0 < width <= available:
        raise MinipuzzleError(f"cannot cut {axis} to {width}: the model has {available}", "lower --width")
    kind = kind_of_axis(axis)
    if kind is not None and axis in kind.unit_groups:
        groups = source.width(kind.unit_groups[axis]) or 1
        if width % groups:
            raise MinipuzzleError(f"{axis}={width} does not divide into the model's {groups} groups", "change --width")


def resize(source: Architecture, counts: Mapping[str, int], widths: Mapping[str, int]) -> Architecture:
    """An architecture with the first so many layers of each kind, at given widths: for pricing, where order is moot.

    Layers that can only go together count as one, of the kind of the first of them.
    """
    left = dict(counts)
    kept: list[int] = []
    for together in source.removable():
        kind = source.layers[together[0]].kind
        if left.get(kind, 0) > 0:
            left[kind] -= 1
            kept += together
    return _with_widths(source, tuple(kept), widths)


def _with_widths(source: Architecture, kept_layers: Sequence[int], widths: Mapping[str, int]) -> Architecture:
    layers = []
    for layer_idx in kept_layers:
        layer = source.layers[layer_idx]
        layers.append(layer.resized(**{axis: size for axis, size in widths.items() if axis in layer.sizes}))
    return replace(source, layers=tuple(layers), hidden=widths.get("hidden", source.hidden))


def search(
    source: Architecture,
    scores: Scores,
    space: SearchSpace,
    deployment: Deployment,
    *,
    budget_bytes: int,
    metric: str = "mse",
) -> list[Candidate]:
    """Candidates that fit and are not dominated, by predicted loss, best first.

    A candidate is dominated if another one that fits keeps the same or more of everything.

    Raises: InfeasibleBudgetError naming the smallest memory within the space.
    """
    points = _fitting_points(source, space, deployment, budget_bytes)
    by_layer = layer_scores(scores, metric)
    candidates = [_candidate(source, scores, by_layer, counts, widths, deployment) for counts, widths in points]
    for candidate in candidates:
        assert candidate.memory_bytes <= budget_bytes, f"{candidate.describe()} does not fit after all"
    candidates.sort(key=lambda candidate: (candidate.predicted_loss, -candidate.num_parameters))
    return candidates


def _fitting_points(
    source: Architecture, space: SearchSpace, deployment: Deployment, budget_bytes: int
) -> list[tuple[dict[str, int], dict[str, int]]]:
    kinds, axes = list(space.counts), list(space.widths)
    grid_shape = (*(len(space.counts[kind]) for kind in kinds), *(len(space.widths[axis]) for axis in axes))
    fits = np.zeros(grid_shape, dtype=bool)
    smallest: tuple[int, dict[str, int], dict[str, int]] | None = None
    for width_point in itertools.product(*(range(len(space.widths[axis])) for axis in axes)):
        widths = {axis: space.widths[axis][idx] for axis, idx in zip(axes, width_point, strict=True)}
        num_bytes = _memory_of_all_counts(source, space, widths, deployment)
        fits[tuple([slice(None)] * len(kinds) + list(width_point))] = num_bytes <= budget_bytes
        least = int(num_bytes.min())
        if smallest is None or least < smallest[0]:
            counts_of_least = {kind: space.counts[kind][0] for kind in kinds}
            smallest = (least, counts_of_least, widths)
    if not fits.any():
        assert smallest is not None
        raise _infeasible(source, smallest[1], smallest[2], deployment, budget_bytes)
    points = []
    for point in np.argwhere(_not_dominated(fits)):
        counts = {kind: space.counts[kind][point[dim]] for dim, kind in enumerate(kinds)}
        widths = {axis: space.widths[axis][point[len(kinds) + dim]] for dim, axis in enumerate(axes)}
        points.append((counts, widths))
    return points


def _memory_of_all_counts(
    source: Architecture, space: SearchSpace, widths: Mapping[str, int], deployment: Deployment
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Bytes for every combination of counts at one set of widths, ``[counts of kind 0, counts of kind 1, ...]``."""

    def priced(counts: Mapping[str, int]) -> int:
        return memory_breakdown(resize(source, counts, widths), deployment).total_bytes

    total: np.ndarray[Any, np.dtype[np.int64]] = np.array(priced({}), dtype=np.int64)
    for kind, counts in space.counts.items():
        per_layer = priced({kind: 1}) - priced({})
        total = total[..., None] + np.array(counts, dtype=np.int64) * per_layer
    return total


def _not_dominated(fits: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Points that fit while no single step up along any dimension does. Memory grows along all of them."""
    maximal = fits.copy()
    for dim in range(fits.ndim):
        step_up = np.zeros_like(fits)
        inner: list[slice] = [slice(None)] * fits.ndim
        outer = list(inner)
        inner[dim], outer[dim] = slice(None, -1), slice(1, None)
        step_up[tuple(inner)] = fits[tuple(outer)]
        maximal &= ~step_up
    return maximal


def _infeasible(
    source: Architecture,
    counts: Mapping[str, int],
    widths: Mapping[str, int],
    deployment: Deployment,
    budget_bytes: int,
) -> InfeasibleBudgetError:
    breakdown = memory_breakdown(resize(source, counts, widths), deployment)
    terms = ", ".join(f"{term.name} {format_gib(term.num_bytes)}" for term in breakdown.terms if term.num_bytes)
    bounds = ", ".join(f"{kind}={count}" for kind, count in counts.items())
    return InfeasibleBudgetError(
        f"nothing fits into {format_gib(budget_bytes)}: the smallest candidate ({bounds}, "
        f"{', '.join(f'{axis}={size}' for axis, size in widths.items())}) needs "
        f"{format_gib(breakdown.total_bytes)} ({terms})",
        "raise --memory, lower --context or a precision, or allow less with --min-kept, --keep or --width",
    )


def _candidate(
    source: Architecture,
    scores: Scores,
    by_layer: Array,
    counts: Mapping[str, int],
    widths: Mapping[str, int],
    deployment: Deployment,
) -> Candidate:
    kept_layers = keep_best_layers(source, by_layer, counts)
    architecture = _with_widths(source, kept_layers, widths)
    dropped = sorted(set(range(len(source.layers))) - set(kept_layers))
    predicted = float(by_layer[dropped].sum())
    for axis, width in widths.items():
        if width != source.width(axis):
            predicted += _narrowing_loss(source, scores, by_layer, axis, width, kept_layers)
    return Candidate(
        counts=counts,
        widths=widths,
        memory_bytes=memory_breakdown(architecture, deployment).total_bytes,
        num_parameters=architecture.num_parameters,
        predicted_loss=predicted,
        architecture=architecture,
    )


def _narrowing_loss(
    source: Architecture, scores: Scores, by_layer: Array, axis: str, width: int, kept_layers: Sequence[int]
) -> float:
    """A narrowed layer is charged the share of its score that the lost units have in its units' squared scores."""
    total = 0.0
    for layer_idx in kept_layers:
        size = source.layers[layer_idx].sizes.get(axis)
        if size is None:
            continue
        key = axis if axis == "hidden" else f"{axis}.{layer_idx}"
        if key in scores.units:
            energy = np.sort(scores.units[key].astype(np.float64) ** 2)
            share = float(energy[: size - width].sum() / max(energy.sum(), np.finfo(np.float64).tiny))
        else:  # only layer scores are known, as in files measured elsewhere
            share = (size - width) / size
        total += float(by_layer[layer_idx]) * share
    return total


def plan_of(source: Architecture, scores: Scores, candidate: Candidate, *, metric: str) -> Plan:
    """The plan of a candidate, with the figures it was chosen by."""
    notes = {
        "pattern": candidate.architecture.pattern,
        "num_parameters": candidate.num_parameters,
        "memory_bytes": candidate.memory_bytes,
        "predicted_loss": candidate.predicted_loss,
        "metric": metric,
    }
    return make_plan(source, scores, counts=candidate.counts, widths=candidate.widths, metric=metric, notes=notes)
