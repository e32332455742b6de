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

from torch.distributed.tensor import DTensor

from distill.engine import EngineSettings
from distill.scale.parallel import Placement, joined_placement, open_pair, whole
from distill.settings import DistillSettings
from distill.states.results import write_result
from distill.training.loop import distill_pair
from minipuzzle.runtime.compute import Compute
from tests.support.distilling import SETTINGS, held_out, windows
from tests.support.watched import watched


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
) -> dict[str, Any]:
    """Distil; report what this process read and holds, and write the student from the first process."""
    student, teacher = (watched(models / name) for name in ("student", "teacher"))
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
        "read": sum(read.num_elements for checkpoint in (student, teacher) for read in checkpoint.reads),
        "all_split": all(isinstance(parameter, DTensor) for parameter in pair.student.parameters()),
        "step": progress.step,
        "teacher_gradients": gradients,
        "weight_sums": {n: float(whole(p.detach()).sum()) for n, p in pair.student.model.named_parameters()},
    }


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
