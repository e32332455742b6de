"""Several processes learn what one learns: same losses and weights from models that are really split between them.

A state saved by one number of processes is continued by another, and no process reads or holds more than its part.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.engine import EngineSettings
from distill.scale.parallel import joined_placement, rows_of_process
from distill.states.records import METRICS_FILE
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.processes import Processes
from tests.support.distill_job import run
from tests.support.jobs import ROOT, STEPS, environment, keep_only_step_10, launcher, losses, torchrun
from tests.support.tiny_models import write_family_checkpoint

FEW_STEPS = 5
OTHER_FAMILIES = {"llama": {"num_hidden_layers": 2}, "nemotron_h-moe": {}}
Job = dict[str, Any]


def family_of(pid: int) -> list[int]:
    """A process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family_of(int(child)))]


def run_alone(models: Path, folder: Path, num_steps: int = STEPS) -> Job:
    engine = EngineSettings(keep_last=2)
    with joined_placement(Compute(), engine) as placement:
        assert placement.mesh is None
        return run(models, folder, placement, engine, num_steps=num_steps)


@pytest.fixture(scope="module")
def jobs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one``: a run of one process. ``two``: of two. ``one_two``: begun by one and continued by two processes.

    ``llama_one`` and ``llama_two``: the same with a family whose blocks are two layers, and whose head is tied;
    ``nemotron_h-moe_...``: with experts, of which each process sends its tokens to others.
    """
    root = tmp_path_factory.mktemp("jobs")
    run_alone(models, root / "one")
    keep_only_step_10(root / "one", root / "one_two")
    runs = [(models, "two", STEPS), (models, "one_two", STEPS)]
    for name, changes in OTHER_FAMILIES.items():
        for seed, part in enumerate(("teacher", "student")):
            write_family_checkpoint(root / name / part, name, seed=seed, **changes)
        run_alone(root / name, root / f"{name}_one", FEW_STEPS)
        runs.append((root / name, f"{name}_two", FEW_STEPS))
    arguments = [str(part) for folders, name, steps in runs for part in (folders, root / name, steps)]
    torchrun(2, str(ROOT / "tests/support/distill_job.py"), "{}", *arguments)
    return root


def reports(jobs: Path) -> list[Job]:
    return [json.loads((jobs / "two" / f"report-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_have_the_losses_of_one_over_20_steps(jobs: Path) -> None:
    alone, together = losses(jobs / "one"), losses(jobs / "two")
    assert len(alone) == 20 and alone[-1] < 0.9 * alone[0]
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_other_kinds_of_layers_are_split_alike(jobs: Path, name: str) -> None:
    alone, together = losses(jobs / f"{name}_one"), losses(jobs / f"{name}_two")
    assert len(alone) == FEW_STEPS and alone[-1] < alone[0]
    assert together == pytest.approx(alone, abs=1e-5)
    weights = [load_file(jobs / f"{name}_{number}" / "model.safetensors") for number in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for weight, other in zip(weights[0].values(), weights[1].values(), strict=True):
        torch.testing.assert_close(other, weight, rtol=1e-2, atol=1e-4)


def test_both_processes_end_with_the_weights_of_one(jobs: Path) -> None:
    alone, together = (load_file(jobs / name / "model.safetensors") for name in ("one", "two"))
    assert alone.keys() == together.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-3, atol=1e-5)
    first, second = reports(jobs)
    assert first["weight_sums"] == second["weight_sums"]


def test_models_are_really_split_and_each_process_reads_its_part_alone(jobs: Path, models: Path) -> None:
    sizes = {part: Checkpoint.open(models / part).architecture.num_parameters for part in ("student", "teacher")}
    both = reports(jobs)
    for part, size in sizes.items():
        held = [report["held"][part] for report in both]
        assert sum(held) == size
        assert max(held) < 0.52 * size
    assert all(report["all_split"] for report in both)
    assert [report["read"] for report in both] == [sum(report["held"].values()) for report in both]
    assert [report["teacher_gradients"] for report in both] == [[], []]


def test_a_run_of_one_process_is_continued_by_two(jobs: Path) -> None:
    assert len(losses(jobs / "one_two")) == 20
    assert losses(jobs / "one_two") == pytest.approx(losses(jobs / "one"), abs=1e-5)
    assert losses(jobs / "one_two")[:10] == losses(jobs / "one")[:10]


def test_a_run_of_two_processes_is_continued_by_one(jobs: Path, models: Path, tmp_path: Path) -> None:
    keep_only_step_10(jobs / "two", tmp_path / "two_one")
    run_alone(models, tmp_path / "two_one")
    assert losses(tmp_path / "two_one") == pytest.approx(losses(jobs / "two"), abs=1e-5)
    assert losses(tmp_path / "two_one")[:10] == losses(jobs / "two")[:10]


def test_one_process_with_an_offloaded_teacher_splits_among_itself_alone(
    jobs: Path,
    models: Path,
    tmp_path: Path,
) -> None:
    """The way a single GPU goes: the same hooks and gathers as with many, over a mesh of one."""
    engine = EngineSettings(teacher_offload="cpu", activation_checkpointing=True, keep_last=2)
    with joined_placement(Compute(), engine) as placement:
        assert placement.mesh is not None
        report = run(models, tmp_path / "run", placement, engine, num_steps=FEW_STEPS)
    assert report["all_split"]
    assert not torch.distributed.is_initialized()
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(jobs / "one")[0], abs=1e-6)
    assert len(losses(tmp_path / "run")) == FEW_STEPS


@pytest.mark.slow
def test_bfloat16_in_two_processes_stays_near_float32(jobs: Path, models: Path, tmp_path: Path) -> None:
    options = json.dumps({"dtype": "bfloat16"})
    torchrun(2, str(ROOT / "tests/support/distill_job.py"), options, str(models), str(tmp_path / "run"), str(STEPS))
    assert losses(tmp_path / "run") == pytest.approx(losses(jobs / "one"), rel=0.05)
    assert losses(tmp_path / "run") != losses(jobs / "two")


@pytest.mark.slow
def test_compiled_layers_learn_the_same(models: Path, tmp_path: Path) -> None:
    found = []
    for name, engine in (("plain", EngineSettings()), ("compiled", EngineSettings(compile_layers=True))):
        with joined_placement(Compute(), engine) as placement:
            run(models, tmp_path / name, placement, engine, num_steps=FEW_STEPS)
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.slow
def test_two_processes_killed_at_any_moment_continue_bit_for_bit(jobs: Path, models: Path, tmp_path: Path) -> None:
    folder, dice = tmp_path / "killed", random.Random(0)
    arguments = ("{}", str(models), str(folder), str(STEPS))
    for num_lines in (4, 12, 17):  # before any state, and after the first
        job = subprocess.Popen(
            [*launcher(2), str(ROOT / "tests/support/distill_job.py"), *arguments], env=environment()
        )
        while job.poll() is None and (not (folder / METRICS_FILE).exists() or len(losses(folder)) < num_lines):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.2))
        assert job.poll() is None, "the job ended before it was killed"
        for pid in family_of(job.pid):
            os.kill(pid, signal.SIGKILL)
        job.wait()
        assert not (folder / "model.safetensors").exists()
    torchrun(2, str(ROOT / "tests/support/distill_job.py"), *arguments)
    assert losses(folder) == losses(jobs / "two")
    killed, whole_run = (load_file(path / "model.safetensors") for path in (folder, jobs / "two"))
    assert killed.keys() == whole_run.keys()
    assert all(torch.equal(killed[name], whole_run[name]) for name in killed)


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    shares = [rows_of_process(6, Processes(rank=rank, world_size=3)) for rank in range(3)]
    assert shares == [(0, 2), (2, 2), (4, 2)]
    for batch in (2, 7):
        with pytest.raises(MinipuzzleError, match="cannot be divided equally among 3"):
            rows_of_process(batch, Processes(world_size=3))
