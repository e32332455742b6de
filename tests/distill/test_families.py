"""Guarantee: models whose blocks hold several layers, some missing, train split over processes as they do whole.

Two processes have the losses of one, with layers recomputed in the backward pass.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distill.engine import EngineSettings
from distill.scale.parallel import joined_placement
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import keep_everything
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from tests.support.distill_job import run
from tests.support.jobs import ROOT, STEPS, keep_only_step_10, losses, torchrun
from tests.support.tiny_models import write_family_checkpoint


def test_two_processes_train_a_llama_without_one_attention_as_one_does(tmp_path: Path) -> None:
    models = tmp_path / "models"
    teacher = Checkpoint.open(write_family_checkpoint(models / "teacher", "llama"))
    kept = tuple(idx for idx in range(len(teacher.architecture.layers)) if idx != 2)
    (models / "student").mkdir()
    write_pruned(teacher, replace(keep_everything(teacher.architecture), kept_layers=kept), models / "student")
    engine = EngineSettings(keep_last=2, activation_checkpointing=True)
    with joined_placement(Compute(), engine) as placement:
        run(models, tmp_path / "one", placement, engine, num_steps=STEPS)
    keep_only_step_10(tmp_path / "one", tmp_path / "one_two")
    folders = [tmp_path / "two", tmp_path / "one_two"]
    arguments = [str(part) for folder in folders for part in (models, folder, STEPS)]
    torchrun(2, str(ROOT / "tests/support/distill_job.py"), "{}", *arguments)
    alone = losses(tmp_path / "one")
    assert len(alone) == STEPS and alone[-1] < alone[0]
    assert losses(tmp_path / "two") == pytest.approx(alone, abs=1e-5)
    assert losses(tmp_path / "one_two") == pytest.approx(alone, abs=1e-5)
    reports = [json.loads((tmp_path / "two" / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(report["all_split"] for report in reports)
    assert Checkpoint.open(models / "student").config["model_type"] == "minipuzzle_per_layer"
