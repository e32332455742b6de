"""Parsing and printing of sizes and counts. Printed memory is always GiB = 2**30 bytes."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

from minipuzzle.errors import MinipuzzleError

GIB = 2**30
MIB = 2**20

_SIZE_SUFFIXES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 2**40,
}
_COUNT_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_LARGEST_COUNT = 10**18
_NUMBER = re.compile(r"\s*((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]\+?[0-9]{1,2})?)\s*([A-Za-z]*)\s*")


def _split_number(text: str, what: str, example: str) -> tuple[Decimal, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise MinipuzzleError(f"{text!r} is not a {what}", f"write it like {example}")
    return Decimal(match[1]), match[2].upper()


def parse_bytes(text: str) -> int:
    """Bytes in a size such as ``31.7GiB``, ``500MB`` or ``4096B``.

    Raises: MinipuzzleError for a missing or unknown unit; a bare number is refused because its unit is a guess.
    """
    number, suffix = _split_number(text, "memory size", "31.7GiB, 500MiB or 32GB")
    if suffix not in _SIZE_SUFFIXES:
        asked = f"; is {float(number * 100):g}% meant?" if not suffix and 0 < number <= 1 else ""
        raise MinipuzzleError(f"{text!r} has no known unit of memory{asked}", "use GiB, MiB, GB or MB, e.g. 31.7GiB")
    return int(number * _SIZE_SUFFIXES[suffix])


def parse_budget_bytes(text: str, source_bytes: int) -> int:
    """Bytes in an absolute size, or in a share of ``source_bytes`` such as ``75%``."""
    if not text.strip().endswith("%"):
        return parse_bytes(text)
    return int(source_bytes * _percentage(text, "the source model") / 100)


def _percentage(text: str, whole: object) -> Decimal:
    number, suffix = _split_number(text.strip()[:-1], "percentage", "75%")
    if suffix or not 0 < number <= 100:
        raise MinipuzzleError(f"{text!r} is not a share of {whole}", "use a percentage from 1% to 100%")
    return number


def parse_count(text: str) -> int:
    """A whole count such as ``4096``, ``128k`` (128 000), ``1M`` (10**6) or ``1Mi`` (2**20)."""
    number, suffix = _split_number(text, "count", "4096, 128k, 1M or 1Mi")
    if suffix not in _COUNT_SUFFIXES:
        raise MinipuzzleError(f"{text!r} has no known suffix", "use k, M, B (decimal) or Ki, Mi (binary)")
    count = number * _COUNT_SUFFIXES[suffix]
    if count != count.to_integral_value():
        raise MinipuzzleError(f"{text!r} is not a whole number", "use a count such as 4096 or 128k")
    if count > _LARGEST_COUNT:
        raise MinipuzzleError(f"{text!r} is more than anyone can count", "use a count such as 4096 or 128k")
    return int(count)


def parse_share_or_count(text: str, whole: int) -> int:
    """A count, or a share of ``whole`` such as ``75%``, rounded up to a whole number."""
    if not text.strip().endswith("%"):
        return parse_count(text)
    return int((whole * _percentage(text, whole) / 100).to_integral_value(ROUND_CEILING))


def format_gib(num_bytes: int) -> str:
    """Memory for people: GiB, with enough digits that small models do not print as 0.00."""
    gib = num_bytes / GIB
    if gib >= 1:
        return f"{gib:.2f} GiB"
    return f"{gib:.4f} GiB" if gib >= 0.001 or not gib else f"{gib:.2g} GiB"


def format_count(count: int) -> str:
    """A count for people: ``8.89 B``, ``3.96 M`` or ``512``."""
    for scale, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= scale:
            return f"{count / scale:.2f} {suffix}"
    return str(count)
