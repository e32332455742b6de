"""A disk that is full ends a command with a message and its code; the same command then finishes, inputs untouched.

Files that may not grow stand for it in every run; a real small disk, at ten moments of each command, in the slow tests.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minipuzzle.files.checkpoint import Checkpoint
from tests.support.cli import run_cli

# Of a file: nothing fits, or the record of what was asked, or config.json, or the tokenizer, but not the weights.
FULL_AFTER_BYTES = {
    "score": (0, 300, 3_000),
    "prune": (0, 300, 3_000, 30_000),
    "distill": (0, 3_000, 30_000),
    "export": (0, 300, 3_000, 30_000),
}
MOMENTS = 10
Arguments = Callable[[Path], list[object]]  # of a command, by where it is to write


@contextmanager
def disk_full_after(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond a size while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def arguments_of(command: str, model: Path, text: Path) -> Arguments:
    data = ("--data", text, "--sequence-length", "32")
    trained = ("--teacher", model, "--batch", 2, "--tokens", 256, "--save-every", 1, "--keep-last", 2)
    own: dict[str, tuple[object, ...]] = {
        "score": (*data, "--samples", "2"),
        "prune": (*data, "--samples", "2", "--keep", "mlp=1"),
        "distill": (*data, *trained),
        "export": ("--bf16",),
    }
    return lambda out: [command, model, *own[command], "--device", "cpu", "-o", out]


def assert_refused(arguments: list[object], out: Path) -> None:
    result = run_cli(*arguments)
    assert result.exit_code == 1, result.output
    assert "error:" in result.stderr and "Traceback" not in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("command", FULL_AFTER_BYTES)
def test_a_full_disk_is_said_and_the_same_command_finishes(
    tiny_folder: Path, text_file: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / ("out.safetensors" if command == "score" else "out")
    arguments = arguments_of(command, tiny_folder, text_file)(out)
    before = Checkpoint.open(tiny_folder).fingerprint
    for num_bytes in FULL_AFTER_BYTES[command]:
        with disk_full_after(num_bytes):
            assert_refused(arguments, out)
        assert Checkpoint.open(tiny_folder).fingerprint == before
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.output
    assert out.exists()


@contextmanager
def small_disk(place: Path) -> Iterator[Callable[[int], None]]:
    """A disk at a place; yields a function that makes it of a size. Skips where nothing can be mounted."""

    def mount(options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        return subprocess.run(command, check=False, capture_output=True).returncode

    place.mkdir()
    if shutil.which("mount") is None or mount("size=4k") != 0:
        pytest.skip("nothing can be mounted here")
    try:
        yield lambda num_bytes: pytest.fail("remount") if mount(f"remount,size={max(num_bytes, 4096)}") else None
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", FULL_AFTER_BYTES)
def test_ten_sizes_of_a_real_disk_lose_nothing(
    tiny_folder: Path, text_file: Path, tmp_path: Path, command: str
) -> None:
    name = "out.safetensors" if command == "score" else "out"
    arguments = arguments_of(command, tiny_folder, text_file)
    before, num_full = Checkpoint.open(tiny_folder).fingerprint, 0
    with small_disk(tmp_path / "disk") as resize:
        for moment in range(MOMENTS):
            resize(4096 + 24_000 * moment)
            result = run_cli(*arguments(tmp_path / "disk" / name))
            assert result.exit_code in (0, 1) and "Traceback" not in result.output, result.output
            assert Checkpoint.open(tiny_folder).fingerprint == before
            if result.exit_code == 0:
                break
            num_full += 1
            assert "error:" in result.stderr and not (tmp_path / "disk" / name).exists()
        resize(2**26)
        assert num_full > 2
        if not (tmp_path / "disk" / name).exists():
            result = run_cli(*arguments(tmp_path / "disk" / name))
            assert result.exit_code == 0, result.output
