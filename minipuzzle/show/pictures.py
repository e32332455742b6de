"""Pictures: axes to draw on, saved when they are done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def picture(
    path: Path, size: tuple[float, float], *, widths: Sequence[float] = (1,), **options: Any
) -> Iterator[list[Axes]]:
    """Yield axes side by side, of these relative widths; ``options`` are those of matplotlib's ``savefig``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    yield axes
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, **{"dpi": 130, **options})
