"""Layer scores as a picture, in the form in which they are published, and as bars in a terminal."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.model import Architecture
from minipuzzle.architecture.quantities import format_gib
from minipuzzle.cut.scores import Scores
from minipuzzle.files.outputs import output_file
from minipuzzle.show.pictures import picture

if TYPE_CHECKING:
    from importance.work import PlannedScoring

BAR_COLUMNS = 10


def draw_scores(architecture: Architecture, scores: Scores, path: Path, metric: str = "mse") -> None:
    """Draw the scores of one metric. Layers that score zero or were not measured have no point.

    Source: arXiv 2504.03624, figure 9.
    """
    values = scores.layer[metric]
    with output_file(path) as partial, picture(partial, (9, 4), format=path.suffix[1:], dpi=150) as (axes,):
        for kind in architecture.layer_counts:
            indices = [idx for idx in architecture.layer_indices(kind) if values[idx] > 0]
            axes.plot(indices, values[indices], "o", color=LAYER_KINDS[kind].color, label=kind)
        shown = np.flatnonzero(values > 0)
        axes.plot(shown, values[shown], "-", color="lightgray", zorder=0)
        axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.set_ylabel(f"{metric} of the LM head's input without the layer")
        axes.legend(frameon=False)


def print_scores(architecture: Architecture, scores: Scores, metric: str = "mse") -> None:
    """A column for each kind of layer: index, bar, score; the lowest score of each kind is marked."""
    values = scores.layer[metric]
    lengths = _bar_lengths(values.tolist())
    grid = Table.grid(padding=(0, 2))
    columns = []
    for kind in architecture.layer_counts:
        indices = [idx for idx in architecture.layer_indices(kind) if values[idx] == values[idx]]
        if not indices:
            continue
        lowest = min(indices, key=lambda idx: float(values[idx]))
        color = LAYER_KINDS[kind].color
        lines = [f"    [bold {color}]{kind}[/]"]
        for idx in indices:
            bar = f"[{color}]{'█' * lengths[idx]:<{BAR_COLUMNS}}[/]"
            lines.append(f"{idx:>3} {bar} {values[idx]:.2e}{' ◂' if idx == lowest else ''}")
        columns.append("\n".join(lines))
    grid.add_row(*columns)
    console = Console(highlight=False)
    console.print(f"[bold]layer scores[/] ({metric} of the LM head's input; logarithmic; ◂ lowest of its kind)")
    console.print(grid)
    assert scores.facts is not None, "printed where they are measured"
    if removed := scores.facts.removed_layers:
        console.print(f"removed one after another: {', '.join(map(str, removed))}")
    counters = scores.facts.counters
    console.print(
        f"{len(values)} layers, {sum(v.size for v in scores.units.values()):,} unit scores; "
        f"{counters['layer_applications']:,} layer applications, {format_gib(counters['weight_bytes_read'])} read"
    )
    if "mamba" in architecture.layer_counts:
        console.print(f"Mamba-2 scan: {scores.facts.scan}")


def print_planned_scoring(planned: PlannedScoring) -> None:
    """Print what a measurement will take."""
    work = planned.work
    where = "all weights stay in memory" if work.weights_stay_in_memory else "one layer in memory at a time"
    lines = {
        "layer applications": f"{'at most ' if planned.removals else ''}{work.layer_applications:,}",
        "slices": f"{work.layer_slices} for layers, {work.channel_slices} for channels",
        "weights to read": f"{format_gib(work.weight_bytes_read)}, {where}",
        "memory, estimated": f"{format_gib(work.peak_bytes)} of {format_gib(planned.memory_limit_bytes)}",
        "Mamba-2 scan": planned.scan,
    }
    if planned.processes > 1:
        lines["processes"] = f"{planned.processes}; the figures are those of one"
    for name, value in lines.items():
        print(f"{name:<20} {value}")
    print("dry run: nothing was written")


def _bar_lengths(values: list[float]) -> list[int]:
    """Bars from 1 for the lowest to BAR_COLUMNS for the highest, on a logarithmic scale; nothing for zero."""
    logs = [log(value) for value in values if value > 0]
    if not logs:
        return [0] * len(values)
    lowest, span = min(logs), max(max(logs) - min(logs), 1e-9)
    return [1 + round((BAR_COLUMNS - 1) * (log(value) - lowest) / span) if value > 0 else 0 for value in values]
