"""The table of learning-rate schedules: how the rate falls between the warm-up and the last step.

A schedule is a function of the step, from 0 where the warm-up ends, of the last step counted so, and of the steps that
a decay at the end takes. It gives the share of the way down that is left, from 1 to 0 in the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from minipuzzle.table import Table

Schedule = Callable[[int, int, int], float]
SCHEDULES: Table[Schedule] = Table("schedule", "schedules")


@SCHEDULES.register("cosine")
def cosine(step_idx: int, last_step_idx: int, _decay_steps: int) -> float:
    """Along half a cosine. Source: Loshchilov and Hutter (arXiv 1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * (step_idx / max(1, last_step_idx))))


@SCHEDULES.register("linear")
def linear(step_idx: int, last_step_idx: int, _decay_steps: int) -> float:
    """Along a line."""
    return 1 - step_idx / max(1, last_step_idx)


@SCHEDULES.register("wsd")
def warmup_stable_decay(step_idx: int, last_step_idx: int, decay_steps: int) -> float:
    """Not at all, and along a line in the last steps. Source: MiniCPM (arXiv 2404.06395)."""
    first_falling = max(0, last_step_idx - decay_steps)
    return linear(max(0, step_idx - first_falling), last_step_idx - first_falling, decay_steps)
