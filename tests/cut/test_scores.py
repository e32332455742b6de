"""Guarantee: score files give back what was written, and plans take no scores that do not fit or are missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minipuzzle.architecture.memory import Deployment
from minipuzzle.cut.plan import keep_everything
from minipuzzle.cut.scores import Scores, read_scores, write_scores
from minipuzzle.cut.selection import make_plan
from minipuzzle.errors import MinipuzzleError
from minipuzzle.search.engine import find_candidates
from minipuzzle.search.request import SearchRequest
from tests.support.scores import random_scores, tiny_architecture

PATTERN = "M-M*-MM-*-M-"


def test_a_cut_of_heads_without_measured_energies_is_refused() -> None:
    source = tiny_architecture(PATTERN)
    scores = replace(random_scores(source), energies={})
    with pytest.raises(MinipuzzleError, match="energies"):
        make_plan(source, scores, kept_layers=range(len(PATTERN)), widths={0: {"ssm_head": 2}})


def test_a_plan_that_cuts_nothing_keeps_everything() -> None:
    source = tiny_architecture(PATTERN)
    widths = {1: {"ffn": 64}, 0: {"ssm_head": 4}}
    plan = make_plan(source, random_scores(source), kept_layers=range(len(PATTERN)), widths=widths)
    assert plan == keep_everything(source)


def test_scores_survive_their_file(tmp_path: Path) -> None:
    variants = {"mse.ffn.32": np.arange(len(PATTERN), dtype=np.float64)}
    scores = replace(
        random_scores(tiny_architecture(PATTERN)), metadata={"model_fingerprint": "abc"}, variants=variants
    )
    write_scores(scores, tmp_path / "scores.safetensors")
    found = read_scores(tmp_path / "scores.safetensors")
    assert found.metadata["model_fingerprint"] == "abc"
    assert all(np.array_equal(found.units[name], values) for name, values in scores.units.items())
    assert np.array_equal(found.layer["mse"], scores.layer["mse"])
    assert np.array_equal(found.variants["mse.ffn.32"], variants["mse.ffn.32"])


def test_scores_of_another_model_or_with_nan_are_refused(tmp_path: Path) -> None:
    source = tiny_architecture(PATTERN)
    scores = replace(random_scores(source), metadata={"model_fingerprint": "abc"})
    with pytest.raises(MinipuzzleError, match="abc"):
        scores.check_against(source, "def")
    with pytest.raises(MinipuzzleError, match=r"layer.mse have shape"):
        Scores(layer={"mse": np.ones(3)}).check_against(source)
    with pytest.raises(MinipuzzleError, match="NaN"):
        Scores(layer={"mse": np.full(len(PATTERN), np.nan)}).check_against(source)
    broken = tmp_path / "scores.safetensors"
    broken.write_bytes(b"not a score file")
    with pytest.raises(MinipuzzleError, match="not a score file"):
        read_scores(broken)


def test_plain_json_scores_are_accepted(tmp_path: Path) -> None:
    source = tiny_architecture(PATTERN)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"layer": {"mse": list(range(len(PATTERN)))}}))
    scores = read_scores(path)
    assert not scores.is_measured_here
    request = SearchRequest(keep={"mamba": 2}, width={"ffn": 32})
    (candidate,) = find_candidates(source, scores, request, Deployment())
    assert candidate.architecture.width("ffn") == 32
