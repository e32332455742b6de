"""Models as rows of layers: what each layer is, how wide, in which format, and what it scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minipuzzle.architecture.kinds import LAYER_KINDS, prunable_axes
from minipuzzle.architecture.memory import PRECISIONS
from minipuzzle.architecture.quantities import format_count, format_gib
from minipuzzle.show.page import charts
from minipuzzle.show.page.facts import Step
from minipuzzle.show.page.parts import Cell, Section, Strip, Table

_FULL_BITS = 16

Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The steps of a run, and what most sections ask of them."""

    steps: Sequence[Step]

    @property
    def prune(self) -> Step | None:
        """The last step that cut a model."""
        return next((step for step in reversed(self.steps) if "source" in step.results), None)

    @cached_property
    def models(self) -> list[tuple[str, Facts]]:
        """The source and what the steps left of it, by name."""
        source = [] if self.prune is None else [("source", self.prune.results["source"])]
        return source + [(step.name or step.command, step.model) for step in self.steps if step.model is not None]

    @property
    def budget_bytes(self) -> float | None:
        """The limit of memory that the cut was searched for."""
        return None if self.prune is None else self.prune.results["budget_bytes"]

    @property
    def kept_layers(self) -> Sequence[int] | None:
        """Layers of the source that stayed."""
        return None if self.prune is None else self.prune.results["kept_layers"]

    @property
    def layer_scores(self) -> Mapping[str, Sequence[float | None]]:
        """What the source's layers scored, by metric."""
        found = [step.results["layer_scores"] for step in self.steps if step.results.get("layer_scores")]
        return found[-1] if found else {}


def architecture(run: Run) -> Section | None:
    """The models of a run above each other, training left out, which changes no shape."""
    if not run.models:
        return None
    shown: list[tuple[str, Facts]] = []
    for name, model in run.models:
        if model["layers"] not in [other["layers"] for _, other in shown]:
            shown.append((name, model))
    is_cut = run.kept_layers is not None
    text = (
        "A bar a layer, first to last: as tall as the share of its parameters that stays"
        f"{', hollow where the layer goes' if is_cut else ''}. The lower bar is as tall as its weights have bits. "
        "Point at a layer, or move with the arrow keys, to read its figures."
    )
    kinds = dict.fromkeys(layer["kind"] for layer in run.models[0][1]["layers"])
    ends = [shown[0], *shown[-1:]] if len(shown) > 1 else shown
    return Section(
        key="layers",
        title="Architecture",
        text=text,
        strips=[Strip(name=name, note=_counts(model), cells=_cells(model, run)) for name, model in shown],
        legend=[(kind, charts.color_of(kind)) for kind in kinds],
        details=[_layer_table(name, model, run) for name, model in ends],
    )


def _cells(model: Facts, run: Run) -> list[Cell | None]:
    """Each layer below the one of the source that it was; None where that has gone."""
    source, kept = run.models[0][1], run.kept_layers
    is_source = model is source
    origins = range(len(model["layers"])) if is_source or kept is None else kept
    cells: list[Cell | None] = []
    for idx, (layer, origin) in enumerate(zip(model["layers"], origins, strict=True)):
        cells += [None] * (origin - len(cells))  # where a layer of the source went
        before, kind = source["layers"][origin], LAYER_KINDS[layer["kind"]]
        bits = PRECISIONS[layer["format"]].bits if layer["format"] in PRECISIONS else _FULL_BITS
        is_dropped = is_source and kept is not None and idx not in kept
        scores = {metric: values[origin] for metric, values in run.layer_scores.items()}
        cells.append(
            Cell(
                symbol=kind.symbol,
                color=kind.color,
                height=round(100 * layer["parameters"] / max(1, before["parameters"])),
                bits=100 * min(bits, _FULL_BITS) // _FULL_BITS,
                is_dropped=is_dropped,
                tip=_in_words(idx, origin, layer, before, scores) + (", left out" if is_dropped else ""),
            )
        )
    return cells


def _in_words(idx: int, origin: int, layer: Facts, before: Facts, scores: Mapping[str, float | None]) -> str:
    words = [f"layer {idx}" + (f" (layer {origin} of the source)" if origin != idx else ""), layer["kind"]]
    for axis, size in layer["sizes"].items():
        whole = before["sizes"].get(axis, size)
        words.append(f"{axis} {size:,}" + (f" of {whole:,}" if whole != size else ""))
    words += [f"{format_count(layer['parameters'])} parameters", layer["format"]]
    return ", ".join(words + [f"{metric} {value:.3g}" for metric, value in scores.items() if value is not None])


def _counts(model: Facts) -> str:
    counts = Counter(layer["kind"] for layer in model["layers"])
    widths: dict[str, set[int]] = {}
    for layer in model["layers"]:
        for axis, size in layer["sizes"].items():
            widths.setdefault(axis, set()).add(size)
    parts = [f"{count} {kind}" for kind, count in counts.items()]
    for axis, sizes in widths.items():
        shown = f"{min(sizes):,}" + (f" to {max(sizes):,}" if len(sizes) > 1 else "")
        parts.append(f"{axis.replace('_', ' ')} {shown}")
    return ", ".join([*parts, f"hidden {model['hidden']:,}"])


def _layer_table(name: str, model: Facts, run: Run) -> Table:
    axes = [axis for axis in prunable_axes() if any(axis in layer["sizes"] for layer in model["layers"])]
    is_source = run.kept_layers is not None and model is run.models[0][1]
    metrics = run.layer_scores if is_source else {}
    rows = []
    for idx, layer in enumerate(model["layers"]):
        sizes = (f"{layer['sizes'][axis]:,}" if axis in layer["sizes"] else "" for axis in axes)
        facts = (format_count(layer["parameters"]), format_gib(layer["memory_bytes"]), layer["format"])
        figures = ("" if values[idx] is None else f"{values[idx]:.3g}" for values in metrics.values())
        fate = ("stays" if idx in (run.kept_layers or ()) else "goes",) if is_source else ()
        rows.append((str(idx), layer["kind"], *sizes, *facts, *figures, *fate))
    header = ("layer", "kind", *axes, "parameters", "memory", "format", *metrics, *(("",) if is_source else ()))
    return Table(caption=f"All layers: {name}", header=header, rows=rows, num_names=2)
