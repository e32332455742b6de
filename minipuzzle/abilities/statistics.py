"""What paired items show: shares with intervals, differences, sign tests, and how small a gap could have been seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of a two-sided 95 % interval
_Z_POWER = 0.8416212335729143  # of 80 % power
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Share:
    """The mean score of a model, 0 to 1, with its 95 % interval."""

    mean: float
    low: float
    high: float
    num_items: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A model less the one it is compared with, on the same items. ``p_value``: two-sided, of the sign test."""

    mean: float
    low: float
    high: float
    wins: int
    losses: int
    num_items: int
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def share_of(scores: Sequence[float]) -> Share:
    """The mean of scores: Wilson's interval where each is 0 or 1, else Student's.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (JASA 22, 1927).
    """
    mean = sum(scores) / len(scores)
    low, high = _wilson(mean, len(scores)) if _are_binary(scores) else _student(scores, 0.0, 1.0)
    return Share(mean=mean, low=low, high=high, num_items=len(scores))


def difference_of(scores: Sequence[float], others: Sequence[float]) -> Difference:
    """Scores of a model against another's on the same items, in the same order.

    The interval is Newcombe's hybrid score interval for paired shares where all scores are 0 or 1, else Student's of
    the differences; the p-value is exact, by the binomial distribution of wins among the items that differ.

    Source: Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired
    data (Statistics in Medicine 17, 1998), method 10.
    """
    from scipy.stats import binomtest

    assert len(scores) == len(others) > 0
    gaps = [one - other for one, other in zip(scores, others, strict=True)]
    wins, losses = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    if _are_binary(scores) and _are_binary(others):
        low, high = _newcombe(scores, others)
    else:
        low, high = _student(gaps, -1.0, 1.0)
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Difference(
        mean=sum(gaps) / len(gaps),
        low=low,
        high=high,
        wins=wins,
        losses=losses,
        num_items=len(gaps),
        p_value=p_value,
    )


def smallest_visible_gap(num_items: int) -> float:
    """The least share of items that that must differ, all one way, for a sign test to reach p < 0.05."""
    needed = math.floor(math.log2(2 / (1 - CONFIDENCE))) + 1  # 2 * 0.5**n < 0.05
    return needed / num_items


def items_needed(gap: float, share_differing: float) -> int:
    """Items for 80 % power to see a gap of mean scores, where two models differ on such a share of items.

    Source: Connor, Sample size for testing differences in proportions for the paired-sample design (Biometrics 43,
    1987).
    """
    differing = max(share_differing, gap)
    return math.ceil((_Z * math.sqrt(differing) + _Z_POWER * math.sqrt(differing - gap**2)) ** 2 / gap**2)


def what_items_show(difference: Difference, gap: float = 0.05) -> str:
    """A sentence on what so many items can and cannot show."""
    number, visible = difference.num_items, smallest_visible_gap(difference.num_items)
    differing = (difference.wins + difference.losses) / number
    needed = f"a gap of {gap:.0%} would need about {items_needed(gap, differing):,} items to show four times in five"
    if visible > 1:
        return f"{number} items can show nothing: even if all went one way, chance would do as well; {needed}"
    return (
        f"with {number} items a gap below {visible:.0%} cannot be told from chance, whichever way it goes; "
        f"as often as the two differ here ({differing:.0%} of items), {needed}"
    )


def _are_binary(scores: Sequence[float]) -> bool:
    return all(score in (0.0, 1.0) for score in scores)


def _wilson(share: float, number: int) -> Interval:
    centre = (share + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    half = _Z / (1 + _Z**2 / number) * math.sqrt(share * (1 - share) / number + _Z**2 / (4 * number**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _newcombe(scores: Sequence[float], others: Sequence[float]) -> Interval:
    number = len(scores)
    share, other = sum(scores) / number, sum(others) / number
    (low, high), (other_low, other_high) = _wilson(share, number), _wilson(other, number)
    both = sum(one == two == 1 for one, two in zip(scores, others, strict=True))
    neither = sum(one == two == 0 for one, two in zip(scores, others, strict=True))
    won, lost = round(sum(scores)) - both, round(sum(others)) - both
    margins = (both + won) * (neither + lost) * (both + lost) * (neither + won)
    correlation = 0.0
    if margins:
        excess = both * neither - won * lost
        correlation = (max(excess - number / 2, 0.0) if excess > 0 else excess) / math.sqrt(margins)

    def half(one: float, two: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * correlation * one * two + two**2))

    gap = share - other
    return max(-1.0, gap - half(share - low, other_high - other)), min(1.0, gap + half(high - share, other - other_low))


def _student(values: Sequence[float], least: float, most: float) -> Interval:
    from scipy.stats import t

    mean = sum(values) / len(values)
    if len(values) < 2:
        return least, most
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return max(least, mean - half), min(most, mean + half)
