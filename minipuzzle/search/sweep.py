"""Sweeps: one search or measurement for each of many budgets, and the frontier of memory against quality they draw.

Nothing here knows where a quality comes from: predicted losses and measured ones are drawn and written alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from minipuzzle.architecture.quantities import parse_budget_bytes
from minipuzzle.errors import MinipuzzleError

MAX_BUDGETS = 200


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """What came of one budget. ``quality``: a loss or a divergence, lower is better. Like ``memory_bytes`` it is None
    where nothing fits, and ``description`` then says why."""

    budget_bytes: int
    memory_bytes: int | None = None
    num_parameters: int | None = None
    quality: float | None = None
    description: str = ""


def parse_sweep(text: str, source_bytes: int) -> tuple[int, ...]:
    """Budgets in bytes of ``LOW:HIGH:STEP``, ascending; each part a size, or a share of the source such as ``5%``.

    HIGH is always among them.

    Raises: MinipuzzleError for anything else, and for more budgets than ``MAX_BUDGETS``.
    """
    parts = text.split(":")
    if len(parts) != 3:
        raise MinipuzzleError(f"{text!r} is not a sweep", "write LOW:HIGH:STEP, e.g. 20GiB:40GiB:2GiB or 50%:100%:5%")
    low, high, step = (parse_budget_bytes(part, source_bytes) for part in parts)
    if not 0 < low <= high or step < 1:
        raise MinipuzzleError(f"{text!r} is not an ascending sweep", "write LOW:HIGH:STEP with a step above 0")
    # Shares were rounded down to whole bytes; the last of the steps may so miss HIGH by a few of them.
    num_steps = (high - low + MAX_BUDGETS) // step if high - low >= step else 0
    if num_steps >= MAX_BUDGETS:
        raise MinipuzzleError(f"{text!r} has over {MAX_BUDGETS} budgets", "take a larger step")
    budgets = [low + step * number for number in range(num_steps + 1)]
    return (*(budget for budget in budgets if budget < high - MAX_BUDGETS), high)
