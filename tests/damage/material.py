"""Small whole inputs of every kind, made by the commands themselves: what cases copy and then damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from click.testing import CliRunner

from tests.support.tiny_models import write_family_checkpoint

FAMILIES = ("nemotron_h", "llama", "granitemoehybrid")
LENGTH = 16
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box with jolly gnomes".split()  # noqa: SIM905


def run(*arguments: object) -> None:
    """A command that must succeed."""
    from minipuzzle.commands.cli import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def write_material(folder: Path) -> Path:
    """Models, text, scores, a plan, a cut model, exports, and an interrupted distillation with its teacher cache."""
    folder.mkdir(parents=True)
    text = folder / "text.jsonl"
    lines = [" ".join(WORDS[(start * step) % len(WORDS)] for step in range(1, 40)) for start in range(1, 25)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    for family in FAMILIES:
        write_family_checkpoint(folder / family, family)
    model = folder / "nemotron_h"
    measured = ["--data", text, "--samples", 4, "--sequence-length", LENGTH, "--device", "cpu", "--json"]
    run("score", model, *measured, "-o", folder / "scores.safetensors")
    cut = ["--keep", "mlp=2", "--keep", "mamba=2", "--granularity", 16]
    run("search", model, "--scores", folder / "scores.safetensors", *cut, "-o", folder / "plan.json", "--json")
    run("prune", model, "--plan", folder / "plan.json", "-o", folder / "pruned", "--json")
    for name, options in {"fp8": ["--fp8"], "ct": ["--fp8", "--flavour", "compressed-tensors"]}.items():
        run("export", folder / "pruned", *options, *measured, "-o", folder / name)
    run("export", folder / "pruned", "--bf16", "--device", "cpu", "--json", "-o", folder / "bf16")
    interrupt_distillation(folder)
    return folder


def distill_arguments(folder: Path) -> list[str]:
    """The command whose interrupted run lies in the material; paths are relative to ``folder``."""
    batch = [
        "--sequence-length",
        LENGTH,
        "--batch",
        2,
        "--tokens",
        60 * 2 * LENGTH,
        "--save-every",
        4,
        "--keep-last",
        2,
    ]
    cached = ["--top-k", 8, "--teacher-cache", "cache"]
    command = ["distill", "pruned", "--teacher", "nemotron_h", "--data", "text.jsonl", *batch, *cached]
    return [str(part) for part in [*command, "--device", "cpu", "-o", "out"]]


def interrupt_distillation(folder: Path) -> None:
    """Start the distillation and kill it once two states lie in its folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "minipuzzle", *distill_arguments(folder)]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = folder / "out.partial" / "state"
    while process.poll() is None and len([*state.glob("step-" + "[0-9]" * 8)]) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "out.partial").is_dir(), "the run ended before it could be interrupted"


def copy(material: Path, folder: Path, *names: str) -> None:
    """Some of the material into the folder of a case."""
    for name in names:
        source = material / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copyfile(source, folder / name)
