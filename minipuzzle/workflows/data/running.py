"""What all steps of recovery data share: who answers, where it goes, what it would take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from minipuzzle.data.endpoint.client import Endpoint
from minipuzzle.data.endpoint.questions import Model, Question
from minipuzzle.data.rows import Rejected, Row, read_rows, tokens_of
from minipuzzle.data.runner import Step, StepReport, attempts_of, run_step
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.outputs import check_target_folder, fingerprint_files, output_folder
from minipuzzle.workflows.data.settings import Asking, Running
from minipuzzle.workflows.settings import Texts, paths_of


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What a step would take: calls and tokens, the answers' at most; hours by the time of one call."""

    step: str
    rows: int
    attempts: int
    rejected: int
    calls: int
    prompt_tokens: int
    completion_tokens_at_most: int
    disk_bytes_at_most: int
    hours: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def model_of(asking: Asking) -> Model:
    """Who answers.

    Raises: MinipuzzleError for an address that is none, or a folder that cannot be read.
    """
    if asking.teacher is not None:
        from minipuzzle.workflows.data.local import LocalModel

        return LocalModel.open(Path(asking.teacher))
    return Endpoint(urls=tuple(asking.endpoint), model=asking.model, concurrency=asking.concurrency)


def chosen_of(text: str, known: Sequence[str], field: str) -> tuple[str, ...]:
    """Names as they are typed, "all" or some with commas between.

    Raises: MinipuzzleError for one that is unknown.
    """
    names = tuple(known) if text == "all" else tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise MinipuzzleError(f"‹{field}› {unknown[0]!r} is unknown", f"there are {', '.join(known)}")
    return names


def run_rows(
    step: Step, data: Texts, running: Running, *, model: Model | None = None, settings: Any, is_dry: bool
) -> StepReport | PlannedStep:
    """A step over the rows of files, in a folder that appears when it is complete; or what it would take.

    Raises: MinipuzzleError for data or an output that will not do, or as the model's.
    """
    paths = paths_of(data)
    if is_dry:
        return plan_step(step, read_rows(paths), running, model)
    return run_made(
        lambda folder: run_step(step, read_rows(paths), folder, model, running.work),
        step.name,
        running,
        paths,
        settings,
    )


def run_made(
    work: Callable[[Path], StepReport], name: str, running: Running, inputs: Sequence[Path], settings: Any
) -> StepReport:
    """Work in an output folder with provenance, which an interrupted run continues.

    Raises: MinipuzzleError for an output that may not be written.
    """
    assert running.out is not None
    out = Path(running.out)
    check_target_folder(out, overwrite=running.overwrite, inputs=inputs)
    provenance = {
        "command": f"data {name}",
        "settings": asked(settings),
        "inputs": fingerprint_files([path for path in inputs if path.exists()]),
    }
    with output_folder(out, provenance, overwrite=running.overwrite) as folder:
        return work(folder)


def asked(settings: Any) -> Any:
    """Settings for provenance: all that changes what comes out; not who works, how many at once, and where."""
    passing = ("out", "overwrite", "progress", "workers", "executor", "concurrency", "endpoint", "data")
    if is_dataclass(settings):
        names = [item.name for item in fields(settings) if item.name not in passing]
        return {name: asked(getattr(settings, name)) for name in names}
    if isinstance(settings, Mapping):
        return dict(settings)
    return list(settings) if isinstance(settings, tuple) else str(settings) if isinstance(settings, Path) else settings


def plan_step(step: Step, rows: Iterable[Row | Rejected], running: Running, model: Model | None) -> PlannedStep:
    """What a step would take; a server that answers is asked one question, for the time of it."""
    found = list(islice(rows, running.limit or None))
    usable = [row for row in found if isinstance(row, Row)]
    attempts, refused = attempts_of(step, usable)
    questions = [question for attempt in attempts for question in step.questions(attempt)]
    at_most = sum(question.max_tokens for question in questions)
    seconds = _seconds_of(questions[:1], model) if questions and model is not None else None
    concurrency = getattr(model, "concurrency", 1)
    return PlannedStep(
        step=step.name,
        rows=len(found),
        attempts=len(attempts),
        rejected=len(refused) + len(found) - len(usable),
        calls=len(questions),
        prompt_tokens=sum(map(_prompt_tokens, questions)),
        completion_tokens_at_most=at_most,
        disk_bytes_at_most=4 * at_most + sum(len(row.content.encode()) for row in usable),
        hours=None if seconds is None else seconds * len(questions) / concurrency / 3600,
    )


def _prompt_tokens(question: Question) -> int:
    return tokens_of(question.prompt) + sum(tokens_of(message["content"]) for message in question.messages)


def _seconds_of(questions: Sequence[Question], model: Model) -> float | None:
    """How long an answer takes; None where nobody answers."""
    start = time.monotonic()
    try:
        list(model.answers(questions))
    except MinipuzzleError:
        return None
    return time.monotonic() - start
