"""The race of finalists: each is distilled on the same tokens in the same order, and the measured loss decides.

Everything a race has done lies in its folder: a finished round of a finalist is a checkpoint with a line in
``race.json``, an unfinished one a distillation that continues. A race that was killed goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distill.run import distill_checkpoint
from distill.settings import DistillSettings, OnStep, ignore_step
from minipuzzle.checkpoint import Checkpoint, read_json, write_json
from minipuzzle.corpus import EvaluationWindows
from minipuzzle.errors import InputChangedError
from minipuzzle.evaluate import evaluate
from minipuzzle.finalists import RaceResult, RaceSettings, RoundResult, survivors
from minipuzzle.models import load_model

RACE_FILE = "race.json"


def run_race(
    students: Sequence[Path],
    *,
    teacher: Checkpoint,
    data: Sequence[Path],
    validation: EvaluationWindows,
    settings: RaceSettings,
    distill_settings: DistillSettings,
    folder: Path,
    device: str = "cpu",
    on_step: OnStep = ignore_step,
    on_round: Callable[[int, RoundResult], None] = lambda _contender, _result: None,
) -> RaceResult:
    """Distil cut checkpoints from their teacher and measure them on validation windows; the lowest loss wins.

    ``distill_settings``: all but the tokens, which ``settings`` gives. With halving, a contender that goes on trains
    from where its last round ended, with a fresh schedule. ``on_round`` hears of each finished round.

    Raises: InputChangedError if ``folder`` holds a race of other finalists or settings; MinipuzzleError as distilling.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = _Record(folder / RACE_FILE, students, settings)
    active = list(range(len(students)))
    num_tokens = 0
    for round_idx, round_tokens in enumerate(settings.tokens_of_rounds(len(students))):
        num_tokens += round_tokens
        for contender in active:
            if record.result(contender, round_idx) is not None:
                continue
            out = folder / f"{contender}-{round_idx}"
            if not out.is_dir():
                distill_checkpoint(
                    student=Checkpoint.open(_previous(students, folder, contender, round_idx)),
                    teacher=teacher,
                    data=data,
                    settings=_with_tokens(distill_settings, round_tokens, round_idx),
                    out=out,
                    device=device,
                    on_step=on_step,
                )
            result = _measure(Checkpoint.open(out), teacher, validation, num_tokens, device)
            record.add(contender, round_idx, result)
            on_round(contender, result)
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


def _measure(
    student: Checkpoint, teacher: Checkpoint, validation: EvaluationWindows, num_tokens: int, device: str
) -> RoundResult:
    """Both models are loaded anew, so that neither is in memory while the next contender trains."""
    against = load_model(teacher, device=device)
    found = evaluate(load_model(student, device=device), student.family, validation, against=against, device=device)
    assert found.kl is not None
    return RoundResult(tokens=num_tokens, loss=found.loss, kl=found.kl)


def _with_tokens(settings: DistillSettings, tokens: int, round_idx: int) -> DistillSettings:
    # Each round takes its text in another order, so that a later round does not repeat the beginning.
    return replace(settings, tokens=tokens, seed=settings.seed + round_idx)


class _Record:
    """Results of finished rounds, kept in a file that is replaced whole."""

    def __init__(self, path: Path, students: Sequence[Path], settings: RaceSettings) -> None:
        self.path = path
        identity = {
            "students": [Checkpoint.open(student).fingerprint for student in students],
            "settings": asdict(settings),
        }
        self.content: dict[str, Any] = read_json(path) if path.is_file() else {"identity": identity, "results": {}}
        if self.content["identity"] != json.loads(json.dumps(identity)):
            raise InputChangedError(f"{path} belongs to a race of other finalists", f"remove {path.parent}")

    def add(self, contender: int, round_idx: int, result: RoundResult) -> None:
        self.content["results"][f"{contender}-{round_idx}"] = vars(result)
        unfinished = self.path.with_suffix(".unfinished")
        write_json(unfinished, self.content)
        unfinished.replace(self.path)

    def result(self, contender: int, round_idx: int) -> RoundResult | None:
        found: Mapping[str, Any] | None = self.content["results"].get(f"{contender}-{round_idx}")
        return None if found is None else RoundResult(**found)

    def loss(self, contender: int, round_idx: int) -> float:
        result = self.result(contender, round_idx)
        assert result is not None
        return result.loss

    def rounds(self, contender: int) -> tuple[RoundResult, ...]:
        found = (self.result(contender, round_idx) for round_idx in range(len(self.content["results"])))
        return tuple(result for result in found if result is not None)
