"""Guarantee: a race gives every finalist the same tokens, the lowest measured loss wins, and a kill costs no result.

Each finalist's loss is what distilling it alone gives. `prune` with finalists writes the winner as training left it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from distill.race import RACE_FILE, RaceResult, RaceSettings, run_race, survivors
from distill.run import DistillRequest, distill_checkpoint
from distill.settings import DistillSettings
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import keep_everything, num_layers_different
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import EvaluationWindows, evaluation_windows
from minipuzzle.errors import InputChangedError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.evaluate import evaluate
from minipuzzle.quality.ranked import RankedPlan
from minipuzzle.runtime.models import load_model, load_tokenizer
from minipuzzle.workflows.choosing.finalists import pick_finalists
from tests.support.cli import run_cli
from tests.support.cuts import plan_with
from tests.support.kills import stop_command_when
from tests.support.ranking import quality_of

SETTINGS = RaceSettings(tokens=96, sequence_length=16, batch_sequences=2, learning_rate=3e-3)
DISTILL = DistillSettings(tokens=96, sequence_length=16, batch_sequences=2, learning_rate=3e-3)
DROPPED = ((3,), (1, 4), (2,), (0, 1))


@pytest.fixture(scope="module")
def students(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four cuts of the tiny checkpoint."""
    checkpoint = Checkpoint.open(tiny_folder)
    folders = []
    for number, dropped in enumerate(DROPPED):
        folder = tmp_path_factory.mktemp("students") / str(number)
        folder.mkdir()
        kept_layers = tuple(idx for idx in range(7) if idx not in dropped)
        write_pruned(checkpoint, replace(keep_everything(checkpoint.architecture), kept_layers=kept_layers), folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def validation(tiny_folder: Path, text_file: Path) -> EvaluationWindows:
    return evaluation_windows(load_tokenizer(tiny_folder), read_documents([text_file])[:2], sequence_length=16)


def race(
    students: list[Path],
    teacher: Checkpoint,
    text: Path,
    validation: EvaluationWindows,
    folder: Path,
    settings: RaceSettings = SETTINGS,
) -> RaceResult:
    return run_race(
        students,
        teacher=teacher,
        data=[text],
        validation=validation,
        settings=settings,
        folder=folder,
    )


def test_every_finalist_gets_what_distilling_it_alone_gives_and_the_best_wins(
    students: list[Path], tiny_checkpoint: Checkpoint, text_file: Path, validation: EvaluationWindows, tmp_path: Path
) -> None:
    result = race(students[:2], tiny_checkpoint, text_file, validation, tmp_path / "race")
    losses = []
    for number, student in enumerate(students[:2]):
        request = DistillRequest(
            student=Checkpoint.open(student),
            teacher=tiny_checkpoint,
            data=(text_file,),
            settings=DISTILL,
            out=tmp_path / str(number),
        )
        distill_checkpoint(request)
        model = load_model(Checkpoint.open(tmp_path / str(number)))
        losses.append(evaluate(model, tiny_checkpoint.family, validation).loss)
    assert [rounds[-1].quality.loss for rounds in result.rounds] == losses
    assert result.winner == losses.index(min(losses))
    assert [rounds[-1].tokens for rounds in result.rounds] == [96, 96]
    won, alone = result.winner_folder / "model.safetensors", tmp_path / str(result.winner) / "model.safetensors"
    assert won.read_bytes() == alone.read_bytes()


def test_halving_drops_the_worse_half_and_the_rest_trains_on(
    students: list[Path], tiny_checkpoint: Checkpoint, text_file: Path, validation: EvaluationWindows, tmp_path: Path
) -> None:
    halving = replace(SETTINGS, halving=True, tokens=64)
    result = race(students, tiny_checkpoint, text_file, validation, tmp_path / "race", halving)
    first = {number: rounds[0].quality.loss for number, rounds in enumerate(result.rounds)}
    assert [number for number, rounds in enumerate(result.rounds) if len(rounds) == 2] == survivors(first)
    assert {rounds[-1].tokens for rounds in result.rounds} == {32, 64}
    last = {number: result.rounds[number][-1].quality.loss for number in survivors(first)}
    assert last[result.winner] == min(last.values())
    assert halving.total_steps(4) == 4 + 2


def test_finished_results_are_kept_and_other_finalists_refused(
    students: list[Path], tiny_checkpoint: Checkpoint, text_file: Path, validation: EvaluationWindows, tmp_path: Path
) -> None:
    folder = tmp_path / "race"
    before = race(students[:2], tiny_checkpoint, text_file, validation, folder)
    shutil.rmtree(folder / "0-0")  # would be needed if anything were done again
    record = (folder / RACE_FILE).read_bytes()
    assert race(students[:2], tiny_checkpoint, text_file, validation, folder) == before
    assert (folder / RACE_FILE).read_bytes() == record
    with pytest.raises(InputChangedError, match="other finalists"):
        race(students[1:3], tiny_checkpoint, text_file, validation, folder)


def prune_arguments(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    small = ["--context", "64", "--samples", "2", "--sequence-length", "16", "--granularity", "16", "--candidates", "4"]
    racing = ["--finalists", "2", "--race-tokens", "64", "--race-batch", "2", "--race-learning-rate", "3e-3"]
    return [
        "prune",
        str(model),
        "--memory",
        "85%",
        "--min-kept",
        "0.3",
        "--data",
        str(text),
        *small,
        *racing,
        "-o",
        str(out),
        *more,
    ]


def test_prune_races_finalists_and_a_killed_race_goes_on(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    result = run_cli(*prune_arguments(tiny_folder, text_file, whole, "--json"))
    assert result.exit_code == 0, result.output
    table = json.loads(result.output)
    kill_after_the_first_finalist(prune_arguments(tiny_folder, text_file, out), out)
    assert run_cli(*prune_arguments(tiny_folder, text_file, out)).exit_code == 0
    for name in ("model.safetensors", "config.json", "plan.json", "candidates.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (out / "finalists").exists()

    finalists = json.loads((out / "candidates.json").read_text())["finalists"]
    assert finalists == table["finalists"] and len(finalists) == 2
    (winner,) = [finalist for finalist in finalists if finalist["is_winner"]]
    assert winner["rounds"][-1]["loss"] == min(finalist["rounds"][-1]["loss"] for finalist in finalists)
    assert Checkpoint.open(out).architecture.pattern == winner["pattern"]
    # What was written is the trained winner: it measures what the race measured.
    tokens = Checkpoint.open(out)
    assert winner["rounds"][-1]["kl"] < winner["before"]["kl"]
    assert tokens.architecture.num_parameters == winner["num_parameters"]


def kill_after_the_first_finalist(arguments: list[str], out: Path) -> None:
    """Start a command and kill it once one finalist is done and another under way."""
    record = out.with_name(out.name + ".partial") / "finalists" / "race" / RACE_FILE
    stop_command_when(arguments, record.is_file)
    assert list(json.loads(record.read_text())["results"]) == ["0-0"] and not out.exists()


def test_a_race_needs_finalists_and_finalists_a_race(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = prune_arguments(tiny_folder, text_file, tmp_path / "out", "--finalists", "1")
    result = run_cli(*arguments)
    assert result.exit_code == 1 and "--race-tokens" in result.output


def test_finalists_differ_and_the_best_fill_up(tiny_checkpoint: Checkpoint) -> None:
    source = tiny_checkpoint.architecture
    whole = keep_everything(source)
    plans = [
        replace(whole, kept_layers=(0, 1, 2, 3, 5, 6)),
        replace(whole, kept_layers=(0, 1, 2, 4, 5, 6)),  # differs from the first in two layers
        replace(whole, kept_layers=(0, 1, 2, 3, 6)),  # in one
        plan_with(tiny_checkpoint, ffn=16),  # in layer 4 and the narrowed layers 1 and 6
    ]
    treatments = [plan.treatment(source) for plan in plans]
    assert [num_layers_different(treatments[0], treatment) for treatment in treatments] == [0, 2, 1, 3]
    ranked = [RankedPlan(plan=plan, quality=quality_of(number, 0, 0, 0)) for number, plan in enumerate(plans)]

    def picked(number: int, min_different: int) -> list[int]:
        found = pick_finalists(source, ranked, number, min_different)
        return [next(idx for idx, item in enumerate(ranked) if item is one) for one in found]

    assert picked(2, 1) == [0, 1]
    assert picked(2, 3) == [0, 3]
    assert picked(3, 3) == [0, 3, 1]  # nothing else differs so much
    assert picked(9, 1) == [0, 1, 2, 3]
