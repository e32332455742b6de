"""Charts of a page as SVG that takes its colours and fonts from the page, with text that can be read and searched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.quantities import GIB, format_count, format_gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that the page replaces by its own, which differ by day and by night.
INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = ("#010110", "#010111", "#010112", "#010113", "#010114", "#010115", "#010116", "#010117")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {c: f"--c{i}" for i, c in enumerate(SERIES)}
_DOTS = 22
_MANY_POINTS = 40


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture with its heading, and what it says in words."""

    title: str
    svg: str
    alt: str


@contextmanager
def _axes(name: str, height: float = 2.5) -> Iterator[tuple[Axes, list[str]]]:
    """Axes as wide as a phone; what they become is put into the list."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5, "text.color": INK}
    settings |= {f"{part}.color": MUTED for part in ("xtick", "ytick")}
    settings |= {"axes.edgecolor": GRID, "axes.labelcolor": MUTED, "grid.color": GRID, "axes.axisbelow": True}
    out: list[str] = []
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.7, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        yield axes, out
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    out.append(text.getvalue())


def _chart(name: str, title: str, alt: str, raw: str) -> Chart:
    """A drawn figure as a part of a page: no head, no names that another chart has too, the page's colours."""
    svg = raw[raw.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    opening = f'<svg role="img" aria-labelledby="{name}-t" viewBox="0 0 {width} {height}" width="{width}">'
    svg = re.sub(r"^<svg[^>]*>", f'{opening}<title id="{name}-t">{_escaped(alt)}</title>', svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return Chart(title=title, svg=re.sub(r">\s+<", "><", svg), alt=alt)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def color_of(kind: str) -> str:
    """The colour of a kind of layer."""
    return LAYER_KINDS[kind].color if kind in LAYER_KINDS else MUTED


def memory_chart(models: Sequence[tuple[str, Mapping[str, Any]]], budget_bytes: float | None) -> Chart:
    """Memory when served of some models, (name, facts) each, term by term, against a budget."""
    terms = memory_terms([model for _, model in models])
    largest = max(budget_bytes or 0, *(model["memory_bytes"] for _, model in models))
    unit, unit_bytes = _scale(largest)
    with _axes("memory", 0.9 + 0.4 * len(models)) as (axes, out):
        names = [f"{name}\n{model['memory_bytes'] / unit_bytes:,.3g} {unit}" for name, model in models]
        left = [0.0] * len(models)
        for idx, term in enumerate(terms):
            sizes = [model["memory"].get(term, 0) / unit_bytes for _, model in models]
            axes.barh(names, sizes, 0.62, left=left, color=SERIES[idx % len(SERIES)])
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        if budget_bytes is not None:
            place = budget_bytes / unit_bytes
            axes.axvline(place, color=INK, linestyle="--", linewidth=1)
            axes.annotate("budget", (place, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
        axes.set(xlabel=unit, xlim=(0, 1.04 * largest / unit_bytes))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0, labelcolor=INK)
    sizes_in_words = ", ".join(f"{name} {format_gib(model['memory_bytes'])}" for name, model in models)
    limit = "" if budget_bytes is None else f"; the budget is {format_gib(int(budget_bytes))}"
    return _chart("memory", "Memory when served", f"{sizes_in_words}{limit}.", out[0])


def memory_terms(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The terms of memory that some model has, with the variable of each one's colour."""
    shown = [term for term in models[0]["memory"] if any(model["memory"].get(term) for model in models)]
    return {term: f"--c{idx % len(SERIES)}" for idx, term in enumerate(shown)}


def layer_score_chart(metric: str, values: Sequence[float | None], kinds: Sequence[str], kept: Sequence[int]) -> Chart:
    """The scores of all layers by one metric; layers that went are hollow. Those without a positive score are left out.

    Source: arXiv 2504.03624, figure 9.
    """
    points = {idx: value for idx, value in enumerate(values) if value is not None and value > 0}
    with _axes(f"score-{metric}") as (axes, out):
        axes.plot(list(points), list(points.values()), color=GRID, linewidth=1, zorder=0)
        for kind in dict.fromkeys(kinds):
            for stays in (True, False):
                of_kind = {idx: v for idx, v in points.items() if kinds[idx] == kind and (idx in kept) is stays}
                face = color_of(kind) if stays else "none"
                axes.scatter(list(of_kind), list(of_kind.values()), _DOTS, facecolor=face, edgecolor=color_of(kind))
        if points:
            axes.set_yscale("log")
        axes.set(xlabel="layer", ylabel=metric)
        axes.grid(axis="y", linewidth=0.5)
    alt = f"Scores ({metric}) of {len(points)} layers, logarithmic; dropped layers are hollow."
    if points:
        lowest, highest = (pick(points, key=lambda idx: points[idx]) for pick in (min, max))
        alt += f" Lowest: layer {lowest} ({points[lowest]:.3g}); highest: layer {highest} ({points[highest]:.3g})."
    return _chart(f"score-{metric}", f"Layer scores: {metric}", alt, out[0])


def unit_score_chart(axis: str, by_layer: Mapping[int | None, Sequence[float]], kept_fraction: float) -> Chart:
    """How unequal the units of an axis are: the scores of each layer from best to worst, by its own best."""
    with _axes(f"unit-{axis}") as (axes, out):
        for number, scores in enumerate(by_layer.values()):
            ordered = sorted(scores, reverse=True)
            stride = max(1, len(ordered) // _MANY_POINTS)
            points = [(idx / max(1, len(ordered) - 1), ordered[idx]) for idx in range(0, len(ordered), stride)]
            best = ordered[0] or 1.0
            shade = 0.25 + 0.65 * number / max(1, len(by_layer) - 1)
            heights = [value / best for _, value in points]
            axes.plot([100 * place for place, _ in points], heights, color=SERIES[0], alpha=shade, linewidth=1)
        if kept_fraction < 1:
            axes.axvline(100 * kept_fraction, color=INK, linestyle="--", linewidth=1)
        axes.set(xlabel="share of the units, best first, %", ylabel="score by the layer's best", ylim=(0, 1.05))
        axes.grid(axis="y", linewidth=0.5)
    alt = f"Scores of {axis} units, sorted, of {len(by_layer)} layers, darker the later the layer"
    alt += f"; the line marks the {kept_fraction:.0%} that stay." if kept_fraction < 1 else "."
    return _chart(f"unit-{axis}", f"Unit scores: {axis.replace('_', ' ')}", alt, out[0])


def candidate_chart(candidates: Sequence[Mapping[str, Any]], budget_bytes: float | None) -> Chart:
    """Measured candidates: KL against memory, the best one filled, each with its rank by prediction."""
    by_prediction = sorted(range(len(candidates)), key=lambda idx: candidates[idx]["predicted_loss"])
    with _axes("candidates") as (axes, out):
        unit, unit_bytes = _scale(candidates[0]["memory_bytes"])
        sizes, kls = [c["memory_bytes"] / unit_bytes for c in candidates], [c["kl"] for c in candidates]
        axes.scatter(sizes[1:], kls[1:], _DOTS, facecolor="none", edgecolor=SERIES[0])
        axes.scatter(sizes[:1], kls[:1], 2 * _DOTS, color=SERIES[1])
        for idx in range(len(candidates)) if len(candidates) <= _MANY_POINTS else ():
            place = by_prediction.index(idx) + 1
            axes.annotate(f" {place}", (sizes[idx], kls[idx]), fontsize=7, color=MUTED, va="bottom")
        if budget_bytes is not None:
            axes.axvline(budget_bytes / unit_bytes, color=INK, linestyle="--", linewidth=1)
        axes.set(xlabel=f"memory when served, {unit}", ylabel="KL to the source, nats/token")
        axes.grid(linewidth=0.5)
    predicted = by_prediction.index(0) + 1
    alt = f"{len(candidates)} candidates; the best has a KL of {kls[0]:.4f} and was predicted to be number {predicted}."
    return _chart("candidates", "Candidates, numbered by prediction", alt, out[0])


def frontier_chart(points: Sequence[Mapping[str, Any]]) -> Chart:
    """What each budget costs in quality."""
    unit, unit_bytes = _scale(max(p["budget_bytes"] for p in points))
    fitting = [(p["memory_bytes"] / unit_bytes, p["quality"]) for p in points if p["memory_bytes"] is not None]
    with _axes("frontier") as (axes, out):
        axes.plot([size for size, _ in fitting], [value for _, value in fitting], "o-", color=SERIES[0], markersize=4)
        axes.set(xlabel=f"memory when served, {unit}", ylabel="KL to the source, nats/token")
        axes.grid(linewidth=0.5)
    said = ", ".join(f"{size:.4g} {unit}: {value:.4g}" for size, value in fitting)
    return _chart(
        "frontier", "Frontier", f"{len(points)} budgets, {len(fitting)} of which something fits. {said}", out[0]
    )


def compensation_chart(layers: Sequence[Mapping[str, Any]]) -> Chart:
    """What is missing behind each layer on held-out text, before its refit and after it."""
    with _axes("compensation") as (axes, out):
        places = [layer["layer_idx"] for layer in layers]
        before, after = ([layer[f"missing_{when}"] for layer in layers] for when in ("before", "after"))
        axes.vlines(places, after, before, color=GRID, linewidth=2, zorder=0)
        axes.scatter(places, before, _DOTS, facecolor="none", edgecolor=SERIES[1], label="before")
        axes.scatter(places, after, _DOTS, color=SERIES[0], label="after")
        if any(value > 0 for value in (*before, *after)):
            axes.set_yscale("log")
        axes.set(xlabel="layer of the source", ylabel="distance, mean squares")
        axes.grid(axis="y", linewidth=0.5)
        axes.legend(frameon=False, ncols=2, loc="best")
    mended = sum(layer["ridge"] is not None for layer in layers)
    last = f"{before[-1]:.4g} before and {after[-1]:.4g} after" if layers else "unknown"
    alt = f"{mended} of {len(layers)} layers refitted; behind the last one the distance on held-out text is {last}."
    return _chart("compensation", "Compensation, layer by layer", alt, out[0])


def learning_chart(curve: Sequence[Mapping[str, Any]], before: float | None) -> Chart:
    """Divergence from the teacher against tokens, in training and on held-out text."""
    steps = [record for record in curve if record.get("kl") is not None]
    held_out = [
        (record["tokens"], record["validation_kl"]) for record in curve if record.get("validation_kl") is not None
    ]
    held_out = [(0, before), *held_out] if before is not None else held_out
    with _axes("learning") as (axes, out):
        axes.plot(
            [r["tokens"] for r in steps], [r["kl"] for r in steps], color=SERIES[0], linewidth=1, label="training"
        )
        if held_out:
            places, values = zip(*held_out, strict=True)
            axes.plot(places, values, "o-", color=SERIES[1], markersize=3.5, label="held-out text, temperature 1")
        if any(value > 0 for value in [r["kl"] for r in steps] + [value for _, value in held_out]):
            axes.set_yscale("log")
        axes.xaxis.set_major_formatter(_tokens)
        axes.set(xlabel="tokens", ylabel="nats/token")
        axes.grid(axis="y", linewidth=0.5)
        axes.legend(frameon=False)
    alt = f"Divergence from the teacher over {format_count(steps[-1]['tokens'])} tokens"
    if held_out:
        alt += f", on held-out text from {held_out[0][1]:.4f} to {held_out[-1][1]:.4f} nats/token"
    return _chart("learning", "Distillation", alt + ".", out[0])


def race_chart(finalists: Sequence[Mapping[str, Any]]) -> Chart:
    """The KL of each finalist, before the race and after each round."""
    with _axes("race") as (axes, out):
        for idx, finalist in enumerate(finalists):
            tokens = [0, *(done["tokens"] for done in finalist["rounds"])]
            kls = [finalist["before"]["kl"], *(done["kl"] for done in finalist["rounds"])]
            width, name = (2.2, " (winner)") if finalist["is_winner"] else (1.0, "")
            color = SERIES[idx % len(SERIES)]
            axes.plot(tokens, kls, "o-", color=color, linewidth=width, markersize=4, label=f"finalist {idx + 1}{name}")
        axes.xaxis.set_major_formatter(_tokens)
        axes.set(xlabel="tokens", ylabel="KL on validation text, nats/token")
        axes.set_yscale("log")
        axes.grid(axis="y", linewidth=0.5)
        axes.legend(frameon=False)
    ends = ", ".join(
        f"{idx}: {f['before']['kl']:.4f} to {f['rounds'][-1]['kl']:.4f}" for idx, f in enumerate(finalists, 1)
    )
    return _chart("race", "Race of finalists", f"KL of each finalist before and after: {ends}.", out[0])


def _scale(num_bytes: float) -> tuple[str, int]:
    """A unit in which so much memory is no tiny number, and its bytes."""
    return ("GiB", GIB) if num_bytes > GIB / 4 else ("MiB", GIB // 1024)


def _tokens(count: float, _place: Any = None) -> str:
    """A count of tokens on an axis."""
    return format_count(int(count)).replace(".00", "") if count else "0"
