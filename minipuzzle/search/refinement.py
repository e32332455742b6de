"""Local search from a measured plan: one layer more, one for another, two for one; measured, not predicted.

Scores of single layers ignore how layers act together. So plans near the best one are run on validation tokens, all
neighbours of a round with shared prefixes, and the search moves on while that helps.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan
from minipuzzle.cut.scores import Array, Scores
from minipuzzle.cut.selection import keep_best_units, norm_scales
from minipuzzle.quality.ranked import RankedPlan, best_first

MAX_NEIGHBOURS = 60  # measured in a round; those that the scores think best

Layers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Where a local search ended. ``path``: the best plan of each round that improved, from the start on;
    ``measured``: all neighbours."""

    path: tuple[RankedPlan, ...]
    measured: tuple[RankedPlan, ...]

    @property
    def best(self) -> RankedPlan:
        """The plan that no measured neighbour beats."""
        return self.path[-1]

    def to_json(self, source: Architecture, scores: Scores) -> dict[str, Any]:
        """What the search gained, and how far measured KLs are from sums of single layers' KLs (nats/token)."""
        start, best = self.path[0], self.best
        facts: dict[str, Any] = {
            "rounds": len(self.path) - 1,
            "neighbours_measured": len(self.measured),
            "before": start.quality.to_json(),
            "after": best.quality.to_json(),
            "layers_exchanged": sorted(set(start.plan.kept_layers) ^ set(best.plan.kept_layers)),
        }
        if "kl" in scores.layer:
            facts["sum_of_dropped_layers_kl"] = {
                name: float(scores.layer["kl"][list(source.layers_besides(item.plan.kept_layers))].sum())
                for name, item in (("before", start), ("after", best))
            }
        return facts


def refine(
    start: RankedPlan,
    *,
    neighbours: Callable[[Plan], Sequence[Plan]],
    measure: Callable[[Sequence[Plan]], Sequence[RankedPlan]],
    rank_by: str,
) -> Refinement:
    """Move to the best measured neighbour until none is better; no plan is measured twice."""
    path, seen = [start], {start.plan.kept_layers}
    measured: list[RankedPlan] = []
    while True:
        unseen = [plan for plan in neighbours(path[-1].plan) if plan.kept_layers not in seen]
        if not unseen:
            break
        seen |= {plan.kept_layers for plan in unseen}
        found = measure(unseen)
        measured += found
        best = best_first([path[-1], *found], rank_by)[0]
        if best is path[-1]:
            break
        path.append(best)
    return Refinement(path=tuple(path), measured=tuple(measured))


def neighbours_of(
    source: Architecture,
    scores: Scores,
    plan: Plan,
    *,
    layer_scores: Array,
    removable: Sequence[Layers],
    allowed_counts: Mapping[str, Sequence[int]],
    fits: Callable[[Architecture], bool],
    fixed_layers: frozenset[int] = frozenset(),
    max_number: int = MAX_NEIGHBOURS,
) -> list[Plan]:
    """Plans with layers of a plan added or exchanged, within all limits, best predicted first.

    ``removable``: what is kept or removed together. ``allowed_counts``: kind of the first of them -> numbers allowed.
    ``fits``: whether an architecture is within the limits. Widths stay; a layer that comes in takes those of its kind.
    """
    kept = set(plan.kept_layers)
    options = []
    for added, dropped in _moves(removable, kept):
        if fixed_layers & dropped:
            continue
        kept_layers = tuple(sorted((kept - dropped) | added))
        counts = Counter(source.layers[group[0]].kind for group in removable if group[0] in kept_layers)
        if all(counts[kind] in allowed for kind, allowed in allowed_counts.items()):
            change = float(layer_scores[sorted(dropped)].sum() - layer_scores[sorted(added)].sum())
            options.append((change, kept_layers))
    found: list[Plan] = []
    for change, kept_layers in sorted(options):
        if len(found) == max_number:
            break
        neighbour = with_layers(source, scores, plan, kept_layers)
        if fits(neighbour.apply(source)):
            predicted = float(plan.notes.get("predicted_loss", 0.0)) + change
            found.append(replace(neighbour, notes={**plan.notes, "predicted_loss": predicted}))
    return found


def _moves(removable: Sequence[Layers], kept: set[int]) -> Iterator[tuple[set[int], set[int]]]:
    """(layers added, layers dropped): one in, one for another, two for one."""
    inside = [set(group) for group in removable if group[0] in kept]
    outside = [set(group) for group in removable if group[0] not in kept]
    pairs = [one | other for one, other in itertools.combinations(outside, 2)]
    yield from ((added, set()) for added in outside)
    yield from itertools.product((*outside, *pairs), inside)


def with_layers(source: Architecture, scores: Scores, plan: Plan, kept_layers: Layers) -> Plan:
    """A plan with other layers kept, at the widths that the plan gives to layers of their kinds."""
    kept_units: dict[str, dict[str, tuple[int, ...]]] = {}
    for axis, by_layer in plan.kept_units.items():
        if axis == "hidden":
            kept_units[axis] = dict(by_layer)
            continue
        width = Counter(len(units) for units in by_layer.values()).most_common(1)[0][0]
        for layer_idx in kept_layers:
            layer = source.layers[layer_idx]
            kind = LAYER_KINDS[layer.kind]
            if str(layer_idx) in by_layer:
                kept_units.setdefault(axis, {})[str(layer_idx)] = by_layer[str(layer_idx)]
            elif axis in kind.prunable_axes and axis in layer.sizes and layer_idx not in plan.kept_layers:
                groups = layer.sizes[kind.unit_groups[axis]] if axis in kind.unit_groups else 1
                units = keep_best_units(scores.unit_scores(axis, layer_idx), width, groups)
                kept_units.setdefault(axis, {})[str(layer_idx)] = units
    changed = replace(plan, kept_layers=kept_layers, kept_units=kept_units, norm_scales={})
    return replace(changed, norm_scales=norm_scales(source, scores, changed))
