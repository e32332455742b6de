"""Guarantee: a long command killed with SIGKILL at random moments, again and again, loses nothing of the user's; the
same command then finishes, with the result of a run that was left alone. Of two at once the second is refused.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minipuzzle.files.checkpoint import Checkpoint
from tests.damage.runner import fingerprints
from tests.support.cli import run_cli
from tests.support.kills import run_command, start, stop_when

KILLS = 20
COMMANDS = ("score", "prune", "distill", "export")


def arguments_of(command: str, model: Path, text: Path, out: Path) -> list[str]:
    """A run of some seconds, which keeps what it has done on its way."""
    measured = ("--data", text, "--sequence-length", 32, "--samples", 12)
    trained = ("--teacher", model, "--data", text, "--sequence-length", 32, "--batch", 2, "--tokens", 40 * 64)
    own: dict[str, tuple[object, ...]] = {
        "score": (*measured, "--iterative", 3),
        "prune": (*measured, "--memory", "85%", "--context", 64, "--candidates", 3, "--granularity", 16),
        "distill": (*trained, "--save-every", 4),
        "export": (*measured, "--nvfp4"),
    }
    return [str(part) for part in (command, model, *own[command], "--device", "cpu", "-o", out)]


def weights_in(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = [out] if out.is_file() else sorted(out.rglob("*.safetensors"))
    return {file.name: load_file(file) for file in files}


def assert_equal(found: Path, wanted: Path) -> None:
    ours, theirs = weights_in(found), weights_in(wanted)
    assert [len(tensors) for tensors in ours.values()] == [len(tensors) for tensors in theirs.values()]
    for tensors, others in zip(ours.values(), theirs.values(), strict=True):
        for name, tensor in tensors.items():
            assert torch.equal(tensor.flatten().view(torch.uint8), others[name].flatten().view(torch.uint8)), name
    for file in ("config.json", "plan.json", "digests.json"):
        if (wanted / file).is_file():
            assert (found / file).read_bytes() == (wanted / file).read_bytes(), file


@pytest.mark.parametrize(
    ("command", "num_kills"),
    [
        ("score", 2),
        *(pytest.param(command, KILLS, marks=pytest.mark.slow) for command in COMMANDS),
    ],
)
def test_kills_at_random_moments_lose_nothing(
    tiny_folder: Path, text_file: Path, tmp_path: Path, command: str, num_kills: int
) -> None:
    ending = ".safetensors" if command == "score" else ""
    whole, out = tmp_path / f"whole{ending}", tmp_path / "killed" / f"out{ending}"
    out.parent.mkdir()
    before = fingerprints(tiny_folder, ()), text_file.read_bytes()
    began = time.monotonic()
    process = start(run_command, *arguments_of(command, tiny_folder, text_file, whole))
    process.join()
    assert process.exitcode == 0
    duration_seconds = time.monotonic() - began
    dice, arguments, killed = random.Random(command), arguments_of(command, tiny_folder, text_file, out), 0
    for _ in range(num_kills):
        process = start(run_command, *arguments)
        delay_seconds = dice.uniform(0, duration_seconds)
        killed += stop_when(process, lambda: True, delay_seconds=delay_seconds)
        assert (fingerprints(tiny_folder, ()), text_file.read_bytes()) == before
        if out.exists():  # done before it could be killed, and whole
            assert_equal(out, whole)
            out.rename(out.with_name(f"done-{killed}{ending}"))
    assert killed > num_kills // 3
    process = start(run_command, *arguments)
    process.join()
    assert process.exitcode == 0
    assert_equal(out, whole)
    left = {path.name for path in out.parent.iterdir() if not path.name.startswith("done-")}
    assert left == {out.name}


@pytest.mark.parametrize("command", ["score", pytest.param("distill", marks=pytest.mark.slow)])
def test_the_second_of_two_processes_on_one_output_is_refused(
    tiny_folder: Path, text_file: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / ("out.safetensors" if command == "score" else "out")
    arguments = arguments_of(command, tiny_folder, text_file, out)
    first = start(run_command, *arguments)
    while not [*tmp_path.glob(".*.writer"), *tmp_path.glob("out.partial/.writer")] and first.is_alive():
        time.sleep(0.001)
    assert first.is_alive(), "it ended before a second could be started"
    second = run_cli(*arguments)
    assert second.exit_code == 1 and f"process {first.pid} is writing" in second.output, second.output
    first.join()
    assert first.exitcode == 0
    assert Checkpoint.open(out).architecture.layers if out.is_dir() else weights_in(out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
