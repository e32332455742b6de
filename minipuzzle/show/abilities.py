"""What models can do as a table, and what it can show in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from minipuzzle.abilities.decisions import Row
from minipuzzle.show.tables import figures_table

_CLEAR = 0.05  # a p-value below it is printed in bold


def print_abilities(rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Print a row for each model on each task and group of items; then the notes."""
    console = Console()
    columns = ("", "right", "95 %", "gap", "95 %", "won:lost", "p", "KL", "agree")
    table = figures_table(*columns, box=None, padding=(0, 1, 0, 0))
    heading = ""
    for row in rows:
        name = f"{row.task}, {row.group}" if row.group else f"{row.task} ({row.share.num_items} items)"
        if name != heading:
            table.add_row(f"[bold]{escape(name)}[/]")
        heading = name
        table.add_row(f"  {escape(row.model)}", *_figures(row))
    console.print(table)
    for note in notes:
        console.print(escape(note), style="dim", highlight=False)


def _figures(row: Row) -> tuple[str, ...]:
    share, gap = row.share, row.difference
    shown = (f"{share.mean:.1%}", f"{100 * share.low:.0f}..{100 * share.high:.0f}")
    if gap is None:
        return shown
    p_value = f"{gap.p_value:.3f}" if gap.p_value >= 0.001 else "<0.001"
    return (
        *shown,
        f"{100 * gap.mean:+.1f}",
        f"{100 * gap.low:+.0f}..{100 * gap.high:+.0f}",
        f"{gap.wins}:{gap.losses}",
        f"[bold]{p_value}[/]" if gap.p_value < _CLEAR else p_value,
        "" if row.kl is None else f"{row.kl:.4f}",
        "" if row.agreement is None else f"{row.agreement:.0%}",
    )
