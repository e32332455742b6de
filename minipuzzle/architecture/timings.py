"""Measured times of layers, for constraints on latency and throughput.

A CSV file with one row a measured layer: ``kind``, ``step_seconds``, and a column for each axis that was varied (empty
where it does not matter). The row with the kind ``outer`` holds the time outside the layers. ``step_seconds`` is what
one decoding step takes for the whole batch, so a model's throughput is batch / (sum over its layers)::

    kind,ffn,kv_group,step_seconds
    outer,,,0.0011
    mamba,,,0.00021
    attention,,8,0.00048
    mlp,30720,,0.00030
    mlp,32768,,0.00032

Between two measured widths of one axis times are interpolated; beyond them nothing is guessed. Inside, times are whole
nanoseconds, so that sums do not depend on their order.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.errors import MinipuzzleError

OUTER = "outer"


@dataclass(frozen=True, kw_only=True)
class TimedLayer:
    """One measurement: a kind of layer, the widths it was measured at, and its time in one step."""

    kind: str
    widths: tuple[tuple[str, int], ...]
    nanoseconds: int

    def differing_axes(self, layer: LayerSpec) -> list[str]:
        """The axes on which a layer is not what was measured."""
        return [axis for axis, width in self.widths if layer.sizes.get(axis) != width]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """A table of measured layers."""

    rows: tuple[TimedLayer, ...]

    @property
    def outer_nanoseconds(self) -> int:
        """Time of a step outside the layers; 0 where the table does not say."""
        return sum(row.nanoseconds for row in self.rows if row.kind == OUTER)

    def layer_nanoseconds(self, layer: LayerSpec) -> int:
        """Time of a step in one layer.

        Raises: MinipuzzleError if neither it nor a wider and a narrower one were measured.
        """
        along: dict[str, list[tuple[int, int]]] = {}
        for row in self.rows:
            if row.kind != layer.kind:
                continue
            different = row.differing_axes(layer)
            if not different:
                return row.nanoseconds
            if len(different) == 1:
                along.setdefault(different[0], []).append((dict(row.widths)[different[0]], row.nanoseconds))
        for axis, measured in along.items():
            width = layer.sizes.get(axis, 0)
            below = [point for point in measured if point[0] < width]
            above = [point for point in measured if point[0] > width]
            if below and above:
                (low, low_time), (high, high_time) = max(below), min(above)
                return round(low_time + (high_time - low_time) * (width - low) / (high - low))
        widths = ", ".join(f"{axis} {size}" for axis, size in layer.sizes.items())
        raise MinipuzzleError(
            f"the table of times holds no {layer.kind} layer with {widths}",
            "measure that layer, or one narrower and one wider on one axis, and add it to ‹timings›",
        )


def read_timings(path: Path) -> Timings:
    """Read a table of times.

    Raises: MinipuzzleError naming the line that is wrong.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or not {"kind", "step_seconds"} <= set(reader.fieldnames):
                raise MinipuzzleError(f"{path} has no columns kind and step_seconds", "see `minipuzzle search --help`")
            rows = tuple(_timed_layer(row, f"{path}, line {reader.line_num}") for row in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MinipuzzleError(f"cannot read {path}: {error}", "check ‹timings›") from None
    if not rows:
        raise MinipuzzleError(f"{path} holds no times", "add a row for each kind of layer")
    measured = Counter((row.kind, row.widths) for row in rows)
    if twice := next((row for row, count in measured.items() if count > 1), None):
        widths = "".join(f", {axis} {width}" for axis, width in twice[1])
        raise MinipuzzleError(f"{path} holds two times of {twice[0]}{widths}", "keep one of them")
    return Timings(rows=rows)


def _timed_layer(row: Mapping[str, str], where: str) -> TimedLayer:
    widths, seconds, kind = [], row.get("step_seconds"), row["kind"]
    try:
        for axis, text in row.items():
            if axis not in ("kind", "step_seconds") and text:
                widths.append((axis, int(text)))
        step_seconds = float(seconds or "")
    except (ValueError, TypeError):
        raise MinipuzzleError(f"{where}: widths or step_seconds are not numbers", "write plain numbers") from None
    if kind not in (OUTER, *LAYER_KINDS):
        raise MinipuzzleError(
            f"{where}: {LAYER_KINDS.unknown(kind).problem}", f"known: {OUTER}, {', '.join(LAYER_KINDS)}"
        )
    if any(width < 1 for _, width in widths):
        raise MinipuzzleError(f"{where}: a width is below 1", "write the number of units")
    if not 0 <= step_seconds < float("inf"):
        raise MinipuzzleError(f"{where}: step_seconds is {step_seconds}", "write seconds, not below 0")
    return TimedLayer(kind=kind, widths=tuple(widths), nanoseconds=round(step_seconds * 1e9))
