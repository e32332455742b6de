"""Guarantee: a sweep is as many searches, and what it writes and draws holds their figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from minipuzzle.architecture.quantities import GIB
from minipuzzle.errors import MinipuzzleError
from minipuzzle.search.sweep import parse_sweep
from tests.support.cli import run_cli

MODEL = Path(__file__).parents[2] / "examples" / "tiny_hybrid" / "model"


def search(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"layer": {"mse": [1.0 + abs(13 - idx) for idx in range(26)]}}))
    result = run_cli("search", MODEL, "--scores", scores, *arguments)
    return result.exit_code, result.stdout if result.exit_code == 0 else result.output


def test_budgets_are_read_in_sizes_and_shares() -> None:
    assert parse_sweep("20GiB:40GiB:10GiB", 0) == (20 * GIB, 30 * GIB, 40 * GIB)
    assert parse_sweep("20GiB:35GiB:10GiB", 0) == (20 * GIB, 30 * GIB, 35 * GIB)
    assert parse_sweep("50%:100%:25%", 10**6) == (500_000, 750_000, 10**6)
    assert parse_sweep("30%:100%:10%", 12_555_024)[-2:] == (11_299_519, 12_555_024)
    assert parse_sweep("1GiB:1GiB:1GiB", 0) == (GIB,)


@pytest.mark.parametrize("text", ["20GiB", "20GiB:40GiB", "40GiB:20GiB:1GiB", "1GiB:2GiB:1MiB", "1:2:3"])
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(MinipuzzleError):
        parse_sweep(text, 10**6)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_each_point_is_the_search_at_its_budget(layout: str, tmp_path: Path) -> None:
    options = ("--layout", layout, "--context", "4096", "--params", "95%")
    files = ("--csv", str(tmp_path / "frontier.csv"), "--plot", str(tmp_path / "frontier.png"))
    exit_code, output = search(tmp_path, *options, "--sweep", "9MiB:11MiB:1MiB", *files, "--json")
    assert exit_code == 0, output
    frontier = json.loads(output)["frontier"]
    for point, memory in zip(frontier, ("9MiB", "10MiB", "11MiB"), strict=True):
        alone = json.loads(search(tmp_path, *options, "--memory", memory, "--top", "1", "--json")[1])
        figures = ("memory_bytes", "num_parameters", "predicted_loss")
        assert [point["memory_bytes"], point["num_parameters"], point["quality"]] == [alone[name] for name in figures]
    with (tmp_path / "frontier.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["predicted_loss"]) for row in rows] == [point["quality"] for point in frontier]
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_that_nothing_fits_is_a_point_without_figures(tmp_path: Path) -> None:
    exit_code, output = search(tmp_path, "--context", "4096", "--sweep", "1MiB:10MiB:9MiB")
    assert exit_code == 0
    assert "nothing fits" in output.splitlines()[1]
    frontier = json.loads(search(tmp_path, "--context", "4096", "--sweep", "1MiB:10MiB:9MiB", "--json")[1])["frontier"]
    assert frontier[0]["memory_bytes"] is None and "is the least" in frontier[0]["description"]
    assert frontier[1]["memory_bytes"] <= 10 * 2**20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sweep", "1MiB:9MiB:1MiB", "--memory", "9MiB"), "--sweep and --memory"),
        (("--sweep", "1MiB:9MiB:1MiB", "-o", "plan.json"), "no one plan"),
        (("--memory", "9MiB", "--csv", "x.csv"), "belong to a sweep"),
        (("--sweep", "9MiB"), "not a sweep"),
    ],
)
def test_options_that_clash_are_refused(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    exit_code, output = search(tmp_path, *arguments)
    assert exit_code == 1 and words in output
