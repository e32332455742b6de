"""What a page is made of: plain values that its template shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minipuzzle.show.page.charts import Chart

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A layer in a strip. ``height``, ``bits``: shares of the whole layer and of 16 bits, in %. ``tip``: in words."""

    symbol: str
    color: str
    height: int
    bits: int
    is_dropped: bool
    tip: str


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A model as a row of layers, with gaps where layers have gone."""

    name: str
    note: str
    cells: Sequence[Cell | None]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures with their headings; the first ``num_names`` columns are names."""

    caption: str
    header: Sequence[str]
    rows: Rows
    num_names: int = 1


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it, in this order; ``key`` is its place in the page."""

    key: str
    title: str
    text: str = ""
    strips: Sequence[Strip] = ()
    legend: Sequence[tuple[str, str]] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    details: Sequence[Table] = ()
    points: Sequence[str] = ()
    commands: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the template shows."""

    title: str
    lead: str
    tiles: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
