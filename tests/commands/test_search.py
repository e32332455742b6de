"""Guarantee: `inspect` and `search` work from config.json and a score file alone, and say the same in JSON.

The published case: Nemotron-H 56B, 118 layers, cut to the layer counts and FFN width of the 47B (arXiv 2504.03624).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from minipuzzle.architecture.deployments import DEPLOYMENTS
from minipuzzle.architecture.families import read_architecture
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.cut.plan import plan_without, read_plan
from minipuzzle.cut.scores import Scores, write_scores
from minipuzzle.export.budget import exported_bytes
from minipuzzle.formats.layout import export_layout
from minipuzzle.search.engine import find_candidates
from minipuzzle.search.request import SearchRequest
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


PAGES = [Path(__file__).parents[2] / name for name in ("README.md", "docs/step_by_step.md")]
README = "".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", " ")
COMMANDS = [shlex.split(line, comments=True)[1:] for line in README.splitlines() if line.startswith("minipuzzle ")]
WITHOUT_WEIGHTS = [c for c in COMMANDS if c[0] in ("inspect", "search") or "--estimate" in c]
SLOW = "per-layer"  # the integer programme of 118 layers and 15 widths


def test_the_readme_exports_what_it_cuts_for_and_that_fits() -> None:
    """The published model has no weights here, so the export is priced by the tensors that it would hold."""
    cut, exported = (next(command for command in COMMANDS if command[0] == name) for name in ("prune", "export"))
    assert f"--{cut[cut.index('--weights') + 1]}" in exported
    assert exported[exported.index("--kv-cache") + 1] == cut[cut.index("--kv-cache") + 1] == "fp8"
    deployment = Deployment(context_tokens=10**6, weights="nvfp4", kv_cache="fp8")
    assert deployment == DEPLOYMENTS["rtx5090-fp4-1M"].deployment  # "the same by name"
    source = read_architecture(CONFIG_56B)
    scores = Scores(layer={"mse": np.arange(1.0, 119)})
    best = find_candidates(source, scores, SearchRequest(memory="31.7GiB"), deployment)[0].architecture
    layout = export_layout(best, scheme="nvfp4", fp8_kv_cache=True)
    assert exported_bytes(best, layout, deployment) == memory_breakdown(best, deployment).total_bytes <= 31.7 * 2**30


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow if SLOW in c else (), id=" ".join(c)) for c in WITHOUT_WEIGHTS]
)
def test_what_the_readme_says_without_weights_runs_on_the_published_config(
    command: list[str], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    units = {f"ffn.{idx}": generator.random(32768) for idx, symbol in enumerate(PATTERN_56B) if symbol == "-"}
    scores = Scores(layer={"mse": np.arange(1.0, 119)}, units={name: v.astype(np.float32) for name, v in units.items()})
    write_scores(scores, tmp_path / "scores.safetensors")
    (tmp_path / "plan.json").write_text(plan_without(read_architecture(CONFIG_56B), (3, 5)).to_json())
    if "-o" in command:
        (tmp_path / "plan.json").unlink()
    found = run_cli(*(str(config_file) if word == "big/config.json" else word for word in command))
    assert found.exit_code == 0, found.output
    if "--plot" in command:
        assert "nothing fits" not in found.output and (tmp_path / "frontier.png").is_file()
    if "-o" in command:
        read_plan(tmp_path / "plan.json").check_against(read_architecture(CONFIG_56B))
