"""The table of calibration algorithms, and the choice of one; free of torch, so that commands can name them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minipuzzle.errors import MinipuzzleError
from minipuzzle.table import Table


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A way to find the largest value that a scale must hold.

    ``calibrator``: ModelOpt's name of what gathers the activations. ``find``: from it and the percentile asked for.
    """

    calibrator: str
    find: Callable[[Any, float], float]


ALGORITHMS: Table[Algorithm] = Table(
    "calibration algorithm",
    "calibration_algorithms",
    lazy={
        "max": "minipuzzle.export.calibration:LARGEST",
        "percentile": "minipuzzle.export.calibration:PERCENTILE",
        "mse": "minipuzzle.export.calibration:LEAST_SQUARES",
    },
)


@dataclass(frozen=True, kw_only=True)
class CalibrationMethod:
    """How the largest value that a scale must hold follows from the activations seen.

    ``max``: the largest. ``percentile``: a percentile of a histogram, which clips outliers. ``mse``: the one that
    minimises the squared error of rounding the histogram to E4M3.
    """

    algorithm: str = "max"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        ALGORITHMS.check(self.algorithm)
        if not 0 < self.percentile <= 100:
            raise MinipuzzleError(f"{self.percentile} is not a percentile", "use a number up to 100, such as 99.99")

    def describe(self) -> str:
        """In words, for the model card."""
        return f"{self.algorithm} {self.percentile:g}" if self.algorithm == "percentile" else self.algorithm
