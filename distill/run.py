"""Distillation from checkpoint folders to a checkpoint folder: checks, loading, the loop, and writing the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.engine import EngineSettings
from distill.inputs import GIVE_TEACHER, kept_hidden_channels
from distill.objective.pair import DistillPair
from distill.objective.teacher_cache import CacheDescription, TeacherCache, is_cache
from distill.scale.estimate import RunEstimate, estimate_run, flops_per_token
from distill.scale.gpus import Hardware
from distill.scale.hardware import PeakMemory, hardware_of
from distill.scale.low_precision import float8_obstacle
from distill.scale.parallel import Placement, joined_placement, open_pair, rows_of_process, whole
from distill.settings import LARGEST_KL, DistillSettings, OnNote, OnStep, ignore_note, ignore_step
from distill.states.records import draw_learning_curve, risen_loss
from distill.states.results import shared_output_folder, write_result
from distill.states.stored import STATE_FOLDER, Progress
from distill.training.data import TrainingText, blend_of, read_training_text
from distill.training.loop import distill_pair
from minipuzzle.cut.budget import inherited
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import EvaluationWindows, evaluation_windows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.hub import is_hub_id
from minipuzzle.files.json_files import read_json
from minipuzzle.files.outputs import PROVENANCE_FILE, check_target_folder, fingerprint_files
from minipuzzle.files.records import place_of, write_places
from minipuzzle.quality.vocabulary import SharedVocabulary, shared_vocabulary
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.processes import Processes, processes_from_environment

_WORSE_FACTOR, _WORSE_NATS = 1.05, 1e-3  # of the KL before; less is chance


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
    teacher_cache: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.teacher_cache is not None and not self.settings.top_k:
            raise MinipuzzleError("a teacher cache keeps the likeliest tokens only", "say how many with ‹top_k›")

    def cache_description(self, vocabulary_rows: int) -> CacheDescription:
        """Whose targets a teacher cache holds for this run."""
        return CacheDescription(
            teacher_fingerprint=self.teacher.fingerprint,
            vocabulary=vocabulary_rows,
            top_k=min(self.settings.top_k, vocabulary_rows),
            temperature=self.settings.temperature,
            sequence_length=self.settings.sequence_length,
            dtype=self.settings.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A request that passed every check that needs no weights, with its text in tokens.

    ``compute``: in the precision of the settings, which shapes the result. ``notes``: what was asked for and will not
    be done, and why.
    """

    request: DistillRequest
    compute: Compute
    text: TrainingText
    validation_windows: EvaluationWindows | None
    vocabulary: SharedVocabulary
    kept_channels: tuple[int, ...] | None
    hardware: Hardware
    notes: tuple[str, ...] = ()

    @cached_property
    def estimate(self) -> RunEstimate:
        """Memory, speed and hours to expect."""
        return estimate_run(
            self.request.student.architecture,
            self.request.teacher.architecture,
            self.request.settings,
            self.request.engine,
            hardware=self.hardware,
            num_processes=self.compute.processes.world_size,
        )

    def used_fraction(self, tokens_per_second: float) -> float:
        """The share of the hardware's best rate that so many tokens take, counted as ``flops_per_token`` counts."""
        flops_per_second = self.hardware.bf16_flops * self.compute.processes.world_size
        return tokens_per_second * self._flops_per_token / flops_per_second

    @cached_property
    def _flops_per_token(self) -> float:
        request = self.request
        architectures = request.student.architecture, request.teacher.architecture
        return flops_per_token(*architectures, request.settings, request.engine)

    @property
    def epochs(self) -> float:
        """How often the training text is seen on average."""
        windows = self.text.windows
        return windows.total_windows / sum(source.windows_per_epoch for source in windows.sources.values())

    @property
    def cache_bytes(self) -> int:
        """What a teacher cache will take on disk once all of the run's windows are in it; 0 without one."""
        if self.request.teacher_cache is None:
            return 0
        windows = self.text.windows
        num_met = sum(
            min(source.windows_per_epoch, round(windows.epochs_of(name) * source.windows_per_epoch))
            for name, source in windows.sources.items()
        )
        return num_met * self.request.cache_description(self.vocabulary.rows).window_bytes


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What a finished run did. Validation figures: nats per token at temperature 1; None without validation text.

    ``best_step``: the step whose weights were written, the one with the lowest validation KL where some were evaluated.
    ``problem``: why the student is worse than before, in words; None if it is not.
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
    validation_loss_before: float | None
    validation_loss_after: float | None
    best_step: int
    peak_memory_bytes: int
    estimate: RunEstimate
    problem: str | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """What was written."""
        return Checkpoint.open(self.out)

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {**asdict(self), "out": str(self.out), "remaining_kl_fraction": self.remaining_kl_fraction}

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


OnResult = Callable[[Path, DistillResult], None]


def ignore_result(_folder: Path, _result: DistillResult) -> None:
    """Nobody keeps what came out beside the weights."""


def find_teacher(student_folder: Path) -> Path:
    """The teacher's folder that a cut checkpoint remembers in its minipuzzle.json.

    Raises: MinipuzzleError if it remembers none, or that folder is gone or holds another model.
    """
    path = student_folder / PROVENANCE_FILE
    record = read_json(path) if path.is_file() else {}
    folder = place_of(student_folder, "teacher")
    if folder is None:
        raise MinipuzzleError(f"{student_folder} does not say what its teacher is", GIVE_TEACHER)
    if not folder.is_dir() and not is_hub_id(folder):
        raise MinipuzzleError(f"the teacher of {student_folder} is no longer at {folder}", GIVE_TEACHER)
    if Checkpoint.open(folder).fingerprint != record.get("teacher_fingerprint"):
        raise MinipuzzleError(f"{folder} is no longer the model that {student_folder} was cut from", GIVE_TEACHER)
    return folder


def prepare_run(request: DistillRequest, compute: Compute = Compute()) -> PreparedRun:
    """Check everything that can be checked without weights, and tokenise the text.

    Raises: MinipuzzleError naming what does not fit.
    """
    compute = replace(compute, dtype=request.settings.dtype, processes=processes_from_environment())
    request, notes = _without_unavailable(request, compute)
    settings = request.settings
    if compute.processes.is_first:
        _check_targets(request)
    for checkpoint in (request.student, request.teacher):
        checkpoint.require_plain_weights()
    if request.student.architecture.model_type != request.teacher.architecture.model_type:
        raise MinipuzzleError("student and teacher are of different families", GIVE_TEACHER)
    vocabulary = shared_vocabulary(request.student, request.teacher, GIVE_TEACHER)
    kept_channels = kept_hidden_channels(request.student, request.teacher, settings)
    blend = blend_of(request.data, settings.held_out)
    text = read_training_text(vocabulary.tokenizer, blend, settings)
    held_out = read_documents(request.validation, vocabulary.tokenizer) + text.held_out
    validation_windows = None
    if held_out:
        validation_windows = evaluation_windows(
            vocabulary.tokenizer, held_out, sequence_length=settings.sequence_length
        )
    prepared = PreparedRun(
        request=request,
        compute=compute,
        text=text,
        validation_windows=validation_windows,
        vocabulary=vocabulary,
        kept_channels=kept_channels,
        hardware=hardware_of(compute),
        notes=notes,
    )
    prepared.estimate.memory.require_room(compute, "lower ‹micro_batch_sequences› or ‹sequence_length›")
    return prepared


def _check_targets(request: DistillRequest) -> None:
    folders = (request.student.folder, request.teacher.folder)
    inputs = (*folders, *read_files(request.data), *request.validation)
    check_target_folder(request.out, overwrite=request.overwrite, inputs=inputs)
    if request.teacher_cache is not None:
        check_target_folder(request.teacher_cache, overwrite=True, is_ours=is_cache, inputs=inputs)


def _without_unavailable(request: DistillRequest, compute: Compute) -> tuple[DistillRequest, tuple[str, ...]]:
    """A request without FP8 compute or offloading where they cannot be had, and the reasons in words."""
    engine, notes, device = request.engine, list[str](), compute.own_device
    if engine.fp8 and (obstacle := float8_obstacle(device)) is not None:
        engine = replace(engine, fp8=False)
        notes.append(f"--fp8 is ignored: {obstacle}")
    if engine.teacher_offload != "none" and device.backend is None:
        engine = replace(engine, teacher_offload="none")
        notes.append(f"--teacher-offload is ignored: torch.distributed has no backend for {device.kind}")
    return replace(request, engine=engine), tuple(notes)


def run_prepared(
    prepared: PreparedRun,
    *,
    on_step: OnStep = ignore_step,
    on_note: OnNote = ignore_note,
    on_result: OnResult = ignore_result,
) -> DistillResult:
    """Distil and write the output folder; an interrupted run of the same request is continued.

    Under torchrun all processes of the job call this together; the first alone writes folders and calls ``on_step``,
    and ``on_result`` with the folder before it gets its name.

    Raises: InputChangedError if an interrupted run in the way had other inputs or settings.
    """
    request = prepared.request
    with joined_placement(prepared.compute, request.engine) as placement:
        processes = placement.processes
        rows_of_process(request.settings.batch_sequences, processes)
        with shared_output_folder(
            request.out, provenance_of(request), processes, overwrite=request.overwrite
        ) as folder:
            if processes.is_first and request.teacher.hub_id is None:
                write_places(folder, {"teacher": str(request.teacher.folder.resolve())})
            memory = PeakMemory(placement.compute.own_device)
            pair, progress = _train(prepared, placement, folder, on_step, on_note)
            peak_memory_bytes = memory.extra_bytes()
            problem = _problem(pair, progress, folder, processes)
            write_result(pair, request.student, folder, processes)
            # Last, because until now a run that is killed can still continue from it.
            if processes.is_first:
                draw_learning_curve(folder, validation_kl_before=progress.validation_kl_before)
                shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
            result = _result(prepared, progress, peak_memory_bytes, problem)
            if processes.is_first:
                on_result(folder, result)
    return result


def _result(prepared: PreparedRun, progress: Progress, peak_memory_bytes: int, problem: str | None) -> DistillResult:
    request = prepared.request
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
        validation_loss_before=progress.validation_loss_before,
        validation_loss_after=progress.validation_loss_after,
        best_step=progress.best_step or progress.step,
        problem=problem,
    )


def _problem(pair: DistillPair, progress: Progress, folder: Path, processes: Processes) -> str | None:
    """Why a trained student is worse than before, in words, the same in all processes."""
    finite = [bool(whole(tensor.detach()).isfinite().all()) for tensor in pair.student.model.parameters()]
    before, after = progress.validation_kl_before, progress.validation_kl_after
    problem = None
    if not all(finite):
        problem = "the student's weights hold NaN or infinite values"
    elif 2 * progress.skipped_steps > progress.step:
        problem = f"{progress.skipped_steps} of {progress.step} steps had to be skipped"
    elif before is not None and after is not None:
        if after > _WORSE_FACTOR * before + _WORSE_NATS:
            shown = f"{after:.4f}" if after < LARGEST_KL else "no number"
            problem = f"the KL on held-out text rose from {before:.4f} to {shown}"
    elif processes.is_first and (risen := risen_loss(folder)):
        problem = f"the training loss rose from {risen[0]:.4f} to {risen[1]:.4f}"
    answer: str | None = processes.broadcast(problem)
    return answer


def distill_checkpoint(
    request: DistillRequest, compute: Compute = Compute(), *, on_step: OnStep = ignore_step
) -> DistillResult:
    """Check, distil and write the output folder: what ``minipuzzle distill`` does.

    Raises: MinipuzzleError for inputs that do not fit together, InputChangedError as in ``run_prepared``.
    """
    return run_prepared(prepare_run(request, compute), on_step=on_step)


def provenance_of(request: DistillRequest) -> dict[str, Any]:
    """What the output remembers, and what an interrupted run must share with its continuation."""
    return {
        "command": "distill",
        "student": request.student.name,
        "student_fingerprint": request.student.fingerprint,
        "teacher": request.teacher.name,
        "teacher_fingerprint": request.teacher.fingerprint,
        "data_fingerprint": fingerprint_files(read_files(request.data)),
        "validation_fingerprint": fingerprint_files(list(request.validation)) if request.validation else None,
        **inherited(request.student.folder),
        "settings": request.settings.shaping(),
        **request.engine.shaping(),
    }


def read_files(data: tuple[Path, ...]) -> list[Path]:
    """Everything that training text comes from: the paths themselves, and those that a blend file names."""
    return [*data, *(path for path in blend_of(data).paths if path not in data)]


def _train(
    prepared: PreparedRun, placement: Placement, folder: Path, on_step: OnStep, on_note: OnNote
) -> tuple[DistillPair, Progress]:
    request = prepared.request
    pair = open_pair(
        student=request.student,
        teacher=request.teacher,
        placement=placement,
        engine=request.engine,
    )
    cache = request.teacher_cache
    pair = replace(
        pair,
        kept_channels=prepared.kept_channels,
        teacher_cache=None
        if cache is None
        else TeacherCache(cache, request.cache_description(prepared.vocabulary.rows)),
    )
    progress = distill_pair(
        pair=pair,
        data=prepared.text.windows,
        settings=request.settings,
        folder=folder,
        validation=prepared.validation_windows,
        engine=request.engine,
        on_step=on_step,
        on_note=on_note,
    )
    return pair, progress
