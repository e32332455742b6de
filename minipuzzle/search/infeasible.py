"""Why nothing fits: the smallest model within the bounds, what it costs term by term, and which bound holds it up."""

from __future__ import annotations

from dataclasses import dataclass, replace

from minipuzzle.architecture.kinds import TRUNK
from minipuzzle.architecture.memory import memory_breakdown
from minipuzzle.architecture.model import Architecture
from minipuzzle.errors import InfeasibleBudgetError
from minipuzzle.search.costs import COSTS, Floats, Limits, Pricing
from minipuzzle.search.space import SearchSpace, default_step


@dataclass(frozen=True, kw_only=True)
class Infeasibility:
    """``smallest``: the model of the space that needs least memory. ``least``: the least of each cost over the space,
    in the order of COSTS. ``smallest_within``: the least memory among models that meet all other limits, if any do."""

    limits: Limits
    smallest: Architecture
    least: Floats
    pricing: Pricing
    space: SearchSpace
    smallest_within: float | None = None

    def error(self) -> InfeasibleBudgetError:
        """The error to raise."""
        numbers = [f"{kind}={self.smallest.layer_counts.get(kind, 0)}" for kind in self.space.counts]
        numbers += [f"{axis}={widths[0]}" for axis, widths in self.space.widths.items()]
        breakdown = memory_breakdown(self.smallest, self.pricing.deployment)
        needs = (
            f"the smallest candidate ({', '.join(numbers)}) needs "
            f"{COSTS['memory_bytes'][1](breakdown.total_bytes)} ({breakdown.describe()})"
        )
        missed = [name for name, least in zip(COSTS, self.least, strict=True) if least > getattr(self.limits, name)]
        problem = "; ".join(self._missed(name) for name in missed) or self._not_together()
        options = " or ".join(COSTS[name][2] for name in missed or self.limits.given())
        hint = f"raise {options}, lower ‹context› or a precision, or loosen a bound"
        return InfeasibleBudgetError(f"nothing fits: {problem}; {needs}{self._binding(missed)}", hint)

    def _missed(self, name: str) -> str:
        label, show, _option = COSTS[name]
        least = self.least[list(COSTS).index(name)]
        return f"{label} {show(getattr(self.limits, name))} is asked for, {show(least)} is the least"

    def _not_together(self) -> str:
        given = " and ".join(f"{COSTS[name][0]} {COSTS[name][1](limit)}" for name, limit in self.limits.given().items())
        text = f"{given} can each be met, but not together"
        if self.smallest_within is not None:
            text += f" (within the others the least memory is {COSTS['memory_bytes'][1](self.smallest_within)})"
        return text

    def _binding(self, missed: list[str]) -> str:
        """Which bounds, lifted alone, would let something fit; or that none would."""
        if not missed or "step_nanoseconds" in missed:  # times are known only of layers that were measured
            return ""
        pricing = replace(self.pricing, timings=None)
        lifted = {f"{kind} layers": self._without_kind(kind) for kind in self.smallest.layer_counts}
        lifted |= {
            f"widths of {axis}": self._narrowest(axis) for axis in self.space.widths if axis not in TRUNK.prunable_axes
        }
        enough = [bound for bound, model in lifted.items() if not self.limits.violated(pricing.model(model))]
        if enough:
            return f"; what binds is the lower bound on {' or '.join(enough)}: without it something fits"
        return "; no single bound is to blame: without any one of them nothing fits either"

    def _without_kind(self, kind: str) -> Architecture:
        layers = tuple(layer for layer in self.smallest.layers if layer.kind != kind)
        return replace(self.smallest, layers=layers)

    def _narrowest(self, axis: str) -> Architecture:
        unit = default_step(self.smallest, axis, granularity=1)
        layers = tuple(
            layer.resized(**{axis: min(unit, layer.sizes[axis])}) if axis in layer.sizes else layer
            for layer in self.smallest.layers
        )
        return replace(self.smallest, layers=layers)
