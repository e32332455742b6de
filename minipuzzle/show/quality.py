"""The quality of a model on some texts as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from minipuzzle.show.tables import figures_table

if TYPE_CHECKING:
    from minipuzzle.quality.evaluate import Evaluation


def print_quality(rows: Mapping[str, Evaluation]) -> None:
    """Print a column for each text: terminals are wide enough for a few of these, not for all figures side by side."""
    formats = {
        "num_tokens": ("tokens", "{:,}"),
        "loss": ("loss (nats/token)", "{:.4f}"),
        "perplexity": ("perplexity", "{:.4g}"),
        "bits_per_byte": ("bits per byte", "{:.4f}"),
        "next_token_accuracy": ("next-token accuracy", "{:.2%}"),
        "kl": ("KL from teacher (nats/token)", "{:.4g}"),
        "top1_agreement": ("agreement with teacher", "{:.2%}"),
        "tokens_per_second": ("tokens per second", "{:,.0f}"),
    }
    table = figures_table("", *rows)
    for column in table.columns[1:]:
        column.overflow = "fold"
    found = {name: row.to_json() for name, row in rows.items()}
    for figure, (label, shown_as) in formats.items():
        if all(row[figure] is not None for row in found.values()):
            table.add_row(label, *(shown_as.format(found[name][figure]) for name in rows))
    Console().print(table)
