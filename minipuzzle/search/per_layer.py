"""Per-layer search: one exact mixed-integer programme over what happens to each layer.

Each layer is dropped, kept whole, or kept at one of its allowed widths; each choice has a predicted loss and costs, and
all of them add up. HiGHS finds the choices of least loss within the limits. Further solutions exclude those found
before (no-good cuts). As HiGHS works in floating point, each answer is added up again in whole numbers, and one that
exceeds a limit after all is excluded like the others; so what is returned is the true optimum, not a near one.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd, inf

import numpy as np

from minipuzzle.architecture.model import Architecture
from minipuzzle.search.candidates import Candidate
from minipuzzle.search.costs import COSTS, Costs, Floats, Limits, Pricing
from minipuzzle.search.infeasible import Infeasibility
from minipuzzle.search.predicted_loss import LossModel
from minipuzzle.search.space import SearchSpace

Choice = tuple[int, ...]  # positions of the chosen options, one of each group of layers
Row = tuple[Floats, float, float]  # coefficients of a linear constraint, its lower and its upper bound


@dataclass(frozen=True, kw_only=True)
class LayerOption:
    """One thing that may happen to layers that stay or go together. ``widths``: per layer; None if they go."""

    layers: tuple[int, ...]
    widths: tuple[dict[str, int], ...] | None
    costs: Floats
    loss: float


@dataclass(frozen=True, kw_only=True)
class PerLayerProblem:
    """All options of all layers. ``groups``: positions in ``options`` of those of each group of layers, of which one is
    chosen. ``outer``: costs of what lies around the layers."""

    source: Architecture
    pricing: Pricing
    space: SearchSpace
    options: tuple[LayerOption, ...]
    groups: tuple[tuple[int, ...], ...]
    outer: Floats

    def candidates(self, limits: Limits, *, number: int, min_different: int = 1) -> list[Candidate]:
        """The best choices, by predicted loss; each differs from all before it in at least so many layers.

        Raises: InfeasibleBudgetError if there is none at all.
        """
        losses = np.array([option.loss for option in self.options])
        excluded: list[tuple[Choice, int]] = []
        found: list[Candidate] = []
        while len(found) < number:
            choice = self._solve(losses, limits, excluded)
            if choice is None:
                break
            found.append(self._candidate(choice, limits))
            excluded.append((choice, min_different))
        if not found:
            raise self._infeasibility(limits).error()
        return found

    def _costs(self) -> Floats:
        return np.array([option.costs for option in self.options])

    def _solve(self, objective: Floats, limits: Limits, excluded: Sequence[tuple[Choice, int]]) -> Choice | None:
        """The choice of least objective within the limits, apart from those excluded; None if there is none."""
        wrong: list[tuple[Choice, int]] = []
        while True:
            choice = self._solve_in_floats(objective, limits, [*excluded, *wrong])
            if choice is None:
                return None
            total = self.outer + self._costs()[list(choice)].sum(axis=0)
            if (total <= limits.as_array()).all():
                return choice
            wrong.append((choice, 1))

    def _solve_in_floats(
        self, objective: Floats, limits: Limits, excluded: Sequence[tuple[Choice, int]]
    ) -> Choice | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        one_of_each_group: list[Row] = [(self._indicator(group), 1, 1) for group in self.groups]
        rows = [*one_of_each_group, *self._counts(), *self._limits(limits)]
        for choice, min_different in excluded:
            rows.append((self._indicator(choice), -inf, len(self.groups) - min_different))
        num_variables = len(self.options) + self._num_count_choices()
        matrix = np.zeros((len(rows), num_variables))
        for row, (coefficients, _low, _high) in zip(matrix, rows, strict=True):
            row[: len(coefficients)] = coefficients
        # HiGHS stops within 1e-6 of the optimum; the scale makes that small beside any difference of losses.
        scale = 1e5 / (float(np.abs(objective).max()) or 1.0)
        padded = np.zeros(num_variables)
        padded[: len(objective)] = objective * scale
        constraints = LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows])
        with _silent_standard_output():
            result = milp(
                padded,
                integrality=np.ones(num_variables),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
        if result.x is None:
            assert result.status == 2, f"HiGHS stopped: {result.message}"
            return None
        chosen = result.x[: len(self.options)]
        return tuple(max(group, key=lambda idx: chosen[idx]) for group in self.groups)

    def _indicator(self, choice: Sequence[int]) -> Floats:
        row = np.zeros(len(self.options))
        row[list(choice)] = 1
        return row

    def _limits(self, limits: Limits) -> list[Row]:
        """One row a limit, in units of the costs' common divisor, with half a unit of room: a choice that just fits is
        never lost to rounding, and one that does not is found out afterwards."""
        rows: list[Row] = []
        costs = self._costs()
        for idx, name in enumerate(COSTS):
            if (limit := getattr(limits, name)) == inf:
                continue
            unit = gcd(*(int(cost) for cost in costs[:, idx])) or 1
            room = np.floor((limit - self.outer[idx]) / unit)
            rows.append((costs[:, idx] / unit, -inf, room + 0.5))
        return rows

    def _counts(self) -> list[Row]:
        """The number of layers of each kind that stay is one of those allowed. Numbers with gaps are chosen by further
        variables, of which one is 1."""
        rows: list[Row] = []
        offset = len(self.options)
        num_variables = offset + self._num_count_choices()
        for kind, allowed in self.space.counts.items():
            kept = [
                idx
                for idx, option in enumerate(self.options)
                if option.widths is not None and self.source.layers[option.layers[0]].kind == kind
            ]
            row = np.zeros(num_variables)
            row[kept] = 1
            if _is_contiguous(allowed):
                rows.append((row, allowed[0], allowed[-1]))
                continue
            one = np.zeros(num_variables)
            one[offset : offset + len(allowed)] = 1
            row[offset : offset + len(allowed)] = [-count for count in allowed]
            rows += [(row, 0, 0), (one, 1, 1)]
            offset += len(allowed)
        return rows

    def _num_count_choices(self) -> int:
        return sum(len(allowed) for allowed in self.space.counts.values() if not _is_contiguous(allowed))

    def _candidate(self, choice: Choice, limits: Limits) -> Candidate:
        chosen = [self.options[idx] for idx in choice]
        widths_of = {
            layer_idx: widths
            for option in chosen
            if option.widths is not None
            for layer_idx, widths in zip(option.layers, option.widths, strict=True)
        }
        fixed = {axis: widths[0] for axis, widths in self.space.widths.items() if len(widths) == 1}
        varied = {idx: {a: w for a, w in widths.items() if a not in fixed} for idx, widths in widths_of.items()}
        total = self.outer + sum(option.costs for option in chosen)
        return Candidate(
            source=self.source,
            kept_layers=tuple(sorted(widths_of)),
            widths=fixed,
            layer_widths={idx: widths for idx, widths in sorted(varied.items()) if widths},
            costs=Costs.from_array(total, is_timed=self.pricing.timings is not None),
            predicted_loss=sum(option.loss for option in chosen),
            layout=self.space.layout,
            pricing=self.pricing,
            limits=limits,
        )

    def _infeasibility(self, limits: Limits) -> Infeasibility:
        nothing = Limits()
        least = [self._solve(costs, nothing, []) for costs in self._costs().T]
        assert all(choice is not None for choice in least), "without limits there is always a choice"
        totals = [self.outer + self._costs()[list(choice or ())].sum(axis=0) for choice in least]
        others = Limits(**{name: limit for name, limit in limits.given().items() if name != "memory_bytes"})
        within = self._solve(self._costs()[:, 0], others, [])
        return Infeasibility(
            limits=limits,
            smallest=self._candidate(least[0] or (), limits).architecture,
            least=np.array([total[idx] for idx, total in enumerate(totals)]),
            pricing=self.pricing,
            space=self.space,
            smallest_within=None if within is None else float((self.outer + self._costs()[list(within)].sum(0))[0]),
        )


@contextmanager
def _silent_standard_output() -> Iterator[None]:
    """HiGHS prints notes of its own past Python's standard output, where they would spoil --json."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _is_contiguous(allowed: Sequence[int]) -> bool:
    return len(allowed) == allowed[-1] - allowed[0] + 1


def per_layer_problem(loss: LossModel, pricing: Pricing, space: SearchSpace) -> PerLayerProblem:
    """The options of every layer under a space, priced."""
    source = loss.source
    options: list[LayerOption] = []
    groups: list[Choice] = []
    for together in source.removable(space.layout):
        found = [_kept(loss, pricing, together, widths) for widths in _width_choices(source, space, together)]
        if not space.keep_layers & set(together):
            removal = float(loss.removal[list(together)].sum())
            found.append(LayerOption(layers=together, widths=None, costs=np.zeros(len(COSTS)), loss=removal))
        groups.append(tuple(range(len(options), len(options) + len(found))))
        options += found
    hidden = space.widths.get("hidden", (source.hidden,))[0]
    return PerLayerProblem(
        source=source,
        pricing=pricing,
        space=space,
        options=tuple(options),
        groups=tuple(groups),
        outer=pricing.outer(hidden),
    )


def _width_choices(source: Architecture, space: SearchSpace, together: tuple[int, ...]) -> list[list[dict[str, int]]]:
    """All combinations of widths of layers that stay or go together, one dictionary a layer."""
    by_layer = []
    for layer_idx in together:
        axes = [axis for axis in space.widths if axis in source.layers[layer_idx].sizes]
        combinations = itertools.product(*(space.widths[axis] for axis in axes))
        by_layer.append([dict(zip(axes, chosen, strict=True)) for chosen in combinations])
    return [list(chosen) for chosen in itertools.product(*by_layer)]


def _kept(
    loss: LossModel, pricing: Pricing, together: tuple[int, ...], widths: Sequence[dict[str, int]]
) -> LayerOption:
    cut = [loss.source.layers[idx].resized(**chosen) for idx, chosen in zip(together, widths, strict=True)]
    return LayerOption(
        layers=together,
        widths=tuple(widths),
        costs=np.sum([pricing.layer(layer) for layer in cut], axis=0),
        loss=sum(loss.narrowing(idx, chosen) for idx, chosen in zip(together, widths, strict=True)),
    )
