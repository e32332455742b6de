"""Evaluating a model as a whole: windows of each text, both models, and a row of figures a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import EvaluationWindows, check_token_ids, evaluation_windows
from minipuzzle.errors import MinipuzzleError, warn
from minipuzzle.export.reader import load_any_model, open_any
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.files.outputs import check_target_folder, fingerprint_files, output_folder
from minipuzzle.files.records import complete_record
from minipuzzle.quality.evaluate import combine, documents_within
from minipuzzle.quality.evaluate import evaluate as evaluate_model
from minipuzzle.quality.record import Quality
from minipuzzle.quality.vocabulary import check_same_vocabulary, in_vocabulary_of, shared_vocabulary
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.show.page.page import write_page
from minipuzzle.workflows.abilities.harness import require_lm_eval, run_harness
from minipuzzle.workflows.settings import EvaluateSettings, paths_of
from minipuzzle.workflows.verbs import Model, open_model, verb

TOTAL = "total"
QUALITY_FILE = "quality.json"


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """The quality of a model on each text by its name, and over all of them where there are several.

    ``tasks``: instead, what lm-eval measured, task by task.
    """

    rows: Mapping[str, Quality]
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def total(self) -> Quality:
        """Over all texts."""
        return self.rows[TOTAL] if TOTAL in self.rows else next(iter(self.rows.values()))

    def to_json(self) -> dict[str, Any]:
        """All figures by name, text by text."""
        return {"tasks": self.tasks} if self.tasks else {name: row.to_json() for name, row in self.rows.items()}


def run_evaluate(model: Model, settings: EvaluateSettings) -> EvaluatedModel:
    """Measure a model on text: loss, bits per byte, accuracy, speed; with ``against`` also KL and agreement.

    With ``out`` the figures and their page become a folder.

    Raises: MinipuzzleError for models that cannot be read or compared, or text that does not do.
    """
    if settings.tasks:
        return EvaluatedModel(rows={}, tasks=_harness(model, settings))
    student, teacher = _opened(model, settings)
    out = None if settings.out is None else Path(settings.out)
    inputs = [checkpoint.folder for checkpoint in (student, teacher) if checkpoint is not None]
    if out is not None:
        check_target_folder(out, overwrite=settings.overwrite, inputs=(*inputs, *paths_of(settings.data)))
    found = _measured(student, teacher, settings)
    if out is not None:
        asked = {name: getattr(settings, name) for name in ("sequence_length", "max_tokens")}
        provenance = {
            "command": "evaluate",
            "model_fingerprint": student.fingerprint,
            "teacher_fingerprint": None if teacher is None else teacher.fingerprint,
            "settings": {**asked, "data_fingerprint": fingerprint_files(list(paths_of(settings.data)))},
        }
        with output_folder(out, provenance, overwrite=settings.overwrite) as folder:
            write_json(folder / QUALITY_FILE, found.to_json())
            name = student.folder.resolve().name
            complete_record(
                folder, {"quality": {name: found.to_json()}}, before=inputs[:1], device=settings.compute.device
            )
            write_page(folder)
    return found


def _measured(student: Checkpoint, teacher: Checkpoint | None, settings: EvaluateSettings) -> EvaluatedModel:
    windows = _windows_by_name(student, settings)
    compute = settings.compute
    loaded = load_any_model(student, compute)
    against = None if teacher is None else load_any_model(teacher, compute)
    rows = {}
    with compute.progress("evaluating", sum(len(part.token_ids) for part in windows.values())) as advance:
        for name, part in windows.items():
            rows[name] = evaluate_model(
                loaded,
                student.family,
                part,
                compute,
                against=against,
                against_family=teacher.family if teacher is not None else None,
                batch=settings.batch,
                advance=advance,
            )
    return EvaluatedModel(rows={**rows, TOTAL: combine(list(rows.values()))} if len(rows) > 1 else rows)


evaluate = verb(EvaluateSettings, run_evaluate)


def plan_evaluate(model: Model, settings: EvaluateSettings) -> dict[str, int]:
    """How many tokens of each text would be predicted, after all checks that need no weights.

    Raises: as ``run_evaluate``.
    """
    if settings.tasks:
        require_lm_eval()
        open_any(open_model(model))
        return {}
    student, _ = _opened(model, settings)
    return {name: part.num_predictions for name, part in _windows_by_name(student, settings).items()}


def _harness(model: Model, settings: EvaluateSettings) -> Mapping[str, Mapping[str, Any]]:
    names = [name.strip() for name in (settings.tasks or "").split(",") if name.strip()]
    folder = str(open_model(model).folder)
    return run_harness(folder, names, limit=settings.limit, folder=settings.task_folder, compute=settings.compute)


def _opened(model: Model, settings: EvaluateSettings) -> tuple[Checkpoint, Checkpoint | None]:
    student = open_any(open_model(model))
    teacher = None if settings.against is None else open_any(open_model(settings.against))
    if teacher is not None:
        teacher = _in_vocabulary_of(student, teacher)
        if student.architecture.vocabulary == teacher.architecture.vocabulary:
            check_same_vocabulary(student, teacher)
        else:
            warn(shared_vocabulary(student, teacher).note)
    return student, teacher


def _in_vocabulary_of(student: Checkpoint, teacher: Checkpoint) -> Checkpoint:
    found = in_vocabulary_of(student, teacher)
    if found is not teacher and teacher.is_quantized:
        raise MinipuzzleError(
            f"{student.folder} has a part of the vocabulary of {teacher.folder}, which is quantised",
            "compare with the plain weights that this was made from",
        )
    return found


def _windows_by_name(student: Checkpoint, settings: EvaluateSettings) -> dict[str, EvaluationWindows]:
    tokenizer = load_tokenizer(student.tokenizer_folder)
    windows: dict[str, EvaluationWindows] = {}
    for path in paths_of(settings.data):
        documents = read_documents([path], tokenizer)
        if settings.max_tokens:
            documents = documents_within(tokenizer, documents, settings.max_tokens)
        name = path.stem if path.stem not in windows else str(path)
        windows[name] = evaluation_windows(tokenizer, documents, sequence_length=settings.sequence_length)
        check_token_ids(windows[name].token_ids, student.architecture.vocabulary)
    return windows
