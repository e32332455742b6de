"""Nothing of a saved state is run or believed: damage is named, and the good state before it is used instead."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.engine import EngineSettings
from distill.states.stored import STATE_FOLDER, DamagedStateError, step_folder, weight_reader
from minipuzzle.files.digests import DIGESTS_FILE, sha256_of
from tests.support.distilling import SETTINGS, assert_same_tensors, run

TWO_KEPT = EngineSettings(keep_last=2)


def interrupted(models: Path, folder: Path) -> Path:
    """The folder of a run that crashed after step 6, with the states of steps 3 and 6."""
    with pytest.raises(RuntimeError, match="crash"):
        run(models, folder, stop_after=7, engine=TWO_KEPT)
    assert sorted(path.name for path in (folder / STATE_FOLDER).iterdir()) == ["step-00000003", "step-00000006"]
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def rewrite(state: Path, name: str, content: bytes) -> None:
    """As someone would who knows of the digests."""
    (state / name).write_bytes(content)
    digests = json.loads((state / DIGESTS_FILE).read_text())
    (state / DIGESTS_FILE).write_text(json.dumps({**digests, name: sha256_of(state / name)}))


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "progress.json", DIGESTS_FILE])
def test_a_flipped_bit_is_named_and_the_state_before_gives_the_same_end(
    models: Path, tmp_path: Path, file: str
) -> None:
    wanted, _ = run(models, tmp_path / "whole")
    folder, notes = interrupted(models, tmp_path / "damaged"), list[str]()
    flip_a_bit(step_folder(folder / STATE_FOLDER, 6) / file)
    found, progress = run(models, folder, engine=TWO_KEPT, on_note=notes.append)
    assert_same_tensors(found.state_dict(), wanted.state_dict())
    assert progress.step == 8
    (note,) = notes
    assert "step-00000006" in note and "going on from step 3" in note
    assert file in note or file == DIGESTS_FILE


def test_without_a_good_state_a_run_stops_and_leaves_all_as_it_was(models: Path, tmp_path: Path) -> None:
    folder = interrupted(models, tmp_path)
    for step in (3, 6):
        flip_a_bit(step_folder(folder / STATE_FOLDER, step) / "__0_0.distcp")
    with pytest.raises(DamagedStateError, match=r"step-00000006.*__0_0.distcp is not as it was written"):
        run(models, folder)
    assert len(list((folder / STATE_FOLDER).iterdir())) == 2
    with pytest.raises(DamagedStateError, match="not as it was written"):
        weight_reader(folder / STATE_FOLDER, 6)


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def test_a_table_of_contents_that_would_run_something_is_refused(models: Path, tmp_path: Path) -> None:
    folder, canary = interrupted(models, tmp_path / "run"), tmp_path / "canary"
    state = step_folder(folder / STATE_FOLDER, 6)
    rewrite(state, ".metadata", pickle.dumps(Evil(canary)))
    for read in (lambda: weight_reader(folder / STATE_FOLDER, 6), lambda: run(models, folder)):
        rewrite(step_folder(folder / STATE_FOLDER, 3), ".metadata", pickle.dumps(Evil(canary)))
        with pytest.raises(DamagedStateError, match="it asks for"):
            read()
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": 5}, "of step 5"),
        ({"step": "6"}, "step is '6', no int"),
        ({"best_step": -1}, "the best after -1"),
        ({"best_step": 7}, "the best after 7"),
        ({"skipped_steps": True}, "skipped_steps is 'True'"),
        ({"recent_losses": [1.0, float("nan")]}, "recent_losses"),
        ({"train_seconds": -5}, "negative"),
        ({"surprise": 1}, "does not know surprise"),
    ],
)
def test_progress_that_cannot_be_is_refused_with_its_field(
    models: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    folder = tmp_path
    with pytest.raises(RuntimeError, match="crash"):
        run(models, folder, replace(SETTINGS, save_every=6), stop_after=7)
    state = step_folder(folder / STATE_FOLDER, 6)
    progress = json.loads((state / "progress.json").read_text())
    rewrite(state, "progress.json", json.dumps({**progress, **change}).encode())
    with pytest.raises(DamagedStateError, match=named):
        run(models, folder)
