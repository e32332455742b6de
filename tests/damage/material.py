"""Small whole inputs of every kind, made by the commands themselves: what cases copy and then damage."""

from __future__ import annotations

import _thread
import json
import os
import shutil
import threading
from pathlib import Path

from click.testing import CliRunner

from minipuzzle.errors import ExitCode
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
        run("export", folder / "pruned", *options, *measured, "--no-verify", "-o", folder / name)
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
    """Start the distillation, and interrupt it once two states lie in its folder."""
    from minipuzzle.commands.cli import main

    states, is_over = folder / "out.partial" / "state", threading.Event()

    def interrupt() -> None:
        while len([*states.glob("step-" + "[0-9]" * 8)]) < 2:
            if is_over.wait(0.005):
                return
        _thread.interrupt_main()

    watcher, place = threading.Thread(target=interrupt), Path.cwd()
    os.chdir(folder)
    watcher.start()
    try:
        result = CliRunner().invoke(main, distill_arguments(folder))
    finally:
        os.chdir(place)
        is_over.set()
        watcher.join()
    assert result.exit_code == ExitCode.INTERRUPTED, result.output
    assert (folder / "out.partial").is_dir()


def copy(material: Path, folder: Path, *names: str) -> None:
    """Some of the material into the folder of a case."""
    for name in names:
        source = material / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copyfile(source, folder / name)
