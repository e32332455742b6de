"""Scores that cannot be of the model, or hold what no measurement gives, are refused with the name of the score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipuzzle.architecture.timings import read_timings
from minipuzzle.cut.scores import Scores, read_scores
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from tests.support.tiny_models import write_family_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("scores") / "model"
    write_family_checkpoint(folder, "nemotron_h")
    return Checkpoint.open(folder)


def whole(checkpoint: Checkpoint) -> Scores:
    architecture = checkpoint.architecture
    mlp = next(idx for idx, layer in enumerate(architecture.layers) if layer.kind == "mlp")
    return Scores(
        layer={"mse": np.ones(len(architecture.layers)), "delta_loss": -np.ones(len(architecture.layers))},
        units={
            "hidden": np.ones(architecture.hidden, np.float32),
            f"ffn.{mlp}": np.ones(architecture.sizes(mlp)["ffn"], np.float32),
        },
        energies={"hidden.final": np.ones(architecture.hidden, np.float32)},
    )


@pytest.mark.parametrize(
    ("table", "name", "way", "named"),
    [
        ("units", "hidden", lambda a: a[:-1], "unit.hidden have shape"),
        ("units", "hidden", lambda a: np.stack([a, a]), "unit.hidden have shape"),
        ("units", "hidden", lambda a: a > 0, "unit.hidden are bool"),
        ("units", "hidden", lambda a: -a, "unit.hidden are negative"),
        ("energies", "hidden.final", lambda a: a[1:], "energy.hidden.final have shape"),
        ("energies", "ssm.99", lambda a: np.ones(3), "nothing that scores energy.ssm.99"),
        ("units", "colour.0", lambda a: np.ones(3), "nothing that scores unit.colour.0"),
        ("layer", "mse", lambda a: -a, "layer.mse are negative"),
    ],
)
def test_scores_that_no_measurement_gives_are_refused(
    checkpoint: Checkpoint, table: str, name: str, way: Any, named: str
) -> None:
    scores = whole(checkpoint)
    scores.check_against(checkpoint.architecture)
    changed: Any = {table: {**getattr(scores, table), name: way(getattr(scores, table).get(name))}}
    with pytest.raises(MinipuzzleError, match=named):
        replace(scores, **changed).check_against(checkpoint.architecture)


@pytest.mark.parametrize("values", [[True, True], ["a"], 3, [10**400]])
def test_json_scores_are_lists_of_numbers(tmp_path: Path, values: Any) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"layer": {"mse": values}}))
    with pytest.raises(MinipuzzleError, match="numbers"):
        read_scores(path)


@pytest.mark.parametrize(
    ("text", "named"), [("mamba,1e-5\nmamba,2e-5\n", "two times of mamba"), ("mamba," + "1" * 200_000, "cannot read")]
)
def test_times_that_contradict_each_other_or_are_no_fields_are_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "timings.csv"
    path.write_text("kind,step_seconds\n" + text)
    with pytest.raises(MinipuzzleError, match=named):
        read_timings(path)
