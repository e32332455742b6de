"""Fingerprints of everything the commands compute, to prove that a change of the code changes no number.

``make golden`` runs score, search, prune, distill and export on the embedded hybrid and on a tiny model of every
family, and writes SHA-256 sums to an ignored file: bits hold on one machine only. ``make golden-check`` repeats that
and names what differs. Everything goes through the command line, so that no change inside the packages touches this.

Usage: python -m tests.golden.make [--check] [NAME ...]
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / ".golden"
EMBEDDED = ROOT / "examples/tiny_hybrid/model"
CALIBRATION = ROOT / "examples/tiny_hybrid/text/calibration.jsonl"
VALIDATION = ROOT / "examples/tiny_hybrid/text/validation.jsonl"
NAMES = (
    *("embedded", "nemotron_h", "nemotron_h-moe", "nemotron", "granitemoehybrid", "granitemoehybrid-nope"),
    *("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"),
)
WITHOUT_MLP = ("nemotron_h-moe",)
# Axes that no default search touches, cut as well.
WIDTHS = {
    "nemotron_h": ("hidden=16", "ssm_head=2", "ssm_head_channel=4", "kv_group=1", "ffn=32"),
    "nemotron_h-moe": ("expert=4", "expert_ffn=16", "shared_ffn=24", "ffn=32"),
    "granitemoehybrid": ("ssm_head=4", "hidden=16"),
    "nemotron": ("hidden=16", "kv_group=1"),
}
NOT_COMPUTED = ("minipuzzle.json", "plan.json", "candidates.json", "digests.json", "tokenizer.json")
WITHOUT_NVFP4 = ("nemotron_h-moe",)  # whose experts are narrower than its blocks
BUDGET = ("--memory", "85%", "--granularity", 16, "--min-ffn", 0.5, "--context", 64)
TINY_LENGTH, EMBEDDED_LENGTH = 24, 128
PLAN_FIELDS = ("kept_layers", "kept_units", "norm_scales", "chosen_units")
SPEED_FIELDS = ("tokens_per_second", "seconds", "step_seconds")

Hashes = dict[str, str]


def sha256(content: bytes) -> str:
    """The first 16 hexadecimal digits: enough to tell files apart, short enough to read."""
    return hashlib.sha256(content).hexdigest()[:16]


def hash_json(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())


def hash_tensors(path: Path) -> str:
    """Names, types, shapes and bytes of all tensors of one safetensors file; its metadata may change."""
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    data = content[8 + header_bytes :]
    digest = hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        begin, end = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode() + data[begin:end])
    return digest.hexdigest()[:16]


def hash_plan(path: Path) -> Hashes:
    """What a plan cuts, and the figures it was chosen by where it holds any."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return {field: hash_json(record.get(field, {})) for field in PLAN_FIELDS}


def hash_folder(folder: Path) -> Hashes:
    """The weights and configuration files of a checkpoint folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found[path.name] = hash_tensors(path)
        elif path.suffix == ".json" and path.name not in NOT_COMPUTED:
            found[path.name] = sha256(path.read_bytes())
    return found


def hash_metrics(path: Path) -> str:
    """All steps of a distillation, without how fast they went."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return hash_json([{k: v for k, v in line.items() if k not in SPEED_FIELDS} for line in lines])


def without_speed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_speed(item) for key, item in value.items() if key not in SPEED_FIELDS}
    return [without_speed(item) for item in value] if isinstance(value, list) else value


def run(*arguments: object) -> str:
    """One command in this process; its standard output."""
    from click.testing import CliRunner

    result = CliRunner().invoke(command_line(), [str(argument) for argument in arguments], catch_exceptions=False)
    if result.exit_code:
        raise SystemExit(f"minipuzzle {' '.join(map(str, arguments))}\n{result.output}")
    return result.stdout


def command_line() -> Any:
    from minipuzzle.commands.cli import main

    return main


def model_folder(name: str) -> Path:
    """The embedded model, or the tiny one of a family; written once, so that a changed fixture changes no number."""
    if name == "embedded":
        return EMBEDDED
    folder = GOLDEN / "models" / name
    from tests.support.tiny_models import write_byte_tokenizer, write_family_checkpoint

    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_family_checkpoint(folder, name)
    write_byte_tokenizer(folder)  # as it is now: older ones did not say that a text begins with <s>
    return folder


def text_file(name: str) -> Path:
    """Real text for the embedded model; a few kilobytes of it suffice where every byte is a token."""
    if name == "embedded":
        return CALIBRATION
    path = GOLDEN / "text.jsonl"
    lines = CALIBRATION.read_text(encoding="utf-8").splitlines()[:12]
    texts = [json.loads(line)["text"][:700] for line in lines]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


class Steps:
    """The steps of one model in order; later ones use what earlier ones wrote."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work = name, work
        self.model, self.text = model_folder(name), text_file(name)
        self.length = EMBEDDED_LENGTH if name == "embedded" else TINY_LENGTH
        self.has_mlp = name not in WITHOUT_MLP
        self.measured = ["--data", self.text, "--samples", 6, "--sequence-length", self.length, "--device", "cpu"]
        self.scores, self.pruned = work / "scores.safetensors", work / "pruned"

    def all(self) -> Iterator[tuple[str, Hashes]]:
        """What each step wrote, by the step's name."""
        yield "score", self.score()
        yield "iterative", self.iterative()
        yield "search", self.search()
        yield "prune", self.prune()
        if self.has_mlp:
            yield "cut per layer", self.cut_by_plan("per_layer")
        yield "distill", self.distill()
        yield "bf16", self.export("--bf16")
        yield "fp8", self.export("--fp8", *self.calibration())
        yield "fp8 ct", self.export("--fp8", "--flavour", "compressed-tensors", *self.calibration())
        if self.name not in WITHOUT_NVFP4:
            yield "nvfp4", self.export("--nvfp4", *self.calibration())
        if self.name in WIDTHS:
            yield "cut widths", self.cut_widths()
        yield "evaluate", self.evaluate()

    def score(self) -> Hashes:
        variants = ["--variants", "ffn=75%,50%"] if self.has_mlp else []
        run("score", self.model, *self.measured, "--channel-samples", 8, *variants, "-o", self.scores)
        return {"tensors": hash_tensors(self.scores)}

    def iterative(self) -> Hashes:
        path = self.work / "iterative.safetensors"
        run("score", self.model, *self.measured, "--iterative", 2, "-o", path)
        return {"tensors": hash_tensors(path)}

    def search(self) -> Hashes:
        common = ["--scores", self.scores, *BUDGET, "--json"]
        path = self.work / "plan.json"
        run("search", self.model, *common, "-o", path)
        hashes = hash_plan(path)
        if self.has_mlp:
            path = self.work / "per_layer.json"
            run("search", self.model, *common, "--layout", "per-layer", "-o", path)
            hashes |= {f"per-layer {field}": value for field, value in hash_plan(path).items()}
        return hashes

    def prune(self) -> Hashes:
        comparing = ["--candidates", 5, "--refine"]
        run("prune", self.model, *BUDGET, *self.measured, *comparing, "-o", self.pruned, "--json")
        return {**hash_plan(self.pruned / "plan.json"), **hash_folder(self.pruned)}

    def cut_by_plan(self, plan: str) -> Hashes:
        out = self.work / f"cut_{plan}"
        run("prune", self.model, "--plan", self.work / f"{plan}.json", "-o", out, "--json")
        return hash_folder(out)

    def cut_widths(self) -> Hashes:
        path = self.work / "widths.json"
        options = [part for width in WIDTHS[self.name] for part in ("--width", width)]
        run("search", self.model, "--scores", self.scores, *options, "--granularity", 8, "-o", path, "--json")
        return {**hash_plan(path), **self.cut_by_plan("widths")}

    def distill(self) -> Hashes:
        out = self.work / "distilled"
        batch = ["--sequence-length", self.length, "--batch", 4, "--tokens", 20 * 4 * self.length]
        training = [*batch, "--data", self.text, "--validation", self.text, "--learning-rate", 1e-3]
        run("distill", self.pruned, *training, "--device", "cpu", "-o", out, "--json")
        return {"metrics": hash_metrics(out / "metrics.jsonl"), **hash_folder(out)}

    def calibration(self) -> list[object]:
        return ["--data", self.text, "--samples", 4, "--sequence-length", self.length]

    def export(self, *options: object) -> Hashes:
        out = self.work / "exported"
        shutil.rmtree(out, ignore_errors=True)
        run("export", self.pruned, *options, "--device", "cpu", "-o", out, "--json")
        if options[:2] == ("--fp8", "--data"):
            shutil.copytree(out, self.work / "fp8")
        return hash_folder(out)

    def evaluate(self) -> Hashes:
        text = ["--data", self.text, "--sequence-length", self.length, "--max-tokens", 600]
        found = run("evaluate", self.work / "fp8", "--against", self.model, *text, "--device", "cpu", "--json")
        return {"quality": hash_json(without_speed(json.loads(found)))}


def hashes_of(name: str) -> Hashes:
    """All hashes of one model, named ``model / step / what``."""
    found: Hashes = {}
    with tempfile.TemporaryDirectory() as folder:
        for step, hashes in Steps(name, Path(folder)).all():
            found |= {f"{name} / {step} / {what}": value for what, value in hashes.items()}
            print(f"{name}: {step}", file=sys.stderr)
    return found


def main(arguments: list[str]) -> int:
    """Write the hashes of some or all models, or compare with those that were written."""
    is_check = "--check" in arguments
    names = [argument for argument in arguments if argument != "--check"] or list(NAMES)
    file = GOLDEN / "hashes.json"
    GOLDEN.mkdir(exist_ok=True)
    known: Hashes = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if is_check and not known:
        print("nothing to compare with: run `make golden` on the commit that is right", file=sys.stderr)
        return 1
    found: Hashes = {}
    for name in names:
        found |= hashes_of(name)
    if not is_check:
        kept = {key: value for key, value in known.items() if key.split(" / ")[0] not in names}
        file.write_text(json.dumps({**kept, **found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{len(found)} hashes written to {file}")
        return 0
    expected = {key for key in known if key.split(" / ")[0] in names and key.split(" / ")[-1] not in NOT_COMPUTED}
    changed = sorted(key for key in expected | found.keys() if known.get(key) != found.get(key))
    for key in changed:
        print(f"changed: {key}")
    print(f"{len(expected) - len(changed)} of {len(expected)} hashes are equal")
    return 1 if changed else 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
