"""Candidates: what a search returns. Which layers stay, how wide each is, what the model costs and should lose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.model import UNIFORM, Architecture
from minipuzzle.cut.plan import num_layers_different
from minipuzzle.search.costs import Costs, Limits, Pricing, check_limits


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A cut of ``source`` in numbers. ``widths`` hold in all layers; ``layer_widths`` (layer index -> axis -> width) in
    single ones, beside them. ``limits`` are those it was searched under, ``pricing`` says how costs were counted."""

    source: Architecture = field(repr=False)
    kept_layers: tuple[int, ...]
    widths: Mapping[str, int]
    layer_widths: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    costs: Costs
    predicted_loss: float
    layout: str = UNIFORM
    pricing: Pricing = field(repr=False)
    limits: Limits = field(default_factory=Limits, repr=False)

    @property
    def memory_bytes(self) -> int:
        """Memory at the deployment of the search."""
        return self.costs.memory_bytes

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return self.costs.num_parameters

    @property
    def counts(self) -> dict[str, int]:
        """Layers of each kind that stay, 0 where all go; layers that go together count as one."""
        kept = set(self.kept_layers)
        counts = dict.fromkeys(self.source.removable_counts(self.layout), 0)
        for together in self.source.removable(self.layout):
            if together[0] in kept:
                counts[self.source.layers[together[0]].kind] += 1
        return counts

    def widths_of(self, layer_idx: int) -> dict[str, int]:
        """Widths of one layer on the axes that it has."""
        sizes = self.source.layers[layer_idx].sizes
        widths = {**self.widths, **self.layer_widths.get(layer_idx, {})}
        return {axis: width for axis, width in widths.items() if axis in sizes}

    @cached_property
    def treatment(self) -> dict[int, dict[str, int]]:
        """The widths of each layer that stays."""
        return {layer_idx: self.widths_of(layer_idx) for layer_idx in self.kept_layers}

    @cached_property
    def architecture(self) -> Architecture:
        """What is left of the source."""
        return resized(self.source, self.treatment)

    def check(self) -> None:
        """Count all costs anew from the whole architecture and hold them against every limit.

        Raises: MinipuzzleError if a limit is exceeded; an assert if the search summed wrongly.
        """
        anew = self.pricing.model(self.architecture)
        assert anew == self.costs, f"the search counted {self.costs}, the whole model costs {anew}"
        check_limits(anew, self.limits)

    def describe(self) -> str:
        """A short name for tables."""
        counts = self.architecture.layer_counts
        words = [f"{counts.get(kind, 0)}{LAYER_KINDS[kind].symbol}" for kind in self.source.layer_counts]
        ranges: dict[str, list[int]] = {}
        for widths in self.layer_widths.values():
            for axis, width in widths.items():
                ranges.setdefault(axis, []).append(width)
        uniform = [f"{axis} {width}" for axis, width in self.widths.items() if axis not in ranges]
        mixed = [
            f"{axis} {min(found)}" + (f"..{max(found)}" if max(found) > min(found) else "")
            for axis, found in ranges.items()
        ]
        return f"{' '.join(words)}  {' '.join((*uniform, *mixed))}".strip()

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        facts: dict[str, Any] = {
            "counts": self.counts,
            "widths": dict(self.widths),
            "memory_bytes": self.costs.memory_bytes,
            "num_parameters": self.costs.num_parameters,
            "num_active_parameters": self.costs.num_active_parameters,
            "predicted_loss": self.predicted_loss,
            "dropped_layers": list(self.source.layers_besides(self.kept_layers)),
        }
        if self.layer_widths:
            facts["layer_widths"] = {str(idx): dict(widths) for idx, widths in self.layer_widths.items()}
        if self.costs.step_nanoseconds is not None:
            facts["step_seconds"] = self.costs.step_nanoseconds / 1e9
            facts["tokens_per_second"] = self.pricing.throughput(self.costs)
        return facts


def resized(source: Architecture, kept: Mapping[int, Mapping[str, int]]) -> Architecture:
    """The architecture of some layers of a source (position -> widths), in order."""
    layers = tuple(source.layers[layer_idx].resized(**kept[layer_idx]) for layer_idx in sorted(kept))
    hidden = next((widths["hidden"] for widths in kept.values() if "hidden" in widths), source.hidden)
    return source.cut_to(layers, hidden)


def diverse(candidates: Iterable[Candidate], min_different: int, max_number: int | None = None) -> list[Candidate]:
    """The first candidates of a list that differ from each chosen before in at least so many layers."""
    chosen: list[Candidate] = []
    for candidate in candidates:
        if max_number is not None and len(chosen) == max_number:
            break
        differences = (num_layers_different(candidate.treatment, earlier.treatment) for earlier in chosen)
        if all(different >= min_different for different in differences):
            chosen.append(candidate)
    return chosen
