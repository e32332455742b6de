"""A run killed with SIGKILL at random moments, again and again, ends bit for bit like one that was left alone.

After every kill each state that has its name is whole: all its tensors can be read, and the run goes on from the last.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from distill.states.records import METRICS_FILE
from distill.states.stored import STATE_FOLDER, saved_steps, step_folder
from tests.support.distilling import SETTINGS, assert_same_tensors, metrics, run, saved_tensors
from tests.support.kills import start, stop_when

STEPS = 16
KILLS = 5


def run_to_the_end(models: Path, folder: Path) -> None:
    settings = replace(SETTINGS, tokens=STEPS * SETTINGS.tokens_per_step, save_every=1)
    student_model, _ = run(models, folder, settings)
    torch.save(student_model.state_dict(), folder / "weights.pt")


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_during(models: Path, folder: Path, delay_seconds: float) -> bool:
    """Start or continue a run and kill it some time after its first new step; whether it was still running."""
    lines_before = num_lines(folder / METRICS_FILE)
    process = start(run_to_the_end, models, folder)
    return stop_when(process, lambda: num_lines(folder / METRICS_FILE) > lines_before, delay_seconds=delay_seconds)


def test_five_kills_at_random_moments_change_nothing(models: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(run_to_the_end, models, whole)
    process.join()
    assert process.exitcode == 0
    dice = random.Random(0)
    num_kills, reached = 0, []
    while num_kills < KILLS:
        num_kills += kill_during(models, killed, delay_seconds=dice.uniform(0, 0.1))
        for step in saved_steps(killed / STATE_FOLDER):
            assert all(t.isfinite().all() for t in saved_tensors(step_folder(killed / STATE_FOLDER, step)).values())
            reached.append(step)
        assert not reached or reached[-1] < STEPS, "the run ended before it was killed five times"
    process = start(run_to_the_end, models, killed)
    process.join()
    assert process.exitcode == 0
    assert len(set(reached)) > 1, "no kill came after another state was saved"
    assert_same_tensors(*(torch.load(folder / "weights.pt", weights_only=True) for folder in (killed, whole)))
    assert metrics(killed) == metrics(whole)
