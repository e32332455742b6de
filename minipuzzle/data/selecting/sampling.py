"""How many tokens to take of each source: natural, alpha and UniMax shares, and caps on epochs.

All take sizes in tokens by the name of a source, and give shares that sum to one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minipuzzle.errors import MinipuzzleError
from minipuzzle.table import Table

Sizes = Mapping[str, float]
Shares = dict[str, float]
_ENOUGH = 1 - 1e-9


def normalised(weights: Sizes) -> Shares:
    """Weights over their sum.

    Raises: MinipuzzleError if none is positive.
    """
    total = sum(weights.values())
    if not weights or min(weights.values()) < 0 or total <= 0:
        raise MinipuzzleError("the sources hold no tokens, or weights are negative", "check them")
    return {name: weight / total for name, weight in weights.items()}


def natural(sizes: Sizes) -> Shares:
    """Shares as the sources are large: every token as likely as any other."""
    return normalised(sizes)


def alpha(sizes: Sizes, exponent: float) -> Shares:
    """Shares in proportion to size ** exponent: below 1 small sources gain, above 1 large ones.

    Source: arXiv 2407.06380 finds 1.3 best for code.
    """
    return normalised({name: size**exponent for name, size in sizes.items()})


def unimax(sizes: Sizes, budget_tokens: float, max_epochs: float) -> Shares:
    """Shares as equal as they can be while no source is read more than ``max_epochs`` times.

    Sources from the smallest up: each gets the equal share of what is left, or all it may give.

    Source: arXiv 2304.09151, algorithm 1. Raises: MinipuzzleError if all sources together give too little.
    """
    _require_enough(sizes, budget_tokens, max_epochs)
    left, tokens = budget_tokens, {}
    for place, name in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        tokens[name] = min(left / (len(sizes) - place), max_epochs * sizes[name])
        left -= tokens[name]
    return normalised({name: tokens[name] for name in sizes})


def capped(shares: Sizes, sizes: Sizes, budget_tokens: float, max_epochs: float) -> Shares:
    """Shares of which none asks for more than ``max_epochs`` of its source.

    What a source cannot give is spread over the others in proportion to their shares, until none is over.

    Raises: MinipuzzleError if the sources that have a share give too little together.
    """
    wanted = {name: share for name, share in normalised(shares).items() if share > 0}
    _require_enough({name: sizes[name] for name in wanted}, budget_tokens, max_epochs)
    full: Shares = {}
    while True:
        left = budget_tokens - sum(full.values())
        free = {name: share for name, share in wanted.items() if name not in full}
        tokens = {name: left * share / sum(free.values()) for name, share in free.items()}
        over = {name: max_epochs * sizes[name] for name in free if tokens[name] > max_epochs * sizes[name]}
        if not over:
            found = full | tokens
            return normalised({name: found.get(name, 0.0) for name in shares})
        full |= over


def _require_enough(sizes: Sizes, budget_tokens: float, max_epochs: float) -> None:
    if max_epochs * sum(sizes.values()) < budget_tokens * _ENOUGH:
        raise MinipuzzleError(
            f"{max_epochs:g} epochs of all sources are {max_epochs * sum(sizes.values()):,.0f} tokens, and "
            f"{budget_tokens:,.0f} are wanted",
            "raise ‹max_epochs›, lower ‹tokens›, or add text",
        )


def _shares_of_natural(sizes: Sizes, value: float, budget_tokens: float, max_epochs: float) -> Shares:
    return natural(sizes)


def _shares_of_alpha(sizes: Sizes, value: float, budget_tokens: float, max_epochs: float) -> Shares:
    return alpha(sizes, value)


def _shares_of_unimax(sizes: Sizes, value: float, budget_tokens: float, max_epochs: float) -> Shares:
    return unimax(sizes, budget_tokens, max_epochs)


SAMPLERS: Table[Callable[[Sizes, float, float, float], Shares]] = Table(
    "sampler",
    "samplers",
    entries={"natural": _shares_of_natural, "alpha": _shares_of_alpha, "unimax": _shares_of_unimax},
)


def shares_by_name(text: str, sizes: Sizes, budget_tokens: float, max_epochs: float) -> Shares:
    """Shares by a sampler as it is typed: ``natural``, ``alpha=0.7`` or ``unimax``.

    Raises: MinipuzzleError for another name, or an exponent that is no number.
    """
    name, _, value = text.partition("=")
    try:
        number = float(value) if value else 1.0
    except ValueError:
        raise MinipuzzleError(f"‹sample› {text!r} has no number behind its =", "give alpha=0.7, for instance") from None
    return SAMPLERS[name](sizes, number, budget_tokens, max_epochs)
