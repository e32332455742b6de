"""Guarantee: measured times limit a search as memory does, and nothing is guessed that was not measured."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipuzzle.architecture.families import FAMILIES, read_architecture
from minipuzzle.architecture.memory import Deployment
from minipuzzle.architecture.timings import read_timings
from minipuzzle.cut.scores import Scores
from minipuzzle.errors import InfeasibleBudgetError, MinipuzzleError
from minipuzzle.search.candidates import resized
from minipuzzle.search.engine import find_candidates
from minipuzzle.search.request import SearchRequest
from tests.support.cli import run_cli, run_json

TABLE = """kind,ffn,kv_group,step_seconds
outer,,,0.001
mamba,,,0.002
attention,,1,0.0008
attention,,2,0.0010
mlp,16,,0.0010
mlp,48,,0.0030
"""
SECONDS: dict[str, dict[int, float]] = {"attention": {1: 0.0008, 2: 0.0010}, "mlp": {16: 0.001, 32: 0.002, 48: 0.003}}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "timings.csv"
    path.write_text(TABLE)
    return path


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize(
    "limit", [{"throughput": 450.0}, {"latency_ms": 4.4}, {"throughput": 300.0, "latency_ms": 4.4}]
)
def test_the_best_within_a_limit_is_that_of_enumeration(limit: dict[str, Any], layout: str, table: Path) -> None:
    """Two sequences at once: 450 tokens/s leave 4.44 ms a step, 300 leave 6.67."""
    layers = {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4}
    source = read_architecture({**FAMILIES["nemotron_h"].tiny_config, **layers})
    scores = Scores(layer={"mse": np.array([0.5, 0.3, 0.2, 0.7])})
    widths = {"ffn": "16,32,48", "kv_group": "1,2"}
    request = SearchRequest(**limit, layout=layout, timings=read_timings(table), widths=widths, min_kept_fraction=0)
    best = np.inf
    mlp: list[int | None] = [None, *SECONDS["mlp"]]
    attention: list[int | None] = [None, *SECONDS["attention"]]
    for mamba, first, group, last in itertools.product((None, 1), mlp, attention, mlp):
        if layout == "uniform" and None not in (first, last) and first != last:
            continue
        times = [0.001, 0.002 if mamba else 0, *(SECONDS["mlp"][width] for width in (first, last) if width)]
        times += [SECONDS["attention"][group]] if group else []
        most = min(limit.get("latency_ms", 99.0) / 1e3, 2 / limit["throughput"] if "throughput" in limit else 99.0)
        if sum(times) <= most:
            cut = [1 - (width or 0) / full for width, full in ((mamba, 1), (first, 48), (group, 2), (last, 48))]
            best = min(best, float(np.dot(cut, scores.layer["mse"])))
    deployment = Deployment(batch=2)
    found = find_candidates(source, scores, request, deployment, max_candidates=1)[0]
    assert found.predicted_loss == pytest.approx(best)
    found.check()


def test_between_two_measured_widths_times_are_interpolated_and_beyond_them_refused(table: Path) -> None:
    timings = read_timings(table)
    source = read_architecture(FAMILIES["nemotron_h"].tiny_config)
    mlp = source.layers[1]
    assert timings.layer_nanoseconds(mlp.resized(ffn=24)) == 1_500_000
    with pytest.raises(MinipuzzleError, match=r"holds no mlp layer with .*ffn 8"):
        timings.layer_nanoseconds(mlp.resized(ffn=8))
    assert timings.outer_nanoseconds == 1_000_000
    assert resized(source, {1: {"ffn": 24}}).layers[0] == mlp.resized(ffn=24)


def test_an_unreachable_throughput_is_infeasible_and_says_what_is_the_least(table: Path) -> None:
    source = read_architecture(FAMILIES["nemotron_h"].tiny_config)
    request = SearchRequest(throughput=1e6, timings=read_timings(table))
    with pytest.raises(InfeasibleBudgetError, match=r"time of a step .* is asked for"):
        find_candidates(source, Scores(layer={"mse": np.ones(7)}), request, Deployment())


def test_the_command_reports_tokens_a_second(table: Path, tmp_path: Path) -> None:
    config, scores = tmp_path / "config.json", tmp_path / "scores.json"
    config.write_text(json.dumps(FAMILIES["nemotron_h"].tiny_config))
    scores.write_text(json.dumps({"layer": {"mse": [1.0] * 7}}))
    command = ["search", str(config), "--scores", str(scores), "--timings", str(table), "--min-kept", "0"]
    found = run_json(*command, "--throughput", "100")
    assert found["tokens_per_second"] == pytest.approx(1 / found["step_seconds"])
    assert found["tokens_per_second"] >= 100
    assert "tokens/s" in run_cli(*command, "--throughput", "100").output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind,seconds\nmlp,1\n", "no columns"),
        ("kind,step_seconds\n", "no times"),
        ("kind,step_seconds\nmlp,fast\n", "line 2"),
        ("kind,step_seconds\nmlp,-1\n", "line 2"),
        ("kind,ffn,step_seconds\nmlp,x,1\n", "line 2"),
    ],
)
def test_a_broken_table_is_an_error_that_names_the_place(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.csv"
    path.write_text(text)
    with pytest.raises(MinipuzzleError, match=words):
        read_timings(path)
    with pytest.raises(MinipuzzleError, match="cannot read"):
        read_timings(tmp_path / "missing.csv")
