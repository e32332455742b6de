"""Guarantee: each point of a measured sweep is the best measured candidate that fits; its plan cuts so."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.cut.plan import read_plan
from minipuzzle.files.checkpoint import Checkpoint
from tests.support.cli import run_cli

SMALL = ["--context", "64", "--samples", "2", "--sequence-length", "16", "--granularity", "16", "--min-kept", "0.3"]


def test_a_sweep_writes_the_best_measured_plan_of_each_budget(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out, validation = tmp_path / "frontier", tmp_path / "validation.txt"
    validation.write_text("Seven wizards jump over a lazy fox.", encoding="utf-8")
    arguments = ["prune", str(tiny_folder), "--data", str(text_file), *SMALL, "--candidates", "2", "-o", str(out)]
    result = run_cli(*arguments, "--validation", validation, "--sweep", "40%:90%:10%", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.output)
    source = Checkpoint.open(tiny_folder).architecture
    points, candidates = record["frontier"], record["candidates"]
    assert len(points) == 6 and points[0]["memory_bytes"] is None and points[-1]["memory_bytes"] is not None
    assert {candidate["num_tokens"] for candidate in candidates} == {35}  # a byte a token, the first after the opening
    for point in points:
        fitting = [candidate for candidate in candidates if candidate["memory_bytes"] <= point["budget_bytes"]]
        assert point["quality"] == min((candidate["kl"] for candidate in fitting), default=None)
        if point["memory_bytes"] is not None:
            plan = read_plan(out / f"plan-{point['budget_bytes']}.json")
            plan.check_against(source)
            cut_bytes = memory_breakdown(plan.apply(source), Deployment(context_tokens=64)).total_bytes
            assert cut_bytes == point["memory_bytes"] <= point["budget_bytes"]
    rows = list(csv.DictReader((out / "frontier.csv").open(encoding="utf-8")))
    assert [row["kl"] for row in rows] == [
        "" if point["quality"] is None else str(point["quality"]) for point in points
    ]
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_that_also_cuts_is_refused(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ["prune", str(tiny_folder), "--data", str(text_file), "-o", str(tmp_path / "out")]
    result = run_cli(*arguments, "--sweep", "40%:90%:10%", "--refine")
    assert result.exit_code == 1 and "cuts nothing" in result.output
    assert not list(tmp_path.iterdir())
