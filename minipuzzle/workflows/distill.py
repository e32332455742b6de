"""Recovering a cut model as a whole: student, teacher and text in, a trained checkpoint out; and what that takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from distill.run import DistillRequest, DistillResult, OnResult, PreparedRun, find_teacher, prepare_run, run_prepared
from distill.scale.estimate import RunEstimate, estimate_run, flops_per_token
from distill.scale.gpus import GPUS
from distill.scale.hardware import hardware_of
from distill.settings import OnNote, OnStep, StepRecord, ignore_note
from distill.states.records import is_tensorboard_log, tensorboard_log
from minipuzzle.architecture.families import read_architecture
from minipuzzle.architecture.memory import memory_breakdown
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.budget import read_serving_budget
from minipuzzle.cut.plan import read_plan
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint, read_config
from minipuzzle.files.json_files import read_json
from minipuzzle.files.outputs import check_target_folder
from minipuzzle.files.records import complete_record
from minipuzzle.quality.vocabulary import in_vocabulary_of
from minipuzzle.show.distill import text_notes
from minipuzzle.show.page.facts import deployment_of, model_facts, thinned_curve
from minipuzzle.show.page.page import write_page
from minipuzzle.workflows.settings import DistillOptions, paths_of
from minipuzzle.workflows.verbs import Model, open_plain, verb


def prepare_distill(student: Model, options: DistillOptions) -> PreparedRun:
    """Check everything that can be checked without weights, and tokenise the text.

    Raises: MinipuzzleError naming what does not fit.
    """
    checkpoint = open_plain(student)
    teacher = find_teacher(checkpoint.folder) if options.teacher is None else options.teacher
    if options.tensorboard is not None:
        check_target_folder(options.tensorboard, overwrite=True, is_ours=is_tensorboard_log)
    if not options.over_budget:
        _require_budget(checkpoint, options)
    settings = replace(options.training, dtype=options.compute.dtype)
    request = DistillRequest(
        student=checkpoint,
        teacher=in_vocabulary_of(checkpoint, open_plain(teacher)),
        out=Path(options.out),
        data=paths_of(options.data),
        validation=paths_of(options.validation),
        teacher_cache=options.teacher_cache,
        settings=settings,
        engine=options.engine,
        overwrite=options.overwrite,
    )
    return prepare_run(request, options.compute)


def _require_budget(student: Checkpoint, options: DistillOptions) -> None:
    made_for = read_serving_budget(student.folder)
    if made_for is None:
        return
    weights = made_for.deployment.weights if options.engine.qat == "none" else options.engine.qat
    served = memory_breakdown(student.architecture, replace(made_for.deployment, weights=weights))
    what = f"{student.folder} with {weights} weights"
    made_for.require(served.total_bytes, what, "train what `minipuzzle prune` wrote, for the format it was cut for")


def finish_distill(
    prepared: PreparedRun, tensorboard: Path | None, on_step: OnStep, on_note: OnNote = ignore_note
) -> DistillResult:
    """Train and write; ``on_step`` hears of each step, as TensorBoard does where a folder is given for it.

    Raises: InputChangedError if an interrupted run in the way had other inputs or settings.
    """
    with tensorboard_log(tensorboard if prepared.compute.processes.is_first else None) as log:

        def both(record: StepRecord) -> None:
            log(record)
            on_step(record)

        return run_prepared(prepared, on_step=both, on_note=on_note, on_result=_keeper(prepared))


def _keeper(prepared: PreparedRun) -> OnResult:
    """What writes down what came out of a run, and its page."""

    def keep(folder: Path, result: DistillResult) -> None:
        student = prepared.request.student
        figures = {name: value for name, value in result.to_json().items() if name not in ("out", "estimate")}
        results = {
            **{
                name: None if isinstance(value, float) and not isfinite(value) else value
                for name, value in figures.items()
            },
            "model": model_facts(student.architecture.deployed, deployment_of(student.folder)),
            "curve": thinned_curve(folder),
        }
        complete_record(folder, results, before=(student.folder,), device=prepared.compute.device)
        write_page(folder)

    return keep


def run_distill(student: Model, options: DistillOptions) -> DistillResult:
    """Train a cut model on the next-token distributions of its teacher, and write it; an interrupted run continues.

    Raises: MinipuzzleError for inputs that do not fit together; InputChangedError for another interrupted run.
    """
    prepared = prepare_distill(student, options)
    with options.compute.progress("distilling", prepared.request.settings.total_steps) as advance:
        return finish_distill(prepared, options.tensorboard, lambda _record: advance(1))


distill = verb(DistillOptions, run_distill)


def planned_distill(prepared: PreparedRun) -> dict[str, Any]:
    """What a run will do and take, by name."""
    settings, windows, validation = prepared.request.settings, prepared.text.windows, prepared.validation_windows
    return {
        "teacher": str(prepared.request.teacher.folder),
        "steps": settings.total_steps,
        "tokens": settings.total_steps * settings.tokens_per_step,
        "tokens_per_step": settings.tokens_per_step,
        "data_tokens": windows.num_tokens,
        "epochs": prepared.epochs,
        "validation_tokens": 0 if validation is None else validation.num_predictions,
        "predicted_fraction": windows.predicted_fraction,
        "teacher_cache_bytes": prepared.cache_bytes,
        **asdict(prepared.estimate.memory),
        "memory_bytes": prepared.estimate.memory.total_bytes,
        "tokens_per_second": round(prepared.estimate.tokens_per_second),
        "hours": prepared.estimate.hours,
        "plan": [asdict(share) for share in windows.plan],
        "notes": text_notes(prepared),
        "settings": asdict(settings),
    }


@dataclass(frozen=True, kw_only=True)
class DistillEstimates:
    """What runs on some numbers of processes are expected to need; ``facts`` hold for all of them."""

    facts: dict[str, float]
    runs: tuple[RunEstimate, ...]

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        rows = [{**asdict(row), "memory_bytes": row.memory.total_bytes} for row in self.runs]
        return {"estimate": True, **self.facts, "runs": rows}


def estimate_distill(student: Path, options: DistillOptions, gpus: str | None, gpu: str) -> DistillEstimates:
    """What a run would need, from config.json files alone, on some numbers of GPUs of a kind or on this machine.

    Raises: MinipuzzleError for files that cannot be read or numbers that are none.
    """
    of_teacher = _read(Path(str(options.teacher or find_teacher(student))))
    of_student = _read_student(student, of_teacher)
    settings = replace(options.training, dtype=options.compute.dtype)
    hardware = GPUS[gpu] if gpus else hardware_of(options.compute)
    runs = tuple(
        estimate_run(of_student, of_teacher, settings, options.engine, hardware=hardware, num_processes=number)
        for number in (_numbers(gpus) if gpus else (1,))
    )
    facts = {
        "student_parameters": of_student.num_parameters,
        "teacher_parameters": of_teacher.num_parameters,
        "tokens": settings.total_steps * settings.tokens_per_step,
        "flops_per_token": flops_per_token(of_student, of_teacher, settings, options.engine),
        "expected_fraction_of_peak": hardware.expected_fraction,
    }
    return DistillEstimates(facts=facts, runs=runs)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise MinipuzzleError(f"‹gpus› is {text!r}", "give whole numbers such as 8 or 8,64,512")
    return tuple(int(part) for part in parts)


def _read(path: Path) -> Architecture:
    return read_architecture(read_config(path))


def _read_student(path: Path, teacher: Architecture) -> Architecture:
    if path.is_dir() or "kept_layers" not in read_json(path):
        return _read(path)
    plan = read_plan(path)
    plan.check_against(teacher)
    return plan.apply(teacher)
