"""The frontier of memory against quality as CSV, picture and text. Predicted losses and measured ones look alike."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from minipuzzle.architecture.quantities import GIB, format_gib
from minipuzzle.errors import MinipuzzleError
from minipuzzle.search.sweep import FrontierPoint
from minipuzzle.show.pictures import picture

CHART_COLUMNS = 40
_COLUMNS = ("budget_bytes", "memory_bytes", "num_parameters")


def write_frontier_csv(points: Sequence[FrontierPoint], path: Path, *, quality: str) -> None:
    """Write one row a budget. ``quality`` names that column; it is empty where nothing fits."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, quality, "description"])
        for point in points:
            values = (point.budget_bytes, point.memory_bytes, point.num_parameters, point.quality)
            writer.writerow([*("" if value is None else value for value in values), point.description])


def check_frontier_csv(path: Path) -> None:
    """Refuse a file that ``write_frontier_csv`` did not write.

    Raises: MinipuzzleError for any other.
    """
    with path.open("rb") as file:
        if not file.read(100).startswith(",".join(_COLUMNS).encode()):
            raise MinipuzzleError(f"{path} holds no frontier", "choose another name")


def plot_frontier(points: Sequence[FrontierPoint], path: Path, *, quality: str, file_format: str = "png") -> None:
    """Draw quality against memory as a picture; budgets that nothing fits are shaded."""
    with picture(path, (7, 4), format=file_format) as (axes,):
        fitting = [(point.memory_bytes / GIB, point.quality or 0.0) for point in points if point.memory_bytes]
        axes.plot([memory_gib for memory_gib, _ in fitting], [loss for _, loss in fitting], marker="o")
        if infeasible := [point.budget_bytes / GIB for point in points if point.memory_bytes is None]:
            axes.axvspan(min(infeasible), max(infeasible), color="0.9", label="nothing fits")
            axes.legend(frameon=False)
        axes.set_xlabel("memory when served, GiB")
        axes.set_ylabel(quality)
        axes.grid(alpha=0.3)


def frontier_chart(points: Sequence[FrontierPoint], *, quality: str) -> str:
    """The frontier in plain text: a line a budget, with a bar as long as its loss is high."""
    worst = max((point.quality for point in points if point.quality is not None), default=0.0)
    lines = [f"{'budget':>12}  {'memory':>12}  {quality}"]
    for point in points:
        budget = format_gib(point.budget_bytes)
        if point.quality is None or point.memory_bytes is None:
            lines.append(f"{budget:>12}  {'nothing fits':>12}")
            continue
        bar = "█" * round(CHART_COLUMNS * point.quality / worst) if worst > 0 else ""
        lines.append(f"{budget:>12}  {format_gib(point.memory_bytes):>12}  {point.quality:<10.4g} {bar}")
    return "\n".join(lines)
