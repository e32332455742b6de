"""Tables of figures in a terminal: names on the left, numbers to the right."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table


def figures_table(*columns: str, num_names: int = 1, **options: Any) -> Table:
    """A table with no rows yet, whose columns but the first ``num_names`` hold figures; ``options``: rich's own."""
    headers = [Column(name, justify="left" if idx < num_names else "right") for idx, name in enumerate(columns)]
    return Table(*headers, **{"title_justify": "left", **options})
