"""Guarantee: what transformers saves, this reads, measures, cuts and exports, and transformers reads that back.

Logits are equal on both sides, in every family; docs/round_trips.md says no more and no less.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minipuzzle.files.checkpoint import Checkpoint
from tests.support.foreign_exports import foreign_row
from tests.support.round_trips import PAGE, difference, round_trip, row
from tests.support.tiny_models import EVERY_CONFIG, write_family_checkpoint


@pytest.mark.parametrize("name", EVERY_CONFIG)
def test_a_model_goes_from_transformers_to_us_and_back(tmp_path: Path, name: str) -> None:
    assert row(round_trip(name, tmp_path)) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("llama", "nemotron_h", "granitemoehybrid") else pytest.mark.slow)
        for name in EVERY_CONFIG
    ],
)
def test_quantised_exports_of_other_programs_are_read(tmp_path: Path, name: str) -> None:
    assert row(foreign_row(name, tmp_path)) in PAGE.read_text(encoding="utf-8")


def test_a_snapshot_of_links_as_the_hub_caches_it_is_read(tmp_path: Path) -> None:
    folder = write_family_checkpoint(tmp_path / "model", "llama")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"blob{number}", snapshot))
    Checkpoint.open(snapshot).require_plain_weights()
    assert difference(snapshot) == 0
