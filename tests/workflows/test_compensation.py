"""Guarantee: prune mends what it cuts where there is text, says so, and leaves weights and units alone where asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.scale.gpus import GPUS
from importance.refits.work import predict_flops, sums_bytes
from minipuzzle.architecture.families import FAMILIES
from minipuzzle.cut.plan import read_plan
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import largest_layer_bytes
from minipuzzle.workflows.compensation import COMPENSATION_TOKENS, CutWriter, minutes_on, windows_that_fit
from tests.support.cli import run_cli, run_json
from tests.support.cuts import half_cut, some_tokens
from tests.support.tiny_models import published_config, write_tiny_checkpoint

SMALL = ("--memory", "90%", "--context", 64, "--samples", 2, "--sequence-length", 16, "--granularity", 16)


@pytest.fixture(scope="module")
def mended(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("mended") / "pruned"
    return out, run_json("prune", tiny_folder, "--data", text_file, *SMALL, "-o", out)


def test_prune_compensates_and_says_how(mended: tuple[Path, dict[str, Any]]) -> None:
    out, facts = mended
    record = json.loads((out / "compensation.json").read_text())
    assert record == facts["compensation"]
    assert record["layers_refitted"] + record["layers_left_plain"] == len(record["layers"]) > 0
    settings = json.loads((out / "minipuzzle.json").read_text())["settings"]
    assert settings["compensate"] is True


def test_without_it_the_weights_are_the_sources_cut(
    mended: tuple[Path, dict[str, Any]], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out, plain = mended[0], tmp_path / "plain"
    asked = ("--data", text_file, *SMALL, "--no-compensate")
    result = run_cli("prune", tiny_folder, *asked, "-o", plain)
    assert "not compensated" in result.stdout
    assert not (plain / "compensation.json").exists()
    refitted, cut = (load_file(folder / "model.safetensors") for folder in (out, plain))
    assert {name: weight.shape for name, weight in refitted.items()} == {n: w.shape for n, w in cut.items()}
    projections = ("down_proj", "o_proj", "out_proj", "up_proj", "norm", "q_proj", "k_proj", "v_proj")
    changed = {name for name in cut if not refitted[name].equal(cut[name])}
    assert changed and all(any(part in name for part in projections) for name in changed)


def test_a_given_plan_says_which_units_stay(
    mended: tuple[Path, dict[str, Any]], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    plan = mended[0] / "plan.json"
    again = run_json("prune", tiny_folder, "--plan", plan, "--data", text_file, "-o", tmp_path / "again")
    assert again["compensation"]["layers_refitted"] > 0
    assert read_plan(tmp_path / "again" / "plan.json").kept_units == read_plan(plan).kept_units


def test_a_plan_without_text_is_cut_as_it_is_and_that_is_said(
    mended: tuple[Path, dict[str, Any]], tiny_folder: Path, tmp_path: Path
) -> None:
    result = run_cli("prune", tiny_folder, "--plan", mended[0] / "plan.json", "-o", tmp_path / "again")
    assert result.exit_code == 0
    assert "not compensated" in result.stdout


def test_the_tokens_of_scores_suffice(mended: tuple[Path, dict[str, Any]], tiny_folder: Path, tmp_path: Path) -> None:
    scores = mended[0] / "minipuzzle" / "scores.safetensors"
    facts = run_json("prune", tiny_folder, "--scores", scores, *SMALL, "-o", tmp_path / "again")
    assert facts["compensation"]["tokens"] == 2 * 16


def test_the_dry_run_says_tokens_work_and_memory(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ("prune", tiny_folder, "--data", text_file, *SMALL, "-o", tmp_path / "out", "--dry-run")
    facts, plain = run_json(*asked), run_json(*asked, "--no-compensate")
    new = {
        "compensation_tokens",
        "compensation_gflop",
        "compensation_minutes_on_one_h100",
        "memory_while_compensating_bytes",
    }
    assert facts.keys() - plain.keys() == new
    assert all(facts[name] > 0 for name in new - {"compensation_gflop"})


def test_the_best_candidates_are_chosen_by_what_they_are_like_once_mended(text_file: Path, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", pattern="M-M*-M-M-*-")
    asked = ("prune", model, "--data", text_file, *SMALL, "--min-ffn", 0.25, "--memory", "80%")
    candidates = run_json(*asked, "-o", tmp_path / "mended")["candidates"]
    assert len(candidates) > 3
    again, others = candidates[:3], candidates[3:]
    assert [item["kl"] for item in again] == sorted(item["kl"] for item in again)
    assert all("kl_not_compensated" in item for item in again)
    assert max(item["kl_not_compensated"] for item in again) <= min(item["kl"] for item in others)
    plain = run_json(*asked, "--rank-compensated", 0, "-o", tmp_path / "plain")["candidates"]
    assert [item["kl"] for item in plain[:3]] == sorted(item["kl_not_compensated"] for item in again)


def test_the_published_model_takes_hours_at_most_on_one_gpu_of_80_gb() -> None:
    """Nemotron-H-56B, from config.json: both streams, one layer twice and the next, and the sums of its widest."""
    source = FAMILIES["nemotron_h"].read(published_config())
    layer_bytes = largest_layer_bytes(source, torch.float32)
    streams_bytes = 2 * COMPENSATION_TOKENS * source.hidden * 4
    gpu = GPUS["h100"]
    assert gpu.memory_bytes is not None
    assert 3 * layer_bytes + streams_bytes + sums_bytes(source, COMPENSATION_TOKENS) < gpu.memory_bytes
    assert minutes_on(gpu, predict_flops(source, COMPENSATION_TOKENS)) < 120


def test_obs_without_a_refit_is_refused(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ("--data", text_file, *SMALL, "--criterion", "obs", "--no-compensate")
    result = run_cli("prune", tiny_folder, *asked, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "drop --criterion or --no-compensate" in result.stderr


def test_small_memory_takes_fewer_windows(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    token_ids = some_tokens(400)
    _, all_windows = windows_that_fit(tiny_checkpoint, token_ids, Compute())
    assert all_windows.equal(token_ids)
    limited = Compute(memory_bytes=900_000)
    stack, some = windows_that_fit(tiny_checkpoint, token_ids, limited)
    assert 2 <= len(some) < 400
    assert stack.weight_bytes + stack.reserved_bytes <= 900_000
    writer = CutWriter(checkpoint=tiny_checkpoint, token_ids=token_ids, compute=limited)
    assert writer.write(half_cut(tiny_checkpoint), tmp_path).num_tokens == some.numel()
