"""Guarantee: a named deployment is its figures, a user's file extends the table, and options given beside it win."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.architecture.deployments import DEPLOYMENTS, find_deployment, read_deployments
from minipuzzle.architecture.quantities import GIB, parse_bytes
from minipuzzle.errors import MinipuzzleError
from tests.support.cli import run_cli, run_json

MODEL = Path(__file__).parents[2] / "examples" / "tiny_hybrid" / "model"
FILE = """
[our-server]
memory = "7MiB"
context = "1Ki"
batch = 2
weights = "fp8"
source = "measured"

[a10g-bf16-128k]
context = 64
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "deployments.toml"
    path.write_text(FILE)
    return path


def inspect(*arguments: str | Path) -> dict[str, Any]:
    return run_json("inspect", MODEL, *arguments)


def test_every_named_deployment_states_its_budget_and_where_it_comes_from() -> None:
    for named in DEPLOYMENTS.values():
        assert named.source
        assert named.memory is not None and parse_bytes(named.memory) > GIB


def test_the_published_budgets_are_those_of_the_papers() -> None:
    rtx, a10g = DEPLOYMENTS["rtx5090-fp4-1M"], DEPLOYMENTS["a10g-bf16-128k"]
    assert (rtx.memory, rtx.deployment.context_tokens, rtx.deployment.weights) == ("31.7GiB", 10**6, "nvfp4")
    assert (a10g.memory, a10g.deployment.context_tokens, a10g.deployment.kv_cache) == ("19.66GiB", 2**17, "bf16")


def test_options_beside_a_named_deployment_win() -> None:
    found = inspect("--deployment", "rtx5090-fp4-1M", "--context", "128k", "--kv-cache", "fp8")
    assert (found["deployment"]["context_tokens"], found["deployment"]["kv_cache"]) == (128_000, "fp8")
    assert found["deployment"]["weights"] == "nvfp4"
    assert found["budget_bytes"] == parse_bytes("31.7GiB")


def test_a_file_extends_and_overrides_the_table(file: Path) -> None:
    found = inspect("--deployments", file, "--deployment", "our-server")
    assert {name: found["deployment"][name] for name in ("context_tokens", "batch", "weights", "head")} == {
        "context_tokens": 1024,
        "batch": 2,
        "weights": "fp8",
        "head": "bf16",
    }
    assert find_deployment("a10g-bf16-128k", file).deployment.context_tokens == 64
    assert find_deployment("h100-fp8-1M", file) == DEPLOYMENTS["h100-fp8-1M"]


def test_a_deployment_brings_its_budget_to_a_search(file: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"layer": {"mse": [1.0] * 26}}))
    command = ["search", str(MODEL), "--scores", str(scores), "--deployments", str(file), "--json"]
    assert run_json(*command, "--deployment", "our-server")["memory_bytes"] <= 7 * 2**20
    tighter = run_cli(*command, "--deployment", "our-server", "--memory", "6MiB")
    assert json.loads(tighter.stdout)["memory_bytes"] <= 6 * 2**20


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[x]\nweights = 'fp3'", "fp3"),
        ("[x]\nmemory = '12'", "unit"),
        ("[x]\nspeed = 1", "speed"),
        ("x = 1", "not a table"),
        ("[x", "TOML"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(MinipuzzleError, match=word) as caught:
        read_deployments(path)
    assert "wrong.toml" in caught.value.problem


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(MinipuzzleError) as caught:
        find_deployment("abacus")
    assert "rtx5090-fp4-1M" in caught.value.hint
