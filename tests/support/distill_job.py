"""A distillation job of several processes, started by torchrun from tests; each process reports what it held and did.

Usage: torchrun ... distill_job.py OPTIONS-AS-JSON MODELS FOLDER STEPS [MODELS FOLDER STEPS ...]
Each folder gets a run, or the rest of a run whose state already lies there, of the student and teacher in MODELS.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from distill.engine import EngineSettings
from distill.scale.parallel import Placement, joined_placement, open_pair, whole
from distill.settings import DistillSettings
from distill.states.results import write_result
from distill.training.loop import distill_pair
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from tests.support.distilling import SETTINGS, held_out, windows


def settings_of(num_steps: int, dtype: str) -> DistillSettings:
    tokens = num_steps * SETTINGS.tokens_per_step
    return replace(SETTINGS, tokens=tokens, micro_batch_sequences=1, save_every=10, dtype=dtype)


def run(
    models: Path,
    folder: Path,
    placement: Placement,
    engine: EngineSettings,
    *,
    num_steps: int,
    count: bool = True,
) -> dict[str, Any]:
    """Distil; report what this process read and holds, and write the student from the first process."""
    student, teacher = (Checkpoint.open(models / name) for name in ("student", "teacher"))
    rows_read = count_rows(student, teacher) if count else []
    pair = open_pair(
        student=student,
        teacher=teacher,
        placement=placement,
        engine=engine,
    )
    held = {
        part: sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in module.parameters())
        for part, module in (("student", pair.student), ("teacher", pair.teacher))
    }
    folder.mkdir(exist_ok=True)
    settings = settings_of(num_steps, placement.compute.dtype)
    progress = distill_pair(
        pair=pair,
        data=windows(),
        settings=settings,
        folder=folder,
        validation=held_out(),
        engine=engine,
    )
    write_result(pair, student, folder, placement.processes)
    gradients = [name for name, parameter in pair.teacher.named_parameters() if parameter.grad is not None]
    return {
        "held": held,
        "read": sum(rows_read),
        "all_split": all(isinstance(parameter, DTensor) for parameter in pair.student.parameters()),
        "step": progress.step,
        "teacher_gradients": gradients,
        "weight_sums": {n: float(whole(p.detach()).sum()) for n, p in pair.student.model.named_parameters()},
    }


def count_rows(*checkpoints: Checkpoint) -> list[int]:
    """Elements that are read from now on, one entry a read; reading a whole tensor is an error."""
    read: list[int] = []

    def counted(checkpoint: Checkpoint) -> None:
        rows = checkpoint.rows

        def count(name: str, start: int, stop: int | None) -> torch.Tensor:
            tensor = rows(name, start, stop)
            read.append(tensor.numel())
            return tensor

        checkpoint.__dict__["rows"] = count
        checkpoint.__dict__["tensor"] = None

    for checkpoint in checkpoints:
        counted(checkpoint)
    return read


def main() -> None:
    options = json.loads(sys.argv[1])
    dtype = options.pop("dtype", "float32")
    engine = EngineSettings(**{"keep_last": 2, "activation_checkpointing": True, **options})
    arguments = sys.argv[2:]
    with joined_placement(Compute(dtype=dtype), engine) as placement:
        for models, folder, steps in zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True):
            report = run(Path(models), Path(folder), placement, engine, num_steps=int(steps))
            (Path(folder) / f"report-{placement.processes.rank}.json").write_text(json.dumps(report))
        placement.processes.wait()


if __name__ == "__main__":
    main()
