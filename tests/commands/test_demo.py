"""Guarantee: the demo runs the whole path, can be interrupted, and keeps its promises on the embedded model.

The default tests run it on a tiny random model with few tokens; the slow one runs what `make demo` runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.cli import run_cli
from tests.support.tiny_models import write_tiny_checkpoint

SMALL = ("--memory", "90%", "--tokens", "8k", "--samples", "2")


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo on a random model whose FFN the default grid can narrow."""
    folder = tmp_path_factory.mktemp("demo")
    model = write_tiny_checkpoint(folder / "model", pattern="M-M*-M*-", intermediate_size=512)
    result = run_cli("demo", "--model", model, *SMALL, "-o", folder / "out", "--json")
    assert result.exit_code == 0, result.output
    (folder / "facts.json").write_text(result.stdout)
    return folder


def test_the_demo_reports_every_stage(demo_folder: Path) -> None:
    facts = json.loads((demo_folder / "facts.json").read_text())
    stages = {stage["name"]: stage for stage in facts["stages"]}
    assert list(stages) == ["teacher", "pruned", "compensated", "distilled", "FP8"]
    assert stages["pruned"]["memory_bytes"] <= 0.9 * stages["teacher"]["memory_bytes"]
    assert stages["FP8"]["memory_bytes"] < stages["distilled"]["memory_bytes"] == stages["pruned"]["memory_bytes"]
    assert stages["teacher"]["overall"]["kl"] == pytest.approx(0, abs=1e-6)
    # Two steps on a random model recover nothing, but they must show, and only in the distilled model.
    kl = {name: stage["overall"]["kl"] for name, stage in stages.items()}
    assert kl["pruned"] > 0
    assert kl["compensated"] != kl["distilled"]
    assert set(stages["teacher"]["by_domain"]) == {"speeches", "code"}


def test_every_stage_of_the_demo_is_a_complete_folder(demo_folder: Path) -> None:
    for stage in ("pruned", "compensated", "distilled", "fp8"):
        names = {path.name for path in (demo_folder / "out" / stage).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "minipuzzle.json"} <= names
        assert not any(name.endswith(".partial") for name in names)
    assert (demo_folder / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_demo_continues_with_the_step_it_was_in(demo_folder: Path, tmp_path: Path) -> None:
    """An interruption during the export leaves the partial folder that is put together here."""
    partial = tmp_path / "out.partial"
    shutil.copytree(demo_folder / "out", partial)
    shutil.rmtree(partial / "fp8")
    (partial / "demo.png").unlink()
    written = (partial / "distilled" / "model.safetensors").stat().st_mtime_ns
    arguments = ["demo", "--model", str(demo_folder / "model"), *SMALL, "-o", str(tmp_path / "out")]
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "fp8" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "distilled" / "model.safetensors").stat().st_mtime_ns == written


def test_a_dry_run_of_the_demo_writes_nothing(demo_folder: Path, tmp_path: Path) -> None:
    model = demo_folder / "model"
    result = run_cli("demo", "--model", model, *SMALL, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_embedded_model_recovers_and_fp8_costs_next_to_nothing(tmp_path: Path) -> None:
    """At 75 % of the memory: compensation leaves at most 40 % of the pruned model's KL, distilling at most 30 %, and
    FP8 adds at most 0.02 nats."""
    result = run_cli("demo", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    kl = {stage["name"]: stage["overall"]["kl"] for stage in facts["stages"]}
    memory = {stage["name"]: stage["memory_bytes"] for stage in facts["stages"]}
    assert memory["pruned"] <= 0.75 * memory["teacher"]
    assert kl["compensated"] <= 0.4 * kl["pruned"]
    assert kl["distilled"] <= 0.3 * kl["pruned"]
    assert kl["FP8"] - kl["distilled"] <= 0.02
    assert facts["peak_rss_bytes"] <= 4 * 2**30
