"""Guarantee: a flipped bit in what one command writes and another believes is refused with the file's name.

Plans, score files, sums of an interrupted measurement and the record of a race; lines of metrics are left out aloud.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.race import RaceRecord, RaceSettings, RoundResult
from distill.settings import StepRecord
from distill.states.records import METRICS_FILE, append_metrics, forget_metrics_after, read_metrics
from importance.partial import PartialSums
from minipuzzle.cut.plan import Plan, read_plan
from minipuzzle.cut.scores import Scores, read_scores, write_scores
from minipuzzle.cut.selection import make_plan
from minipuzzle.errors import MinipuzzleError, MinipuzzleWarning
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.digests import checked_record
from minipuzzle.quality.record import Quality
from tests.damage.ways import flipped
from tests.support.cli import run_cli
from tests.support.ranking import figures_with
from tests.support.scores import random_scores
from tests.support.tiny_models import write_tiny_checkpoint

FLIPS = 150
IDENTITY = {"model_fingerprint": "0123"}
RACE = RaceSettings(tokens=64)
STEP = StepRecord(step=1, tokens=8, loss=2.0, kl=0.5, learning_rate=1e-3, grad_norm=1.0, tokens_per_second=9.0)


def scores_of(model: Path) -> Scores:
    checkpoint = Checkpoint.open(model)
    token_ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    metadata = {"model_fingerprint": checkpoint.fingerprint}
    found = random_scores(checkpoint.architecture)
    return Scores(layer=found.layer, units=found.units, token_ids=token_ids, metadata=metadata)


def plan_of(model: Path) -> Plan:
    source = Checkpoint.open(model).architecture
    widths = {1: {"ffn": 16}, 4: {"ffn": 16}}
    return make_plan(source, scores_of(model), kept_layers=(0, 1, 4), widths=widths, figures=figures_with("M--", 0.5))


def write_plan(path: Path, model: Path) -> None:
    path.write_text(plan_of(model).to_json(), encoding="utf-8")


def write_sums(path: Path, _model: Path) -> None:
    PartialSums(path, IDENTITY).write("layers-0", {"sums": np.arange(5.0), "num_tokens": np.array(7)})


def write_race(path: Path, model: Path) -> None:
    RaceRecord(path, [model], RACE).add(0, 0, RoundResult(tokens=64, quality=Quality(loss=3.5, kl=0.1)))


def sums_of(path: Path) -> Any:
    return {name: values.tolist() for name, values in (PartialSums(path, IDENTITY).stage("layers-0") or {}).items()}


WRITTEN: dict[str, tuple[Callable[[Path, Path], None], Callable[[Path, Path], Any]]] = {
    "plan.json": (write_plan, lambda path, _model: read_plan(path)),
    "scores.safetensors": (
        lambda path, model: write_scores(scores_of(model), path),
        lambda path, _model: json.dumps(read_scores(path).to_json()),
    ),
    "partial-sums": (write_sums, lambda path, _model: sums_of(path)),
    "race.json": (write_race, lambda path, model: RaceRecord(path, [model], RACE).content),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_flipped_bit_is_refused_wherever_it_is(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    write, read = WRITTEN[name]
    path = tmp_path / name
    write(path, tiny_folder)
    whole, content = read(path, tiny_folder), path.read_bytes()
    dice, num_refused = random.Random(0), 0
    for _ in range(FLIPS):
        path.write_bytes(flipped(content, [dice.random()], bit=dice.randrange(8)))
        try:
            # The same number may be written in two ways, 1e-3 and 1E-3.
            assert read(path, tiny_folder) == whole
        except MinipuzzleError as error:
            num_refused += 1
            assert str(path) in error.problem
    assert num_refused > 0.95 * FLIPS


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"results": []}, "results"),
        ({"results": {"0-0": {"tokens": 64, "loss": "low", "kl": 0.1}}}, "loss is 'low'"),
        ({"results": {"0-0": {"tokens": 64, "loss": 3.5}}}, "lacks kl"),
        ({"surprise": 1}, "does not know surprise"),
    ],
)
def test_the_record_of_a_race_has_a_schema(
    change: dict[str, Any], named: str, tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "race.json"
    write_race(path, tiny_folder)
    record = {**json.loads(path.read_text()), **change}
    del record["checksum"]
    path.write_text(json.dumps(checked_record(record)))
    with pytest.raises(MinipuzzleError, match=named):
        RaceRecord(path, [tiny_folder], RACE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_parameters": -5}, "num_parameters is -5"),
        ({"num_parameters": 2.5}, "no int"),
        ({"predicted_loss": float("inf")}, "predicted_loss"),
        ({"memory_terms": [{"name": "weights"}]}, "lacks num_bytes"),
        ({"deployment": {"context_tokens": 5}}, "deployment"),
        ({"limits": {"memory": "much"}}, "limits.memory"),
        ({"beauty": 1}, "does not know beauty"),
    ],
)
def test_figures_of_a_plan_have_a_schema(change: dict[str, Any], named: str, tiny_folder: Path, tmp_path: Path) -> None:
    record = json.loads(plan_of(tiny_folder).to_json())
    del record["checksum"]
    record["figures"] |= change
    (tmp_path / "plan.json").write_text(json.dumps(record))
    with pytest.raises(MinipuzzleError, match=named):
        read_plan(tmp_path / "plan.json")


def test_damaged_lines_of_metrics_are_left_out_aloud(tmp_path: Path) -> None:
    append_metrics(tmp_path, STEP)
    path = tmp_path / METRICS_FILE
    line = path.read_bytes()
    bad = (b"\xff\xfe\n", b"[1]\n", b'{"step": 1}\n', line.replace(b"2.0", b'"2"'), b"[" * 9999 + b"\n")
    path.write_bytes(line + b"".join(bad) + line.replace(b'"step": 1', b'"step": 2') + line[:20])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    with pytest.warns(MinipuzzleWarning, match="5 lines are damaged"):
        forget_metrics_after(tmp_path, 1)
    assert path.read_bytes() == line


def test_scores_and_plans_of_other_weights_are_not_taken_in_silence(tiny_folder: Path, tmp_path: Path) -> None:
    other, scores, plan = write_tiny_checkpoint(tmp_path / "other", seed=1), tmp_path / "s.safetensors", tmp_path / "p"
    write_scores(scores_of(tiny_folder), scores)
    write_plan(plan, tiny_folder)
    searched = run_cli("search", other, "--scores", scores, "--keep", "mlp=1")
    assert searched.exit_code == 1 and "the scores belong to a model with fingerprint" in searched.output
    assert run_cli("search", other / "config.json", "--scores", scores, "--keep", "mlp=1").exit_code == 0
    noted = run_cli("prune", other, "--plan", plan, "-o", tmp_path / "noted", "--no-compensate")
    assert noted.exit_code == 0 and "scores of other weights" in noted.stderr
    own = run_cli("prune", tiny_folder, "--plan", plan, "-o", tmp_path / "own", "--no-compensate")
    assert own.exit_code == 0 and "warning" not in own.stderr


def test_scores_hold_nothing_else_and_tokens_of_the_model(tiny_folder: Path, tmp_path: Path) -> None:
    path, architecture = tmp_path / "s.safetensors", Checkpoint.open(tiny_folder).architecture
    whole = scores_of(tiny_folder)
    write_scores(Scores(layer=whole.layer, token_ids=np.full((1, 4), 9999, np.int32)), path)
    with pytest.raises(MinipuzzleError, match="outside the model's vocabulary"):
        read_scores(path).check_against(architecture)
    write_scores(Scores(layer=whole.layer, token_ids=np.arange(4, dtype=np.int32)), path)
    with pytest.raises(MinipuzzleError, match="no score file has"):
        read_scores(path)
