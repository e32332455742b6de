"""All cases: every kind of input, damaged in every way that files are damaged in practice or by malice.

Cases that follow a pattern are generated, and a seeded generator chooses positions and bits, so the corpus is the same
on every machine. Each says what is right: REFUSED by a message, DONE because the damage does no harm, or EITHER.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.damage import config_cases, data_cases, export_cases, plan_cases, state_cases, target_cases, weight_cases
from tests.damage.runner import Case

GROUPS = (config_cases, weight_cases, plan_cases, data_cases, export_cases, state_cases, target_cases)


def all_cases(material: Path) -> Iterator[Case]:
    """The whole corpus on some material."""
    for group in GROUPS:
        yield from group.cases(material)
