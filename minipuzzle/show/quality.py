"""The quality of a model on some texts as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from minipuzzle.quality.record import LABELS, Quality, with_interval
from minipuzzle.show.tables import figures_table


def print_quality(rows: Mapping[str, Quality]) -> None:
    """Print a column for each text: terminals are wide enough for a few of these, not for all figures side by side.

    ±: 95 % of the mean, by how windows of text differ.
    """
    table = figures_table("", *rows)
    for column in table.columns[1:]:
        column.overflow = "fold"
    found = {name: row.to_json() for name, row in rows.items()}
    for figure, (label, shown_as) in LABELS.items():
        if all(row[figure] is not None for row in found.values()):
            table.add_row(label, *(with_interval(found[name], figure, shown_as) for name in rows))
    Console().print(table)


def print_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what lm-eval measured: a row for each figure of a task, with its standard error."""
    table = figures_table("task", "figure", "value", "standard error", num_names=2)
    for task, figures in tasks.items():
        for name, value in figures.items():
            figure, _, of = name.partition(",")
            if isinstance(value, int | float) and of and not figure.endswith("_stderr"):
                error = figures.get(f"{figure}_stderr,{of}")
                table.add_row(task, figure, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    Console().print(table)
