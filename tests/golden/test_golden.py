"""Guarantee: sizes, plans from given scores, codes of given weights and losses are those that were committed.

Losses, scores and factors of norms are sums that machines round differently, so they may differ by 1e-4 of themselves;
everything else is equal. ``make golden-write`` writes them anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.golden.facts import NAMES, facts_of

FOLDER = Path(__file__).parent / "facts"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All single values of nested records by their paths."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{path} / {key}")
    else:
        yield path, value


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_those_that_were_committed(name: str, tmp_path: Path) -> None:
    wanted = dict(leaves(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))))
    found = dict(leaves(facts_of(name, tmp_path)))
    assert found.keys() == wanted.keys()
    close = {path: pytest.approx(value, rel=1e-4, abs=1e-8) for path, value in wanted.items() if type(value) is float}
    assert found == {**wanted, **close}


def test_every_file_of_facts_is_of_a_model_that_there_is() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(NAMES)
