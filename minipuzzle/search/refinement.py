"""Local search from a measured plan: one layer more, one for another, two for one; measured, not predicted.

Scores of single layers ignore how layers act together. So plans near the best one are run on validation tokens, all
neighbours of a round with shared prefixes, and the search moves on while that helps.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan, Units
from minipuzzle.cut.scores import Scores
from minipuzzle.cut.selection import best_units, layer_scores, norm_scales
from minipuzzle.quality.ranked import RankedPlan, best_first
from minipuzzle.search.costs import Limits, Pricing
from minipuzzle.search.engine import figures_of
from minipuzzle.search.space import SearchSpace

MAX_NEIGHBOURS = 60  # measured in a round; those that the scores think best

Layers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Where a local search ended. ``path``: the best plan of each round that improved, from the start on;
    ``measured``: all neighbours. ``dropped_layers_kl``: sums of the KLs of the single layers that the first and the
    last plan drop, where those were measured: what their KLs would be if layers did not act together."""

    path: tuple[RankedPlan, ...]
    measured: tuple[RankedPlan, ...]
    dropped_layers_kl: tuple[float, float] | None = None

    @property
    def start(self) -> RankedPlan:
        """The plan that the search began with."""
        return self.path[0]

    @property
    def best(self) -> RankedPlan:
        """The plan that no measured neighbour beats."""
        return self.path[-1]

    @property
    def layers_exchanged(self) -> list[int]:
        """Layers that only one of the first and the last plan keeps."""
        return sorted(set(self.start.plan.kept_layers) ^ set(self.best.plan.kept_layers))

    def with_layer_scores(self, source: Architecture, scores: Scores) -> Refinement:
        """With what single layers' KLs add up to (nats/token), if they were measured."""
        if "kl" not in scores.layer:
            return self
        dropped = (list(source.layers_besides(item.plan.kept_layers)) for item in (self.start, self.best))
        before, after = (float(scores.layer["kl"][layers].sum()) for layers in dropped)
        return replace(self, dropped_layers_kl=(before, after))

    def to_json(self) -> dict[str, Any]:
        """What the search gained, and how far measured KLs are from sums of single layers' KLs (nats/token)."""
        facts: dict[str, Any] = {
            "rounds": len(self.path) - 1,
            "neighbours_measured": len(self.measured),
            "before": self.start.measured(),
            "after": self.best.measured(),
            "layers_exchanged": self.layers_exchanged,
        }
        if self.dropped_layers_kl is not None:
            facts["sum_of_dropped_layers_kl"] = dict(zip(("before", "after"), self.dropped_layers_kl, strict=True))
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


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """Which plans lie beside a plan: those with layers added or exchanged, within bounds (``space``) and limits.

    ``metric``: of the layer scores that predict which are best.
    """

    source: Architecture
    scores: Scores
    metric: str
    space: SearchSpace
    limits: Limits
    pricing: Pricing

    def fits(self, architecture: Architecture) -> bool:
        """Whether an architecture is within all limits."""
        return not self.limits.violated(self.pricing.model(architecture))

    def of(self, plan: Plan) -> list[Plan]:
        """The neighbours of a plan, best predicted first, MAX_NEIGHBOURS at most.

        Widths stay; a layer that comes in takes those of its kind.
        """
        before = plan.figures.predicted_loss if plan.figures else 0.0
        found: list[Plan] = []
        for change, kept_layers in sorted(self._exchanges(set(plan.kept_layers))):
            if len(found) == MAX_NEIGHBOURS:
                break
            neighbour = with_layers(self.source, self.scores, plan, kept_layers)
            architecture = neighbour.apply(self.source)
            if self.fits(architecture):
                figures = figures_of(
                    architecture,
                    self.pricing,
                    limits=self.limits,
                    layout=self.space.layout,
                    predicted_loss=before + change,
                    metric=self.metric,
                )
                found.append(replace(neighbour, figures=figures))
        return found

    def _exchanges(self, kept: set[int]) -> Iterator[tuple[float, Layers]]:
        """(change of the predicted loss, layers that then stay) of each move within the bounds."""
        losses = layer_scores(self.scores, self.metric)
        removable = self.source.removable(self.space.layout)
        for added, dropped in _moves(removable, kept):
            kept_layers = tuple(sorted((kept - dropped) | added))
            counts = Counter(self.source.layers[group[0]].kind for group in removable if group[0] in kept_layers)
            is_allowed = all(counts[kind] in allowed for kind, allowed in self.space.counts.items())
            if is_allowed and not self.space.keep_layers & dropped:
                yield float(losses[sorted(dropped)].sum() - losses[sorted(added)].sum()), kept_layers


def _moves(removable: Sequence[Layers], kept: set[int]) -> Iterator[tuple[set[int], set[int]]]:
    """(layers added, layers dropped): one in, one for another, two for one."""
    inside = [set(group) for group in removable if group[0] in kept]
    outside = [set(group) for group in removable if group[0] not in kept]
    pairs = [one | other for one, other in itertools.combinations(outside, 2)]
    yield from ((added, set()) for added in outside)
    yield from itertools.product((*outside, *pairs), inside)


def with_layers(source: Architecture, scores: Scores, plan: Plan, kept_layers: Layers) -> Plan:
    """A plan with other layers kept, at the widths that the plan gives to layers of their kinds."""
    kept_units: dict[str, dict[int | None, Units]] = {}
    for axis, by_layer in plan.kept_units.items():
        width = Counter(len(units) for units in by_layer.values()).most_common(1)[0][0]
        for layer_idx in (None, *kept_layers):
            if layer_idx in by_layer:
                kept_units.setdefault(axis, {})[layer_idx] = by_layer[layer_idx]
            elif axis in source.own_sizes(layer_idx) and layer_idx not in plan.kept_layers:
                units = best_units(source, scores, axis, layer_idx, width)
                kept_units.setdefault(axis, {})[layer_idx] = units
    changed = replace(plan, kept_layers=kept_layers, kept_units=kept_units, norm_scales={})
    return replace(changed, norm_scales=norm_scales(source, scores, changed))
