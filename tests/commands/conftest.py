"""What tests of several commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.files.outputs import PROVENANCE_FILE
from tests.support.tiny_models import write_tiny_checkpoint


@pytest.fixture
def student(tmp_path: Path, tiny_folder: Path) -> Path:
    """A smaller model that remembers its teacher, stored in bfloat16 as most models are."""
    folder = write_tiny_checkpoint(tmp_path / "student", pattern="M-M*-", dtype="bfloat16")
    teacher = Checkpoint.open(tiny_folder)
    record = {"command": "prune", "teacher": str(tiny_folder), "teacher_fingerprint": teacher.fingerprint}
    write_json(folder / PROVENANCE_FILE, record)
    return folder
