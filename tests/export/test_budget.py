"""Guarantee: what a model was cut for travels with it, and no later step takes more memory without being told to.

Sizes are counted from the files that an export leaves, beside the caches of the deployment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import minipuzzle as mp
from minipuzzle.architecture.memory import WEIGHT_TERMS, Deployment
from minipuzzle.cut.budget import ServingBudget, read_serving_budget
from minipuzzle.cut.plan import read_plan
from minipuzzle.errors import ExitCode, InfeasibleBudgetError, MinipuzzleError, MinipuzzleWarning
from minipuzzle.export.budget import exported_bytes
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.formats.layout import export_layout
from tests.support.cli import run_cli, run_json
from tests.support.tiny_models import write_family_checkpoint, write_tiny_checkpoint

DEPLOYMENT = Deployment(context_tokens=2048, weights="nvfp4", kv_cache="fp8")
MEASURED: dict[str, Any] = {"samples": 2, "sequence_length": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source`` and ``pruned``, which was cut for NVFP4 weights and an FP8 cache, and has no byte to spare."""
    root = tmp_path_factory.mktemp("budget")
    (root / "text.txt").write_text("Words like those that will be read. " * 60)
    write_tiny_checkpoint(root / "source", pattern="M-M*-M-*")
    scores = mp.score(root / "source", data=root / "text.txt", **MEASURED)
    asked: dict[str, Any] = {"deployment": DEPLOYMENT, "granularity": 16}
    best = mp.search(root / "source", scores, memory="85%", **asked).best.candidate
    how: dict[str, Any] = {"scores": scores, "num_candidates": 1, "no_compensate": True, **asked}
    mp.prune(root / "source", memory=f"{best.memory_bytes}B", out=root / "pruned", **how)
    return root


def export(root: Path, name: str, *options: object) -> list[object]:
    return ["export", root / name, "--data", root / "text.txt", "--samples", 2, "--sequence-length", 16, *options]


def test_a_cut_remembers_its_deployment_and_its_budget_in_bytes(root: Path) -> None:
    figures = read_plan(root / "pruned/plan.json").figures
    assert figures is not None
    found = read_serving_budget(root / "pruned")
    assert found == ServingBudget(deployment=DEPLOYMENT, budget_bytes=int(figures.limits["memory_bytes"]))
    assert read_serving_budget(root / "source") is None


def test_a_plan_from_a_file_brings_its_own_deployment(root: Path, tmp_path: Path) -> None:
    plan = root / "pruned/plan.json"
    run_json("prune", root / "source", "--plan", plan, "--no-compensate", "-o", tmp_path / "again")
    assert read_serving_budget(tmp_path / "again") == read_serving_budget(root / "pruned")


def test_the_plans_memory_is_that_of_the_exported_files_and_the_caches(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_cli(*export(root, "pruned", "-o", out))
    assert result.exit_code == 0 and "in NVFP4, which" in result.stderr, result.output
    found = Checkpoint.open(out).architecture
    figures = read_plan(root / "pruned/plan.json").figures
    assert figures is not None
    stored = sum(entry.num_bytes for entry in Checkpoint.open(out).entries.values())
    labels = ("KV cache", "SSM state", "convolution state")
    caches = sum(term.num_bytes for term in figures.memory_terms if term.name in labels)
    layout = export_layout(found, scheme="nvfp4", fp8_kv_cache=True)
    assert len(figures.memory_terms) == len(WEIGHT_TERMS) - 1 + len(labels)  # nothing is carried
    assert stored + caches == figures.memory_bytes == exported_bytes(found, layout, DEPLOYMENT)
    assert read_json(out / "config.json")["quantization_config"]["kv_cache_quant_algo"] == "FP8"
    assert read_serving_budget(out) == read_serving_budget(root / "pruned")


@pytest.mark.parametrize("options", [("--fp8",), ("--bf16",), ("--nvfp4", "--kv-cache", "bf16")])
def test_an_export_beyond_the_budget_is_refused_unless_asked_for(
    root: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    command = export(root, "pruned", *options, "-o", tmp_path / "out")
    for extra in ((), ("--dry-run",)):
        refused = run_cli(*command, *extra)
        assert refused.exit_code == ExitCode.INFEASIBLE and "was cut for" in refused.stderr, refused.output
        assert "--over-budget" in refused.stderr and not list(tmp_path.iterdir())
    assert run_cli(*command, "--over-budget", "--dry-run").exit_code == 0


def test_python_refuses_and_chooses_alike(root: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"data": root / "text.txt", "no_verify": True, **MEASURED}
    with pytest.raises(InfeasibleBudgetError, match="was cut for"):
        mp.export(root / "pruned", "fp8", out=tmp_path / "out", **how)
    assert mp.export(root / "pruned", out=tmp_path / "out", **how).checkpoint.config["quantization_config"]
    with pytest.raises(MinipuzzleError, match="nothing says in which format"):
        mp.export(root / "source", out=tmp_path / "other", **how)


def test_distillation_is_refused_for_rounding_that_does_not_fit(root: Path, tmp_path: Path) -> None:
    train = ("--data", root / "text.txt", "--tokens", 64, "--sequence-length", 16, "--batch", 4)
    command = ("distill", root / "pruned", *train, "-o", tmp_path / "out")
    for extra in ((), ("--dry-run",)):
        refused = run_cli(*command, "--qat", "fp8", *extra)
        assert refused.exit_code == ExitCode.INFEASIBLE and "with fp8 weights would take" in refused.stderr
    assert run_cli(*command, "--qat", "fp8", "--dry-run", "--over-budget").exit_code == 0
    trained = run_cli(*command)
    assert trained.exit_code == 0 and f"next: minipuzzle export {tmp_path / 'out'} -o" in trained.output, trained.output
    assert read_serving_budget(tmp_path / "out") == read_serving_budget(root / "pruned")


def test_a_head_that_was_counted_in_the_format_is_written_in_it(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    write_tiny_checkpoint(folder, pattern="M-")
    deployment = {**json.loads(json.dumps(DEPLOYMENT.__dict__)), "head": "nvfp4", "kv_cache": "bf16"}
    write_json(folder / "minipuzzle.json", {"made_for": {"deployment": deployment, "budget_bytes": None}})
    result = mp.export(folder, data=root / "text.txt", out=tmp_path / "out", no_verify=True, **MEASURED)
    assert "lm_head.weight_scale_2" in result.checkpoint.entries


def test_memory_that_no_export_writes_is_said(root: Path, tmp_path: Path) -> None:
    llama = write_family_checkpoint(tmp_path / "llama", "llama")
    for model, deployment, words in (
        (root / "source", ("--embeddings", "nvfp4"), "embeddings in nvfp4"),
        (root / "source", ("--kv-cache", "nvfp4"), "KV cache in nvfp4"),
        (llama, ("--kv-cache", "fp8"), "KV cache in fp8"),
    ):
        assert words in run_cli("inspect", model, *deployment).stderr
    assert not run_cli("inspect", root / "source", "--kv-cache", "fp8", "--weights", "nvfp4").stderr


def test_a_damaged_record_is_named(root: Path, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "cut", pattern="M-")
    for wrong in ({"deployment": 3}, {"deployment": {"weights": "fp3"}, "budget_bytes": 1}, 7):
        write_json(folder / "minipuzzle.json", {"made_for": wrong})
        result = run_cli("export", folder, "-o", tmp_path / "out")
        assert result.exit_code == 1 and "minipuzzle.json is damaged" in result.stderr, result.output


def test_default_samples_are_what_the_text_has_and_asked_for_ones_must_be_there(root: Path, tmp_path: Path) -> None:
    short = {"data": root / "text.txt", "sequence_length": 64}
    for verb, how in (("score", {}), ("export", {"no_verify": True})):
        what = (root / "source",) if verb == "score" else (root / "source", "fp8")
        with pytest.warns(MinipuzzleWarning, match="the text holds 33 samples of 64 tokens, not"):
            getattr(mp, verb)(*what, out=tmp_path / f"{verb}.safetensors", **short, **how)
        with pytest.raises(MinipuzzleError, match="but 40 samples of 64 need"):
            getattr(mp, verb)(*what, out=tmp_path / "other.safetensors", samples=40, **short, **how)
    command = ("prune", root / "source", "--memory", "85%", "--granularity", 16, "--data", root / "text.txt")
    planned = run_cli(*command, "--sequence-length", 64, "--dry-run", "--json", "-o", tmp_path / "cut")
    assert json.loads(planned.stdout)["calibration_tokens"] == 33 * 64 and "33 samples" in planned.stderr
