"""Distillation from checkpoint folders to a checkpoint folder: checks, loading, the loop, and writing the result."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distill.checkpointing import STATE_FOLDER, Progress
from distill.data import PackedWindows
from distill.engine import EngineSettings
from distill.estimate import RunEstimate, estimate_run
from distill.hardware import PeakMemory, hardware_of
from distill.loop import distill_pair
from distill.low_precision import float8_obstacle
from distill.pair import DistillPair
from distill.parallel import Placement, joined_placement, open_pair, rows_of_process
from distill.results import shared_output_folder, write_result
from distill.settings import DistillSettings, OnStep, ignore_step
from minipuzzle.checkpoint import Checkpoint, read_json
from minipuzzle.corpus import EvaluationWindows, evaluation_windows, read_documents
from minipuzzle.errors import MinipuzzleError
from minipuzzle.models import load_tokenizer
from minipuzzle.outputs import PROVENANCE_FILE, check_target_folder, fingerprint_files
from minipuzzle.processes import processes_from_environment

GIVE_TEACHER = "give the model it was cut from with --teacher"


@dataclass(frozen=True, kw_only=True)
class DistillRequest:
    """A student, the teacher it was cut from, the text, and what to do with them."""

    student: Checkpoint
    teacher: Checkpoint
    data: tuple[Path, ...]
    settings: DistillSettings
    out: Path
    engine: EngineSettings = field(default_factory=EngineSettings)
    validation: tuple[Path, ...] = ()
    device: str = "cpu"
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A request that passed every check that needs no weights, with its text in tokens.

    ``notes``: what was asked for and will not be done, and why.
    """

    request: DistillRequest
    train_windows: PackedWindows
    validation_windows: EvaluationWindows | None
    estimate: RunEstimate
    notes: tuple[str, ...] = ()

    @property
    def epochs(self) -> float:
        """How often the training text is seen."""
        settings = self.request.settings
        return self.train_windows.epochs(settings.total_steps * settings.tokens_per_step)


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What a finished run did. Validation KL: nats per token at temperature 1; None without validation text.

    ``peak_memory_bytes``: of this process, beyond what it held before. ``estimate``: what was expected.
    """

    out: Path
    steps: int
    tokens: int
    epochs: float
    skipped_steps: int
    train_seconds: float
    validation_kl_before: float | None
    validation_kl_after: float | None
    peak_memory_bytes: int
    estimate: RunEstimate

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all processes, evaluations not counted."""
        return self.tokens / max(self.train_seconds, 1e-9)

    @property
    def remaining_kl_fraction(self) -> float | None:
        """Share of the validation KL that is left; None without validation text."""
        if self.validation_kl_before is None or self.validation_kl_after is None:
            return None
        return self.validation_kl_after / max(self.validation_kl_before, 1e-30)


def find_teacher(student_folder: Path) -> Path:
    """The teacher's folder that a cut checkpoint remembers in its minipuzzle.json.

    Raises: MinipuzzleError if it remembers none, or that folder is gone or holds another model.
    """
    path = student_folder / PROVENANCE_FILE
    record = read_json(path) if path.is_file() else {}
    if not isinstance(record.get("teacher"), str):
        raise MinipuzzleError(f"{student_folder} does not say what its teacher is", GIVE_TEACHER)
    folder = Path(record["teacher"])
    if not folder.is_dir():
        raise MinipuzzleError(f"the teacher of {student_folder} is no longer at {folder}", GIVE_TEACHER)
    if Checkpoint.open(folder).fingerprint != record.get("teacher_fingerprint"):
        raise MinipuzzleError(f"{folder} is no longer the model that {student_folder} was cut from", GIVE_TEACHER)
    return folder


def prepare_run(request: DistillRequest) -> PreparedRun:
    """Check everything that can be checked without weights, and tokenise the text.

    Raises: MinipuzzleError naming what does not fit.
    """
    request, notes = _without_unavailable(request)
    settings = request.settings
    if processes_from_environment().is_first:
        check_target_folder(request.out, overwrite=request.overwrite)
    for checkpoint in (request.student, request.teacher):
        checkpoint.require_plain_weights()
    if request.student.architecture.model_type != request.teacher.architecture.model_type:
        raise MinipuzzleError("student and teacher are of different families", GIVE_TEACHER)
    tokenizer = _shared_tokenizer(request.student, request.teacher)
    train_windows = PackedWindows.from_texts(
        tokenizer, read_documents(request.data, tokenizer), sequence_length=settings.sequence_length, seed=settings.seed
    )
    validation_windows = None
    if request.validation:
        texts = read_documents(request.validation, tokenizer)
        validation_windows = evaluation_windows(tokenizer, texts, sequence_length=settings.sequence_length)
    return PreparedRun(
        request=request,
        train_windows=train_windows,
        validation_windows=validation_windows,
        estimate=estimate_run(
            request.student.architecture,
            request.teacher.architecture,
            settings,
            request.engine,
            hardware=hardware_of(torch.device(request.device), getattr(torch, settings.dtype)),
            num_processes=processes_from_environment().world_size,
        ),
        notes=notes,
    )


def _without_unavailable(request: DistillRequest) -> tuple[DistillRequest, tuple[str, ...]]:
    """A request without FP8 compute where that cannot be had, and the reason in words."""
    obstacle = float8_obstacle(torch.device(request.device)) if request.engine.fp8 else None
    if obstacle is None:
        return request, ()
    engine = replace(request.engine, fp8=False)
    return replace(request, engine=engine), (f"--fp8 is ignored: {obstacle}",)


def run_prepared(prepared: PreparedRun, *, on_step: OnStep = ignore_step) -> DistillResult:
    """Distil and write the output folder; an interrupted run of the same request is continued.

    Under torchrun all processes of the job call this together; the first alone writes folders and calls ``on_step``.

    Raises: InputChangedError if an interrupted run in the way had other inputs or settings.
    """
    request = prepared.request
    with joined_placement(request.device, request.engine) as placement:
        processes = placement.processes
        rows_of_process(request.settings.batch_sequences, processes)
        with shared_output_folder(
            request.out, provenance_of(request), processes, overwrite=request.overwrite
        ) as folder:
            memory = PeakMemory(placement.device)
            pair, progress = _train(prepared, placement, folder, on_step)
            peak_memory_bytes = memory.extra_bytes()
            write_result(pair, request.student, folder, processes)
            # Last, because until now a run that is killed can still continue from it.
            if processes.is_first:
                shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
    return DistillResult(
        out=request.out,
        steps=progress.step,
        tokens=progress.step * request.settings.tokens_per_step,
        epochs=prepared.epochs,
        skipped_steps=progress.skipped_steps,
        train_seconds=progress.train_seconds,
        validation_kl_before=progress.validation_kl_before,
        validation_kl_after=progress.validation_kl_after,
        peak_memory_bytes=peak_memory_bytes,
        estimate=prepared.estimate,
    )


def distill_checkpoint(
    *,
    student: Checkpoint,
    teacher: Checkpoint,
    data: Sequence[Path],
    settings: DistillSettings,
    out: Path,
    validation: Sequence[Path] = (),
    device: str = "cpu",
    overwrite: bool = False,
    engine: EngineSettings | None = None,
    on_step: OnStep = ignore_step,
) -> DistillResult:
    """Check, distil and write ``out``: what ``minipuzzle distill`` does, for callers in Python.

    Raises: MinipuzzleError for inputs that do not fit together, InputChangedError as in ``run_prepared``.
    """
    request = DistillRequest(
        student=student,
        teacher=teacher,
        data=tuple(data),
        settings=settings,
        out=out,
        engine=engine or EngineSettings(),
        validation=tuple(validation),
        device=device,
        overwrite=overwrite,
    )
    return run_prepared(prepare_run(request), on_step=on_step)


def provenance_of(request: DistillRequest) -> dict[str, Any]:
    """What the output remembers, and what an interrupted run must share with its continuation."""
    return {
        "command": "distill",
        "student": str(request.student.folder.resolve()),
        "student_fingerprint": request.student.fingerprint,
        "teacher": str(request.teacher.folder.resolve()),
        "teacher_fingerprint": request.teacher.fingerprint,
        "data_fingerprint": fingerprint_files(list(request.data)),
        "validation_fingerprint": fingerprint_files(list(request.validation)) if request.validation else None,
        "settings": request.settings.shaping(),
        **request.engine.shaping(),
    }


def _train(prepared: PreparedRun, placement: Placement, folder: Path, on_step: OnStep) -> tuple[DistillPair, Progress]:
    request = prepared.request
    pair = open_pair(
        student=request.student,
        teacher=request.teacher,
        placement=placement,
        compute_dtype=getattr(torch, request.settings.dtype),
        engine=request.engine,
    )
    progress = distill_pair(
        pair=pair,
        data=prepared.train_windows,
        settings=request.settings,
        folder=folder,
        validation=prepared.validation_windows,
        engine=request.engine,
        processes=placement.processes,
        on_step=on_step,
    )
    return pair, progress


def _shared_tokenizer(student: Checkpoint, teacher: Checkpoint) -> Any:
    """The one tokenizer of both models; logits of different vocabularies cannot be compared."""
    sizes = student.architecture.vocabulary, teacher.architecture.vocabulary
    if sizes[0] != sizes[1]:
        raise MinipuzzleError(
            f"the student's vocabulary has {sizes[0]:,} entries, the teacher's {sizes[1]:,}", GIVE_TEACHER
        )
    tokenizer, other = load_tokenizer(student.folder), load_tokenizer(teacher.folder)
    if tokenizer.get_vocab() != other.get_vocab():
        raise MinipuzzleError("the tokenizers of student and teacher give tokens different numbers", GIVE_TEACHER)
    return tokenizer
