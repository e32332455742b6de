"""Pictures: axes to draw on, saved when they are done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.outputs import check_target_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}  # and how such files begin


def check_picture_target(path: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse a name that no picture can have, or a file that must not be replaced.

    Raises: MinipuzzleError saying why.
    """
    if path.suffix not in FORMATS:
        raise MinipuzzleError(f"{path} is no picture", f"give ‹plot› a name that ends in {', '.join(FORMATS)}")
    check_target_file(path, overwrite=overwrite, read=_check_picture, inputs=inputs)


def _check_picture(path: Path) -> None:
    with path.open("rb") as file:
        if not file.read(8).startswith(FORMATS[path.suffix]):
            raise MinipuzzleError(f"{path} is no picture", "choose another name")


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
