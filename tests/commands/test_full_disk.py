"""A disk that is full ends a command with a message and its code; the same command then finishes, inputs untouched."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minipuzzle.files.checkpoint import Checkpoint
from tests.support.cli import run_cli

# Of a file: nothing fits, or the record of what was asked, or config.json, or the tokenizer, but not the weights.
FULL_AFTER_BYTES = {"score": (0, 300, 3_000), "prune": (0, 300, 3_000, 30_000), "export": (0, 300, 3_000, 30_000)}


@contextmanager
def disk_full_after(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond a size while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", ["score", "prune", "export"])
def test_a_full_disk_is_said_and_the_same_command_finishes(
    tiny_folder: Path, text_file: Path, tmp_path: Path, command: str
) -> None:
    data = ("--data", text_file, "--samples", "2", "--sequence-length", "32")
    out = tmp_path / ("out.safetensors" if command == "score" else "out")
    own = {"score": data, "prune": (*data, "--keep", "mlp=1"), "export": ("--bf16",)}[command]
    before = Checkpoint.open(tiny_folder).fingerprint
    for num_bytes in FULL_AFTER_BYTES[command]:
        with disk_full_after(num_bytes):
            result = run_cli(command, tiny_folder, *own, "-o", out)
        assert result.exit_code == 1, result.output
        assert "error:" in result.stderr and "Traceback" not in result.stderr
        assert not out.exists() and Checkpoint.open(tiny_folder).fingerprint == before
    result = run_cli(command, tiny_folder, *own, "-o", out)
    assert result.exit_code == 0, result.output
    assert out.exists()
