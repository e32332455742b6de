"""Outputs that would destroy something, and options that make no sense."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.damage.material import LENGTH, copy
from tests.damage.runner import DONE, EITHER, REFUSED, Case
from tests.damage.ways import at, folder_with

MEASURED = ["--data", "text.jsonl", "--samples", "2", "--sequence-length", str(LENGTH), "--device", "cpu"]
COMMANDS = {
    "score": ["score", "nemotron_h", *MEASURED],
    "search": [
        "search",
        "nemotron_h/config.json",
        "--scores",
        "scores.safetensors",
        "--keep",
        "mlp=2",
        "--granularity",
        "16",
    ],
    "prune": ["prune", "nemotron_h", "--plan", "plan.json"],
    "export": ["export", "pruned", "--bf16", "--device", "cpu"],
    "distill": [
        *("distill", "pruned", "--teacher", "nemotron_h", "--data", "text.jsonl", "--sequence-length", str(LENGTH)),
        *("--batch", "2", "--tokens", "64", "--device", "cpu"),
    ],
}
FILES = ("score", "search")  # commands that write one file


def _command(material: Path, name: str, make: Callable[[Path], object], *options: str) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        copy(material, folder, "nemotron_h", "pruned", "scores.safetensors", "plan.json", "text.jsonl")
        make(folder)
        return [*COMMANDS[name], *options]

    return prepare


def _target_cases(material: Path) -> Iterator[Case]:
    def nothing(_folder: Path) -> None:
        pass

    inputs = [
        *("nemotron_h/model.safetensors", "nemotron_h/config.json", "nemotron_h/tokenizer.json", "text.jsonl"),
        *("scores.safetensors", "plan.json", "nemotron_h", "pruned", "nemotron_h/new", "pruned/new", ".", "..", "/"),
    ]
    for command in COMMANDS:
        for target in inputs:
            yield Case(
                name=f"target/{command}-{target.replace('/', '-')}",
                prepare=_command(material, command, nothing, "-o", target),
                may_write=("nowhere",),
            )
        makes: dict[str, Callable[[Path], object]] = {
            "file-of-other": lambda p: p.write_text("precious"),
            "folder-of-other": folder_with({"precious": "x"}),
            "fifo": os.mkfifo,
            "link-to-input": lambda p: p.symlink_to("text.jsonl"),
            "link-dangling": lambda p: p.symlink_to("nowhere"),
            "partial-of-other": lambda p: folder_with({"precious": "x"})(Path(f"{p}.partial")),
            "partial-file-of-other": lambda p: Path(f"{p}.partial").write_text("precious"),
        }
        for name, make in makes.items():
            # Single files are written under another name, so a file beside the target is in nobody's way.
            is_beside = name.startswith("partial") and command in FILES
            yield Case(
                name=f"target/{command}-{name}",
                prepare=_command(material, command, at("target", make), "-o", "target"),
                expected=DONE if is_beside else REFUSED,
                may_write=("target",) if is_beside else ("nowhere",),
            )
        yield Case(
            name=f"target/{command}-parent-is-file",
            prepare=_command(material, command, nothing, "-o", "text.jsonl/out"),
            may_write=("nowhere",),
        )
        yield Case(
            name=f"target/{command}-nul",
            prepare=_command(material, command, nothing, "-o", "a\0b"),
            may_write=("nowhere",),
        )
        yield Case(
            name=f"target/{command}-long",
            prepare=_command(material, command, nothing, "-o", "x" * 300),
            may_write=("nowhere",),
        )
    for target in ("nemotron_h/model.safetensors", "text.jsonl", "nemotron_h/config.json", "a.unknown"):
        yield Case(
            name=f"target/plot-{target.replace('/', '-')}",
            prepare=_command(material, "score", nothing, "-o", "out.safetensors", "--plot", target),
        )


def _option_cases(material: Path) -> Iterator[Case]:
    options: dict[str, dict[str, tuple[list[str], str]]] = {
        "score": {
            "samples-zero": (["--samples", "0"], REFUSED),
            "samples-negative": (["--samples", "-3"], REFUSED),
            "samples-beyond": (["--samples", "999999"], REFUSED),
            "length-one": (["--sequence-length", "1"], REFUSED),
            "length-huge": (["--sequence-length", "99999999999"], REFUSED),
            "device-unknown": (["--device", "abacus"], REFUSED),
            "device-missing": (["--device", "cuda"], REFUSED),
            "memory-zero": (["--device-memory", "0GiB"], REFUSED),
            "memory-tiny": (["--device-memory", "1KiB"], REFUSED),
            "memory-text": (["--device-memory", "lots"], REFUSED),
            "layers-beyond": (["--layers", "99"], REFUSED),
            "layers-text": (["--layers", "all of them"], REFUSED),
            "layers-reversed": (["--layers", "5-2"], REFUSED),
            "variants-unknown": (["--variants", "colour=50%"], REFUSED),
            "variants-beyond": (["--variants", "ffn=500%"], REFUSED),
            "variants-zero": (["--variants", "ffn=0%"], REFUSED),
            "variants-text": (["--variants", "ffn=narrow"], REFUSED),
            "iterative-beyond": (["--iterative", "99"], REFUSED),
            "dtype": (["--dtype", "int8"], REFUSED),
            "seed-text": (["--seed", "x"], REFUSED),
            "seed-negative": (["--seed", "-1"], EITHER),
        },
        "search": {
            "memory-text": (["--memory", "much"], REFUSED),
            "memory-negative": (["--memory", "-1GiB"], REFUSED),
            "memory-zero": (["--memory", "0%"], REFUSED),
            "memory-nan": (["--memory", "nan%"], REFUSED),
            "memory-infinite": (["--memory", "infGiB"], REFUSED),
            "params-text": (["--params", "few"], REFUSED),
            "params-negative": (["--params", "-5"], REFUSED),
            "params-exponent": (["--params", "7e9"], EITHER),
            "keep-beyond": (["--keep", "mamba=99"], REFUSED),
            "keep-unknown": (["--keep", "colour=1"], REFUSED),
            "keep-negative": (["--keep", "mamba=-1"], REFUSED),
            "keep-malformed": (["--keep", "mamba"], REFUSED),
            "width-unknown": (["--width", "colour=1"], REFUSED),
            "width-beyond": (["--width", "ffn=9999"], REFUSED),
            "width-zero": (["--width", "ffn=0"], REFUSED),
            "widths-malformed": (["--widths", "ffn=1:2"], REFUSED),
            "widths-reversed": (["--widths", "ffn=100%:50%:16"], REFUSED),
            "layers-beyond": (["--keep-layers", "99"], REFUSED),
            "min-above-max": (["--min", "mamba=2", "--max", "mamba=1"], REFUSED),
            "metric": (["--metric", "beauty"], REFUSED),
            "layout": (["--layout", "spiral"], REFUSED),
            "sweep-malformed": (["--sweep", "1:2"], REFUSED),
            "sweep-endless": (["--sweep", "1%:100%:0%"], REFUSED),
            "sweep-long": (["--sweep", "1KiB:100GiB:1KiB"], REFUSED),
            "context-text": (["--context", "long"], REFUSED),
            "context-negative": (["--context", "-1"], REFUSED),
            "batch-zero": (["--batch", "0"], REFUSED),
            "throughput-without-timings": (["--throughput", "100"], REFUSED),
            "granularity-zero": (["--granularity", "0"], REFUSED),
        },
        "export": {
            "two-formats": (["--fp8", "--data", "text.jsonl"], REFUSED),
            "flavour": (["--flavour", "vanilla"], REFUSED),
            "recipe": (["--recipe", "cake"], REFUSED),
            "shard-zero": (["--max-shard-size", "0GB"], REFUSED),
            "shard-text": (["--max-shard-size", "big"], REFUSED),
            "quality-missing": (["--quality", "nowhere.json"], REFUSED),
            "quality-is-plan": (["--quality", "plan.json"], REFUSED),
        },
        "distill": {
            "tokens-zero": (["--tokens", "0"], REFUSED),
            "tokens-negative": (["--tokens", "-5"], REFUSED),
            "rate-zero": (["--learning-rate", "0"], REFUSED),
            "rate-negative": (["--learning-rate", "-1"], REFUSED),
            "rate-nan": (["--learning-rate", "nan"], REFUSED),
            "rate-infinite": (["--learning-rate", "inf"], REFUSED),
            "rate-diverges": (["--learning-rate", "1e10"], REFUSED),
            "temperature-zero": (["--temperature", "0"], REFUSED),
            "temperature-nan": (["--temperature", "nan"], REFUSED),
            "form": (["--loss", "beauty"], REFUSED),
            "batch-zero": (["--batch", "0"], REFUSED),
            "warmup-beyond": (["--warmup", "2"], REFUSED),
            "teacher-is-text": (["--teacher", "text.jsonl"], REFUSED),
            "teacher-missing": (["--teacher", "nowhere"], REFUSED),
            "length-beyond-data": (["--sequence-length", "99999"], REFUSED),
        },
    }
    for command, by_name in options.items():
        for name, (arguments, expected) in by_name.items():
            out = "out.safetensors" if command == "score" else "out.json" if command == "search" else "out"
            yield Case(
                name=f"option/{command}-{name}",
                prepare=_command(material, command, lambda folder: None, *arguments, "-o", out),
                expected=expected,
            )
    for command in COMMANDS:
        out = "out.safetensors" if command == "score" else "out.json" if command == "search" else "out"
        yield Case(
            name=f"option/{command}-none",
            prepare=_command(material, command, lambda folder: None, "-o", out),
            expected=DONE,
        )


def cases(material: Path) -> Iterator[Case]:
    """All cases of this file."""
    yield from _target_cases(material)
    yield from _option_cases(material)
