"""The race of finalists: each is distilled on the same tokens in the same order, and the measured loss decides.

Everything a race has done lies in its folder: a finished round of a finalist is a checkpoint with a line in
``race.json``, an unfinished one a distillation that continues. A race that was killed goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distill.scale.estimate import estimate_memory
from distill.settings import DistillSettings
from minipuzzle.architecture.model import Architecture
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.errors import InputChangedError, MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.digests import checked_record, unchanged_record
from minipuzzle.files.json_files import read_json, record_of, write_json
from minipuzzle.files.outputs import write_whole
from minipuzzle.quality.evaluate import evaluate
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import resident_weight_bytes
from minipuzzle.runtime.models import load_model

if TYPE_CHECKING:
    from distill.run import DistillRequest

RACE_FILE = "race.json"


def run_race(
    students: Sequence[Path],
    *,
    teacher: Checkpoint,
    data: Sequence[Path],
    validation: EvaluationWindows,
    settings: RaceSettings,
    folder: Path,
    compute: Compute = Compute(),
) -> RaceResult:
    """Distil cut checkpoints from their teacher and measure them on validation windows; the lowest loss wins.

    With halving, a contender that goes on trains from where its last round ended, with a fresh schedule. Training
    holds both models whole: a contender that needs more than ``compute.memory_bytes`` by the estimate is refused.

    Raises: InputChangedError if ``folder`` holds a race of other finalists or settings; MinipuzzleError as distilling,
    and for too little memory.
    """
    # Here, because FSDP takes a second to import, and most cuts race nothing.
    from distill.run import DistillRequest, distill_checkpoint

    for student in students:
        settings.require_room(Checkpoint.open(student).architecture, teacher.architecture, compute)
    folder.mkdir(parents=True, exist_ok=True)
    record = RaceRecord(folder / RACE_FILE, students, settings)
    active = list(range(len(students)))
    num_tokens = 0
    with compute.progress("racing finalists", settings.total_steps(len(students))) as advance:
        for round_idx, round_tokens in enumerate(settings.tokens_of_rounds(len(students))):
            num_tokens += round_tokens
            for contender in active:
                if record.result(contender, round_idx) is not None:
                    continue
                request = DistillRequest(
                    student=Checkpoint.open(_previous(students, folder, contender, round_idx)),
                    teacher=teacher,
                    data=tuple(data),
                    settings=settings.distillation(round_tokens, round_idx, compute.dtype),
                    out=folder / f"{contender}-{round_idx}",
                )
                if not request.out.is_dir():
                    distill_checkpoint(request, compute, on_step=lambda _record: advance(1))
                record.add(contender, round_idx, _measure(request, validation, num_tokens, compute))
            last = {contender: record.loss(contender, round_idx) for contender in active}
            active = survivors(last) if settings.halving else active
    winner = min(last, key=lambda contender: (last[contender], contender))
    return RaceResult(
        rounds=tuple(record.rounds(contender) for contender in range(len(students))),
        winner=winner,
        winner_folder=folder / f"{winner}-{round_idx}",
    )


def _previous(students: Sequence[Path], folder: Path, contender: int, round_idx: int) -> Path:
    return students[contender] if round_idx == 0 else folder / f"{contender}-{round_idx - 1}"


def _measure(request: DistillRequest, validation: EvaluationWindows, num_tokens: int, compute: Compute) -> RoundResult:
    """Both models are loaded anew, so that neither is in memory while the next contender trains."""
    compute = replace(compute, dtype="float32")
    student, against = Checkpoint.open(request.out), load_model(request.teacher, compute)
    found = evaluate(load_model(student, compute), student.family, validation, compute, against=against)
    return RoundResult(tokens=num_tokens, quality=found)


class RaceRecord:
    """Results of finished rounds, kept in a file that is replaced whole."""

    def __init__(self, path: Path, students: Sequence[Path], settings: RaceSettings) -> None:
        self.path = path
        identity = {
            "students": [Checkpoint.open(student).fingerprint for student in students],
            "settings": asdict(settings),
        }
        self.content: dict[str, Any] = _read_race(path) if path.is_file() else {"identity": identity, "results": {}}
        if self.content["identity"] != json.loads(json.dumps(identity)):
            raise InputChangedError(f"{path} belongs to a race of other finalists", f"remove {path.parent}")

    def add(self, contender: int, round_idx: int, result: RoundResult) -> None:
        self.content["results"][f"{contender}-{round_idx}"] = result.to_json()
        with write_whole(self.path) as path:
            write_json(path, checked_record(self.content))

    def result(self, contender: int, round_idx: int) -> RoundResult | None:
        found = self.content["results"].get(f"{contender}-{round_idx}")
        return None if found is None else RoundResult.from_json(found)

    def loss(self, contender: int, round_idx: int) -> float:
        result = self.result(contender, round_idx)
        assert result is not None
        return result.quality.loss

    def rounds(self, contender: int) -> tuple[RoundResult, ...]:
        found = (self.result(contender, round_idx) for round_idx in range(len(self.content["results"])))
        return tuple(result for result in found if result is not None)


@dataclass(frozen=True, kw_only=True)
class _MeasuredRound:
    tokens: int
    loss: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class _RaceContent:
    identity: Any
    results: Mapping[str, _MeasuredRound]


def _read_race(path: Path) -> dict[str, Any]:
    """What a race's file holds.

    Raises: MinipuzzleError if it is not what was written, or no record of a race.
    """
    content = unchanged_record(read_json(path), str(path))
    try:
        record_of(_RaceContent, content, RACE_FILE)
    except ValueError as error:
        raise MinipuzzleError(f"{path} is no record of a race: {error}", f"remove {path.parent}") from None
    return content


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """A finalist after one round. ``tokens`` of training so far; ``quality`` on the validation text."""

    tokens: int
    quality: Quality

    def to_json(self) -> dict[str, float | int | None]:
        """What the race's file and the table of finalists keep."""
        return {"tokens": self.tokens, "loss": self.quality.loss, "kl": self.quality.kl}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RoundResult:
        """The inverse of ``to_json``."""
        return cls(tokens=record["tokens"], quality=Quality(loss=record["loss"], kl=record["kl"]))


@dataclass(frozen=True, kw_only=True)
class RaceResult:
    """Rounds of each finalist, in the order given, and the winner's trained checkpoint folder."""

    rounds: tuple[tuple[RoundResult, ...], ...]
    winner: int
    winner_folder: Path

    def __post_init__(self) -> None:
        assert 0 <= self.winner < len(self.rounds)


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """``tokens`` that each finalist trains on in all, and how. ``halving``: drop the worse half after each round."""

    tokens: int
    halving: bool = False
    learning_rate: float = 1e-4
    sequence_length: int = 512
    batch_sequences: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.tokens, self.sequence_length, self.batch_sequences) < 1 or self.learning_rate <= 0:
            raise MinipuzzleError(
                "a race needs tokens, a sequence length, a batch and a learning rate above zero",
                "check ‹race_tokens›, ‹race_batch›, ‹race_learning_rate› and ‹sequence_length›",
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_sequences * self.sequence_length

    def distillation(self, tokens: int, round_idx: int, dtype: str) -> DistillSettings:
        """How a round trains. Each takes its text in another order, so that a later one does not repeat the first."""
        return DistillSettings(
            tokens=tokens,
            sequence_length=self.sequence_length,
            batch_sequences=self.batch_sequences,
            learning_rate=self.learning_rate,
            seed=self.seed + round_idx,
            dtype=dtype,
        )

    def require_room(self, student: Architecture, teacher: Architecture, compute: Compute) -> None:
        """Refuse to train or measure a finalist beside its source within a limit that is too low for it.

        Raises: MinipuzzleError with both amounts.
        """
        settings = self.distillation(self.tokens, 0, compute.dtype)
        memory = estimate_memory(student, teacher, settings, on_cpu=compute.own_device.is_cpu)
        memory.require_room(compute, "drop ‹num_finalists›")
        if compute.memory_bytes is not None:
            weight_bytes = sum(resident_weight_bytes(model, torch.float32) for model in (student, teacher))
            compute.require_room(weight_bytes, "to measure a finalist beside its source", "drop ‹num_finalists›")

    def tokens_of_rounds(self, num_finalists: int) -> tuple[int, ...]:
        """Tokens of each round: one round, or with halving as many equal ones as it takes to leave one finalist."""
        num_rounds = max(1, (num_finalists - 1).bit_length()) if self.halving else 1
        return (-(-self.tokens // num_rounds),) * num_rounds

    def total_steps(self, num_finalists: int) -> int:
        """Optimiser steps of the whole race."""
        total, active = 0, num_finalists
        for tokens in self.tokens_of_rounds(num_finalists):
            total += active * -(-tokens // self.tokens_per_step)
            active = -(-active // 2) if self.halving else active
        return total


def survivors(latest: dict[int, float]) -> list[int]:
    """The better half of some contenders (number -> loss), rounded up, by number; ties go to the smaller number."""
    ordered = sorted(latest, key=lambda contender: (latest[contender], contender))
    return sorted(ordered[: -(-len(ordered) // 2)])


def finalist_table(finalists: Sequence[Mapping[str, Any]], result: RaceResult) -> list[dict[str, Any]]:
    """What is known of each finalist with its rounds, and which one won."""
    return [
        {**facts, "rounds": [done.to_json() for done in rounds], "is_winner": number == result.winner}
        for number, (facts, rounds) in enumerate(zip(finalists, result.rounds, strict=True))
    ]
