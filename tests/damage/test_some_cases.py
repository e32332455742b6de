"""Guarantee: of every kind of damage some dozens of cases end as they must; ``make test-damage`` runs them all.

None is accepted in silence, ends in a traceback, hangs, takes too much memory, runs code of an input, or changes a file
of the user's. The runner itself tells each of these faults from what is right.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.damage import runner
from tests.damage.cases import GROUPS
from tests.damage.config_cases import evaluated
from tests.damage.material import copy, write_material
from tests.damage.runner import DONE, REFUSED, Case, run_here

NUM_CASES = {"state_cases": 8, "target_cases": 16, "export_cases": 12}  # of a group; others have DEFAULT_CASES
DEFAULT_CASES = 36
LARGE = ("huge", "big", "99MB", "nested", "zeros")  # what takes long to make or to read


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("damage") / "material")


def some_cases(group: ModuleType, material: Path) -> Iterator[Case]:
    """One that is whole, and a seeded choice of those that must be refused: what is refused is done soon."""
    cases = list(group.cases(material))
    refused = [case for case in cases if case.expected == REFUSED and not any(word in case.name for word in LARGE)]
    name = group.__name__.rpartition(".")[2]
    yield from random.Random(name).sample(refused, NUM_CASES.get(name, DEFAULT_CASES))
    yield from [case for case in cases if case.expected == DONE and "state" not in case.name][:1]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__.rpartition(".")[2])
def test_some_of_every_kind_of_damage_are_told(group: ModuleType, material: Path, tmp_path: Path) -> None:
    cases = list(some_cases(group, material))
    outcomes = [run_here(case, tmp_path / str(number)) for number, case in enumerate(cases)]
    assert [(o.case, o.verdict, o.output[-400:]) for o in outcomes if not o.is_right] == []


def test_the_runner_tells_every_fault(material: Path, tmp_path: Path) -> None:
    """Commands that do what they should, in cases that expect something else."""

    def prepared(*arguments: str, files: tuple[str, ...] = ()) -> Case:
        def prepare(folder: Path) -> list[str]:
            copy(material, folder, "llama", "text.jsonl")
            for name in files:
                (folder / name).touch()
            return list(arguments) or evaluated(folder, "llama")

        return Case(name="example", prepare=prepare)

    inspected = ("inspect", "llama/config.json", "--json")
    cases = {
        runner.SILENT: prepared(*inspected),
        runner.EXECUTED: prepared(*inspected, files=(runner.CANARY,)),
        runner.TRACEBACK: prepared("--debug", "inspect", "nowhere"),
        runner.CHANGED: prepared("export", "llama", "--bf16", "--device", "cpu", "-o", "elsewhere"),
        REFUSED: prepared("inspect", "nowhere"),
    }
    for verdict, case in cases.items():
        outcome = run_here(case, tmp_path / verdict)
        assert outcome.verdict == verdict, outcome.output
        assert outcome.is_right == (verdict == REFUSED)
