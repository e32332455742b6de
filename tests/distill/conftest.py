"""The pair of models that most tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import write_tiny_checkpoint


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a student cut from it: its last two layers are gone."""
    root = tmp_path_factory.mktemp("models")
    teacher = write_tiny_checkpoint(root / "teacher")
    student = write_tiny_checkpoint(root / "student", pattern="M-M*-")
    tensors = load_file(teacher / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers.5." not in name and ".layers.6." not in name}
    save_file(kept, student / "model.safetensors", metadata={"format": "pt"})
    return root
