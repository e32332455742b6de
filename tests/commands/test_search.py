"""Guarantee: `inspect` and `search` work from config.json and a score file alone, and say the same in JSON.

The published case: Nemotron-H 56B, 118 layers, cut to the layer counts and FFN width of the 47B (arXiv 2504.03624).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from minipuzzle.cut.plan import read_plan
from tests.support.cli import run_cli, run_json
from tests.support.tiny_models import published_config

CONFIG_56B = published_config()
PATTERN_56B = CONFIG_56B["hybrid_override_pattern"]
TARGETS_47B = ("--keep", "mamba=45", "--keep", "mlp=48", "--keep", "attention=5", "--width", "ffn=30720")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG_56B))
    return path


@pytest.fixture
def score_file(tmp_path: Path) -> Path:
    """Layer scores that rise with the layer's index, so that it is plain which go."""
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"layer": {"mse": [1.0 + idx for idx in range(len(PATTERN_56B))]}}))
    return path


def test_inspect_finds_the_published_size_of_the_56b(config_file: Path) -> None:
    found = run_json("inspect", config_file, "--weights", "nvfp4", "--context", "1M")
    assert found["layers"] == {"mamba": 54, "attention": 10, "mlp": 54}
    assert found["num_parameters"] == pytest.approx(56.32e9, rel=1e-3)
    assert found["memory_bytes"] == sum(term["num_bytes"] for term in found["memory_terms"])
    cache = next(term for term in found["memory_terms"] if term["name"] == "KV cache")
    assert cache == {"name": "KV cache", "num_bytes": 10 * 2 * 8 * 128 * 1_000_000 * 2, "precision": "bf16"}


def test_search_cuts_the_56b_to_the_counts_of_the_47b(config_file: Path, score_file: Path) -> None:
    found = run_json("search", config_file, "--scores", score_file, *TARGETS_47B)
    assert found["layers"] == {"mamba": 45, "attention": 5, "mlp": 48}
    assert found["widths"]["ffn"] == 30720
    dropped_counts = {"M": 9, "*": 5, "-": 6}
    lowest = {s: [i for i, symbol in enumerate(PATTERN_56B) if symbol == s][:n] for s, n in dropped_counts.items()}
    assert found["dropped_layers"] == sorted([*lowest["M"], *lowest["*"], *lowest["-"]])
    kept = set(range(len(PATTERN_56B))) - set(found["dropped_layers"])
    assert found["pattern"] == "".join(PATTERN_56B[idx] for idx in sorted(kept))
    assert found["num_parameters"] == pytest.approx(46.8e9, rel=5e-3)


def test_search_within_a_budget_lists_candidates_that_fit(config_file: Path, score_file: Path) -> None:
    budget = ("--memory", "31.7GiB", "--context", "1M", "--granularity", "1024", "--min-kept", "0.3")
    precisions = ("--weights", "nvfp4", "--kv-cache", "fp8")
    found = run_json("search", config_file, "--scores", score_file, *budget, *precisions)
    assert len(found["candidates"]) == 5
    assert all(candidate["memory_bytes"] <= 31.7 * 2**30 for candidate in found["candidates"])
    assert found["memory_bytes"] == found["candidates"][0]["memory_bytes"]


def test_a_plan_written_by_search_is_the_plan_it_printed(config_file: Path, score_file: Path, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.json"
    targets = ("--keep", "mamba=45", "--keep", "attention=5")
    found = run_json("search", config_file, "--scores", score_file, *targets, "-o", plan_file)
    dropped = set(found["dropped_layers"])
    assert read_plan(plan_file).kept_layers == tuple(idx for idx in range(118) if idx not in dropped)


def test_a_width_cannot_be_planned_without_unit_scores(config_file: Path, score_file: Path, tmp_path: Path) -> None:
    arguments = ["search", config_file, "--scores", score_file, *TARGETS_47B, "-o", tmp_path / "plan.json"]
    result = run_cli(*arguments)
    assert result.exit_code == 1
    assert "the scores hold nothing about ffn" in result.output


def test_people_see_the_cut_and_that_the_scores_are_unverified(config_file: Path, score_file: Path) -> None:
    result = run_cli("search", config_file, "--scores", score_file, *TARGETS_47B)
    assert result.exit_code == 0
    assert "unverified" in result.output
    assert "46.79 B" in result.output


def test_prune_says_what_search_says_about_budgets_too_large_and_too_small(tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "examples" / "tiny_hybrid"
    text = model / "text" / "calibration.jsonl"
    command = ["prune", str(model / "model"), "--data", str(text), "-o", str(tmp_path / "x")]
    too_large = run_cli(*command, "--memory", "100%")
    assert too_large.exit_code == 1 and "nothing needs pruning" in too_large.output
    too_small = run_cli(*command, "--memory", "10%")
    assert too_small.exit_code == 3 and "is the least" in too_small.output
    assert not (tmp_path / "x").exists()


def test_outputs_replace_files_of_their_own_kind_only_and_on_request(
    config_file: Path, score_file: Path, tmp_path: Path
) -> None:
    targets = ("--keep", "mamba=45", "--keep", "attention=5", "-o")
    sweep = ("--sweep", "60%:100%:20%", "--granularity", "1024", "--csv", tmp_path / "f.csv", "--plot")
    for arguments, outputs in (
        ((*targets, tmp_path / "p.json"), ["p.json"]),
        ((*sweep, tmp_path / "f.svg"), ["f.csv"]),
    ):
        command = ("search", config_file, "--scores", score_file, *arguments)
        assert run_cli(*command).exit_code == 0
        assert "exists" in run_cli(*command).stderr
        assert run_cli(*command, "--overwrite").exit_code == 0
        (tmp_path / outputs[0]).write_text("{}")
        refused = run_cli(*command, "--overwrite")
        assert refused.exit_code == 1 and "no such file as would be written" in refused.stderr
        assert (tmp_path / outputs[0]).read_text() == "{}"
    refused = run_cli("search", config_file, "--scores", score_file, *targets, score_file, "--overwrite")
    assert "which is an input" in refused.stderr


def test_the_readme_cuts_for_what_it_exports_and_finds_it_on_the_published_config(score_file: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("minipuzzle ")]
    (cut, exported), budget = ([next(c for c in commands if c[1] == name) for name in ("prune", "export")], "31.7GiB")
    assert f"--{cut[cut.index('--weights') + 1]}" in exported
    assert exported[exported.index("--kv-cache") + 1] == cut[cut.index("--kv-cache") + 1]
    search = next(c for c in commands if c[1] == "search" and budget in c)
    config = Path(__file__).parents[2] / "examples/nemotron_h_56b/config.json"
    given = {"big/config.json": str(config), "scores.safetensors": str(score_file)}
    found = run_json(*(given.get(word, word) for word in search[1:]))
    assert found["memory_bytes"] <= 31.7 * 2**30
