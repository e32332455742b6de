"""The quality of a model on some texts as a table."""

from __future__ import annotations

from collections.abc import Mapping

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
