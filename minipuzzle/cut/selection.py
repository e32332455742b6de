"""From rankings to a plan: which layers and units stay, once their numbers are given.

Layers are ranked inside their kind, units inside their layer (and group). Ties go against the later one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minipuzzle.architecture.kinds import kind_of_axis, owner_of_axis
from minipuzzle.architecture.model import UNIFORM, Architecture
from minipuzzle.cut.figures import Figures
from minipuzzle.cut.plan import Plan, Units
from minipuzzle.cut.scores import FINAL, Array, Scores
from minipuzzle.errors import MinipuzzleError


def rank_layers(
    source: Architecture,
    layer_scores: Array,
    layout: str = UNIFORM,
    keep_layers: frozenset[int] = frozenset(),
) -> dict[str, list[tuple[int, ...]]]:
    """For each kind, what of it stays or goes together, best first: what must stay, then by score.

    Layers that can only go together (``Architecture.removable``) are of the kind of the first of them, and are worth
    the sum of their scores. Of equals the later one comes last, and so goes first.
    """
    ranked: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in source.removable_counts(layout)}
    for together in source.removable(layout):
        ranked[source.layers[together[0]].kind].append(together)

    def score(together: tuple[int, ...]) -> float:
        return float(layer_scores[list(together)].sum())

    # Sorting keeps the order of equals: scores 3, 5, 5 of layers 0, 4, 7 give 4, 7, 0; if 0 must stay, 0, 4, 7.
    for found in ranked.values():
        found.sort(key=score, reverse=True)
        found.sort(key=lambda together: not keep_layers & set(together))
    return ranked


def keep_best_units(unit_scores: Array, num_kept: int, num_groups: int = 1) -> tuple[int, ...]:
    """Ascending indices of the best units, as many from each of ``num_groups`` equal groups.

    Raises: MinipuzzleError if the units cannot be divided so.
    """
    if num_kept % num_groups or unit_scores.size % num_groups or not 0 < num_kept <= unit_scores.size:
        raise MinipuzzleError(
            f"cannot keep {num_kept} of {unit_scores.size} units in {num_groups} equal groups",
            "choose a width that the groups divide",
        )
    by_group = unit_scores.reshape(num_groups, -1)
    best_first = np.argsort(-by_group, axis=1, kind="stable")[:, : num_kept // num_groups]
    offsets = np.arange(num_groups)[:, None] * by_group.shape[1]
    return tuple(int(unit) for unit in np.sort((best_first + offsets).ravel()))


def make_plan(
    source: Architecture,
    scores: Scores,
    *,
    kept_layers: Sequence[int],
    widths: Mapping[int, Mapping[str, int]],
    figures: Figures | None = None,
) -> Plan:
    """The plan that keeps these layers, and in each of them the best units for its widths (layer -> axis -> width).

    Raises: MinipuzzleError if scores are missing or numbers impossible.
    """
    kept_units: dict[str, dict[int | None, Units]] = {}
    chosen_units: dict[str, dict[int | None, tuple[Units, ...]]] = {}
    for layer_idx in kept_layers:
        for axis, width in widths.get(layer_idx, {}).items():
            if width == source.layers[layer_idx].sizes[axis]:
                continue
            kind, owner = kind_of_axis(axis), owner_of_axis(axis, layer_idx)
            by_layer = kept_units.setdefault(axis, {})
            if axis in kind.chosen_by_unit:
                of_each = scores.unit_scores(axis, owner)
                chosen_units.setdefault(axis, {})[owner] = tuple(keep_best_units(row, width) for row in of_each)
                by_layer[owner] = tuple(range(width))
            elif owner not in by_layer:
                by_layer[owner] = best_units(source, scores, axis, owner, width)
    without_scales = Plan(
        source_fingerprint=source.fingerprint(),
        kept_layers=tuple(kept_layers),
        kept_units=kept_units,
        chosen_units=chosen_units,
        figures=figures,
        model_fingerprint=scores.metadata.get("model_fingerprint"),
    )
    return replace(without_scales, norm_scales=norm_scales(source, scores, without_scales))


def layer_scores(scores: Scores, metric: str) -> Array:
    """Layer scores by one metric.

    Raises: MinipuzzleError if it was not measured.
    """
    if metric not in scores.layer:
        raise MinipuzzleError(f"the scores hold no layer metric {metric!r}", f"they hold {', '.join(scores.layer)}")
    return scores.layer[metric]


def best_units(source: Architecture, scores: Scores, axis: str, layer_idx: int | None, width: int) -> Units:
    """The best units of an axis in a layer, or in the whole model (None), as many from each group."""
    group_axis = kind_of_axis(axis).unit_groups.get(axis)
    num_groups = source.sizes(layer_idx)[group_axis] if group_axis else 1
    return keep_best_units(scores.unit_scores(axis, layer_idx), width, num_groups)


def norm_scales(source: Architecture, scores: Scores, plan: Plan) -> dict[str, tuple[float, ...]]:
    """Factors for the weights of RMS norms whose channels are cut: sqrt of kept over all mean square, per group.

    An RMS norm divides by the root of the mean square over its group; leaving channels out changes that mean, and
    with it the scale of those that stay. With silent channels the factor is sqrt(old width / new width).
    """
    from minipuzzle.cut.surgery import kept_positions

    scales = {}
    of_layers = (source.layer_tensors(layer_idx) for layer_idx in plan.kept_layers)
    for placed in itertools.chain(*of_layers, source.outer_tensors()):
        if not placed.spec.rms_groups:
            continue
        kept_units = plan.units_of(placed)
        positions = kept_positions(placed.spec.dims[0], placed.sizes, kept_units)
        if positions is not None:
            measured = kind_of_axis(next(iter(kept_units))).inner_norm_energy
            energy = scores.energy(f"{measured}.{FINAL if placed.layer_idx is None else placed.layer_idx}")
            scales[placed.name] = _energy_scales(energy, positions, placed.spec.rms_groups)
    return scales


def _energy_scales(energy: Array, kept: np.ndarray[Any, Any], num_groups: int) -> tuple[float, ...]:
    group_size = energy.size // num_groups
    all_mean = energy.astype(np.float64).reshape(num_groups, group_size).mean(axis=1)
    factors = []
    for group in range(num_groups):
        in_group = kept[kept // group_size == group]
        kept_mean = float(energy[in_group].astype(np.float64).mean())
        # A group that was silent in calibration has nothing to restore.
        factors.append(float(np.sqrt(kept_mean / all_mean[group])) if min(kept_mean, all_mean[group]) > 0 else 1.0)
    return tuple(factors)
