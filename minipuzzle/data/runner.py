"""Runs a step over rows: shard by shard, each whole or not at all, with every attempt accounted for.

Input rows are first laid out in shards, so that a run that continues, and any number of workers, see the same ones.
A shard's rows go through the step, and what comes out is counted: attempts are rows out plus rejections, or it fails.
Workers and clusters are datatrove's executors (extra ``data``).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from minipuzzle.data.documents import MANIFEST_FILE
from minipuzzle.data.endpoint.journal import JOURNAL_FILE, Journal, Journaled
from minipuzzle.data.endpoint.questions import Ask, Model, Question
from minipuzzle.data.rows import Rejected, Row, read_shard, write_shard
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.digests import sha256_of
from minipuzzle.files.json_files import read_json, record_of, write_json
from minipuzzle.files.outputs import write_whole
from minipuzzle.progress import Progress, silent
from minipuzzle.table import Table

REJECTED_FOLDER = "rejected"
_INPUT, _DONE, _EXECUTOR = "input", "done", "executor"  # of a run that goes on
SHARD_ROWS = 1_000
EXECUTORS: Table[str] = Table(
    "executor",
    "executors",
    entries={
        "local": "datatrove.executor:LocalPipelineExecutor",
        "slurm": "datatrove.executor:SlurmPipelineExecutor",
        "ray": "datatrove.executor:RayPipelineExecutor",
    },
)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One thing that a step tries: a row, or a piece of it in some style."""

    row: Row
    text: str
    style: str = ""
    number: int = 0


class Step(Protocol):
    """What is done to rows. It is a value: workers get a copy."""

    @property
    def name(self) -> str:
        """What provenance calls it."""

    def attempts(self, row: Row) -> Sequence[Attempt] | Rejected:
        """What would be tried with a row, without asking anybody."""

    def questions(self, attempt: Attempt) -> Sequence[Question]:
        """What a model is asked first for an attempt; none for steps that ask nobody."""

    def results(self, attempts: Sequence[Attempt], ask: Ask) -> Sequence[Row | Rejected]:
        """What came of each attempt, in their order."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How a step is run. ``shard_rows``: rows a shard; ``limit``: rows at most, 0 for all."""

    workers: int = 1
    executor: str = "local"
    shard_rows: int = SHARD_ROWS
    limit: int = 0
    progress: Progress = field(default=silent)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step did: rows in, attempts, rows out, rejections by reason, tokens out and tokens spent."""

    step: str
    rows_in: int
    attempts: int
    rows_out: int
    rejected: Mapping[str, int]
    tokens_out: int
    shards: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """All of it by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, kw_only=True)
class RunShard:
    """The work of one shard, which workers are sent: datatrove calls it with the number of the shard."""

    folder: Path
    step: Step
    model: Model | None

    def __call__(self, _data: object, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do it, unless it is done."""
        self.run(rank)
        return iter(())

    def run(self, number: int) -> None:
        """Read shard ``number``, carry out the step, and write rows, rejections and counts.

        Raises: MinipuzzleError as the model's.
        """
        name, done = f"part-{number:05}.parquet", self.folder / _DONE / f"{number:05}.json"
        if done.is_file():
            return
        rows = read_shard(self.folder / _INPUT / name)
        attempts, refused = attempts_of(self.step, rows)
        results = list(self._results(attempts))
        assert len(results) == len(attempts), f"{self.step.name}: {len(attempts)} attempts, {len(results)} results"
        taken = [result for result in results if isinstance(result, Row)]
        rejected = [*refused, *(result for result in results if isinstance(result, Rejected))]
        with write_whole(self.folder / name) as path:
            write_shard(path, taken)
        with write_whole(self.folder / REJECTED_FOLDER / name) as path:
            write_rejected(path, rejected)
        counts = {
            "rows_in": len(rows),
            "attempts": len(attempts) + len(refused),
            "rows_out": len(taken),
            "rejected": Counter(item.reason for item in rejected),
            "tokens_out": sum(row.num_tokens for row in taken),
        }
        with write_whole(done) as path:
            write_json(path, counts)

    def _results(self, attempts: Sequence[Attempt]) -> Sequence[Row | Rejected]:
        if self.model is None:
            return self.step.results(attempts, _ask_nobody)
        journal = Journal(self.folder / JOURNAL_FILE)
        try:
            return self.step.results(attempts, Journaled(model=self.model, journal=journal).ask)
        finally:
            journal.close()


def _ask_nobody(questions: Sequence[Question]) -> Any:
    raise AssertionError("this step asks nobody")


def attempts_of(step: Step, rows: Iterable[Row]) -> tuple[list[Attempt], list[Rejected]]:
    """What a step would try with rows, and the rows with which it tries nothing."""
    attempts: list[Attempt] = []
    refused: list[Rejected] = []
    for row in rows:
        found = step.attempts(row)
        if isinstance(found, Rejected):
            refused.append(found)
        else:
            assert found, f"{step.name} neither tries nor rejects {row.id}"
            attempts += found
    return attempts, refused


def run_step(step: Step, rows: Iterable[Row | Rejected], folder: Path, model: Model | None, work: Work) -> StepReport:
    """Carry out a step over rows; ``folder`` (one that is being written) then holds shards and a manifest.

    Raises: MinipuzzleError for no rows at all, or as the model's; what is done by then is kept.
    """
    if (folder / MANIFEST_FILE).is_file():  # killed while it tidied up
        return _tidied(folder)
    for name in (_INPUT, _DONE, REJECTED_FOLDER):
        (folder / name).mkdir(exist_ok=True)
    lost, num_shards = _lay_out(rows, folder, work)
    jobs = RunShard(folder=folder, step=step, model=model)
    if work.workers == 1 and work.executor == "local":
        with work.progress(step.name, num_shards) as advance:
            for number in range(num_shards):
                jobs.run(number)
                advance(1)
    else:
        _run_by_executor(jobs, num_shards, work)
    return _finish(step.name, folder, num_shards, lost)


def _lay_out(rows: Iterable[Row | Rejected], folder: Path, work: Work) -> tuple[list[Rejected], int]:
    """Write the input's shards, unless they are there; what is no row is written down beside them."""
    layout = folder / _INPUT / "layout.json"
    if not layout.is_file():
        lost: list[Rejected] = []

        def usable() -> Iterator[Row]:
            for row in rows:
                if isinstance(row, Row):
                    yield row
                else:
                    lost.append(row)

        taken, number = islice(usable(), work.limit or None), 0
        while shard := list(islice(taken, work.shard_rows)):
            write_shard(folder / _INPUT / f"part-{number:05}.parquet", shard)
            number += 1
        write_rejected(folder / REJECTED_FOLDER / "input.parquet", lost)
        with write_whole(layout) as path:
            write_json(path, {"shards": number, "lost": [vars(item) for item in lost]})
    found = read_json(layout)
    if not found["shards"]:
        raise MinipuzzleError("there is no row to work on", "check ‹data›")
    return [Rejected(**item) for item in found["lost"]], found["shards"]


def _run_by_executor(jobs: RunShard, num_shards: int, work: Work) -> None:
    """Through an executor of datatrove's; Slurm's submits and returns, so the same command collects later.

    Raises: MinipuzzleError where datatrove is missing, or while shards are still to be done.
    """
    EXECUTORS.check(work.executor)
    module, _, name = EXECUTORS[work.executor].partition(":")
    try:
        from importlib import import_module

        executor = getattr(import_module(module), name)
    except ImportError as error:
        hint = "pip install 'minipuzzle[data]', or use one worker"
        raise MinipuzzleError(f"several workers need datatrove: {error}", hint) from None
    settings = {"pipeline": [jobs], "tasks": num_shards, "logging_dir": str(jobs.folder / _EXECUTOR)}
    executor(**settings, workers=work.workers, skip_completed=False).run()
    missing = [number for number in range(num_shards) if not (jobs.folder / _DONE / f"{number:05}.json").is_file()]
    if missing:
        hint = f"the same command continues; what was said stands in {jobs.folder / _EXECUTOR}"
        raise MinipuzzleError(f"{len(missing)} of {num_shards} shards are not done", hint)


def _finish(step: str, folder: Path, num_shards: int, lost: Sequence[Rejected]) -> StepReport:
    """Add up the counts, and see that nothing was lost."""
    counts = [read_json(folder / _DONE / f"{number:05}.json") for number in range(num_shards)]
    rejected = Counter(item.reason for item in lost)
    for count in counts:
        rejected.update(count["rejected"])
    report = StepReport(
        step=step,
        rows_in=sum(count["rows_in"] for count in counts) + len(lost),
        attempts=sum(count["attempts"] for count in counts) + len(lost),
        rows_out=sum(count["rows_out"] for count in counts),
        rejected=dict(sorted(rejected.items())),
        tokens_out=sum(count["tokens_out"] for count in counts),
        shards={path.name: sha256_of(path) for path in sorted(folder.glob("part-*.parquet"))},
    )
    assert report.attempts == report.rows_out + sum(report.rejected.values()), "rows were lost"
    with write_whole(folder / MANIFEST_FILE) as path:
        write_json(path, report.to_json())
    return _tidied(folder)


def _tidied(folder: Path) -> StepReport:
    """The report of a finished step, once only what users want is left of its folder."""
    for name in (_INPUT, _DONE, _EXECUTOR):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.glob(JOURNAL_FILE + "*"):
        path.unlink()
    return record_of(StepReport, read_json(folder / MANIFEST_FILE), MANIFEST_FILE)


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    """Write what was not taken, with the reasons."""
    import pyarrow as pa
    from pyarrow import parquet

    names = ("id", "reason", "attempt", "detail")
    columns = {name: [json.dumps(getattr(item, name))[1:-1] for item in rejected] for name in names}
    parquet.write_table(pa.table(columns, schema=pa.schema({name: pa.string() for name in names}.items())), path)


def progress_of(folder: Path) -> dict[str, Any] | None:
    """A step's report, or how many of its shards are done so far; None for another folder."""
    if (folder / MANIFEST_FILE).is_file():
        return read_json(folder / MANIFEST_FILE)
    layout = folder / _INPUT / "layout.json"
    if not layout.is_file():
        return None
    done = [read_json(path) for path in sorted((folder / _DONE).glob("*.json"))]
    figures = {name: sum(count[name] for count in done) for name in ("rows_in", "rows_out", "tokens_out")}
    return {"shards": read_json(layout)["shards"], "shards_done": len(done), **figures}
