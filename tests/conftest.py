"""Fixtures that many tests share. Everything is built in seconds and nothing is mocked."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

from minipuzzle.files.checkpoint import Checkpoint
from tests.support.tiny_models import write_tiny_checkpoint

# The same few examples in every run: a test that fails, fails for everyone.
hypothesis.settings.register_profile("tests", derandomize=True, max_examples=60, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random seven-layer hybrid with a tokenizer. Tests read it and never write to it."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_checkpoint(tiny_folder: Path) -> Checkpoint:
    """The tiny folder, opened."""
    return Checkpoint.open(tiny_folder)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few kilobytes of English in JSONL."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box"]
    lines = [" ".join(words[(start * step) % len(words)] for step in range(1, 60)) for start in range(1, 30)]
    path.write_text("".join(f'{{"text": "{line}."}}\n' for line in lines), encoding="utf-8")
    return path
