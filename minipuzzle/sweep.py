"""Sweeps: one search or measurement for each of many budgets, and the frontier of memory against quality they draw.

Nothing here knows where a quality comes from: predicted losses and measured ones are drawn and written alike.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minipuzzle.errors import MinipuzzleError
from minipuzzle.units import GIB, format_gib, parse_budget_bytes

MAX_BUDGETS = 200
CHART_COLUMNS = 40


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """What came of one budget. ``quality``: a loss or a divergence, lower is better. Like ``memory_bytes`` it is None
    where nothing fits, and ``description`` then says why."""

    budget_bytes: int
    memory_bytes: int | None = None
    num_parameters: int | None = None
    quality: float | None = None
    description: str = ""


def parse_sweep(text: str, source_bytes: int) -> tuple[int, ...]:
    """Budgets in bytes of ``LOW:HIGH:STEP``, ascending; each part a size, or a share of the source such as ``5%``.

    HIGH is always among them.

    Raises: MinipuzzleError for anything else, and for more budgets than ``MAX_BUDGETS``.
    """
    parts = text.split(":")
    if len(parts) != 3:
        raise MinipuzzleError(f"{text!r} is not a sweep", "write LOW:HIGH:STEP, e.g. 20GiB:40GiB:2GiB or 50%:100%:5%")
    low, high, step = (parse_budget_bytes(part, source_bytes) for part in parts)
    if not 0 < low <= high or step < 1:
        raise MinipuzzleError(f"{text!r} is not an ascending sweep", "write LOW:HIGH:STEP with a step above 0")
    # Shares were rounded down to whole bytes; the last of the steps may so miss HIGH by a few of them.
    num_steps = (high - low + MAX_BUDGETS) // step if high - low >= step else 0
    if num_steps >= MAX_BUDGETS:
        raise MinipuzzleError(f"{text!r} has over {MAX_BUDGETS} budgets", "take a larger step")
    budgets = [low + step * number for number in range(num_steps + 1)]
    return (*(budget for budget in budgets if budget < high - MAX_BUDGETS), high)


def write_frontier_csv(points: Sequence[FrontierPoint], path: Path, *, quality: str) -> None:
    """Write one row a budget. ``quality`` names that column; it is empty where nothing fits."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["budget_bytes", "memory_bytes", "num_parameters", quality, "description"])
        for point in points:
            values = (point.budget_bytes, point.memory_bytes, point.num_parameters, point.quality)
            writer.writerow([*("" if value is None else value for value in values), point.description])


def plot_frontier(points: Sequence[FrontierPoint], path: Path, *, quality: str, file_format: str = "png") -> None:
    """Draw quality against memory as a picture; budgets that nothing fits are shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    memory_gib = [point.memory_bytes / GIB for point in points if point.memory_bytes is not None]
    axes.plot(memory_gib, [point.quality for point in points if point.memory_bytes is not None], marker="o")
    if infeasible := [point.budget_bytes / GIB for point in points if point.memory_bytes is None]:
        axes.axvspan(min(infeasible), max(infeasible), color="0.9", label="nothing fits")
        axes.legend(frameon=False)
    axes.set_xlabel("memory when served, GiB")
    axes.set_ylabel(quality)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130, format=file_format)
    plt.close(figure)


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
