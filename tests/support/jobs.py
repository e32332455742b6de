"""Jobs of several processes, and what distillation runs leave in their folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from distill.states.records import METRICS_FILE
from distill.states.stored import STATE_FOLDER

ROOT = Path(__file__).parents[2]
STEPS = 20


def launcher(num_processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(num_processes: int, *arguments: str) -> None:
    subprocess.run([*launcher(num_processes), *arguments], check=True, timeout=900, env=environment())


def losses(folder: Path) -> list[float]:
    lines = (folder / METRICS_FILE).read_text().splitlines(keepends=True)
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def keep_only_step_10(folder: Path, target: Path) -> None:
    shutil.copytree(folder, target)
    shutil.rmtree(target / STATE_FOLDER / "step-00000020")
