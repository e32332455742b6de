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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / ".golden"
EMBEDDED = ROOT / "examples/tiny_hybrid/model"
CALIBRATION = ROOT / "examples/tiny_hybrid/text/calibration.jsonl"
VALIDATION = ROOT / "examples/tiny_hybrid/text/validation.jsonl"
NAMES = (
    *("embedded", "nemotron_h", "nemotron_h-moe", "nemotron", "granitemoehybrid", "granitemoehybrid-nope"),
    *("llama", "mistral", "qwen2", "qwen3"),
)
WITHOUT_MLP = ("nemotron_h-moe",)
# Axes that no default search touches, cut as well.
WIDTHS = {
    "nemotron_h": ("hidden=16", "ssm_head=2", "ssm_head_channel=4", "kv_group=1", "ffn=32"),
    "nemotron_h-moe": ("expert=4", "expert_ffn=16", "shared_ffn=24", "ffn=32"),
    "granitemoehybrid": ("ssm_head=4", "hidden=16"),
    "nemotron": ("hidden=16", "kv_group=1"),
}
WITHOUT_NVFP4 = ("nemotron_h-moe",)  # whose experts are narrower than its blocks
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
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = hash_tensors(path)
        elif path.suffix == ".json" and path.name not in ("minipuzzle.json", "plan.json", "candidates.json"):
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
    from minipuzzle.cli import main

    return main


def model_folder(name: str) -> Path:
    """The embedded model, or the tiny one of a family; written once, so that a changed fixture changes no number."""
    if name == "embedded":
        return EMBEDDED
    folder = GOLDEN / "models" / name
    if not (folder / "config.json").is_file():
        from tests.tiny_models import write_family_checkpoint

        shutil.rmtree(folder, ignore_errors=True)
        write_family_checkpoint(folder, name)
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


def steps_of(name: str, work: Path) -> Iterator[tuple[str, Callable[[], Hashes]]]:
    """Each step by its name; later ones use what earlier ones wrote."""
    model, text = model_folder(name), text_file(name)
    length = EMBEDDED_LENGTH if name == "embedded" else TINY_LENGTH
    variants = [] if name in WITHOUT_MLP else ["--variants", "ffn=75%,50%"]
    measured = ["--data", text, "--samples", 6, "--sequence-length", length, "--device", "cpu"]
    scores, pruned = work / "scores.safetensors", work / "pruned"

    def score() -> Hashes:
        run("score", model, *measured, "--channel-samples", 8, *variants, "-o", scores)
        return {"tensors": hash_tensors(scores)}

    def iterative() -> Hashes:
        path = work / "iterative.safetensors"
        run("score", model, *measured, "--iterative", 2, "-o", path)
        return {"tensors": hash_tensors(path)}

    def search() -> Hashes:
        path = work / "plan.json"
        limits = ["--scores", scores, "--granularity", 16, "--min-ffn", 0.5, "--context", 64]
        limits += ["--memory", "85%"]
        found = run("search", model, *limits, "-o", path, "--json")
        assert found
        hashes = hash_plan(path)
        if variants:
            run("search", model, *limits, "--layout", "per-layer", "-o", work / "per_layer.json", "--json")
            hashes |= {f"per-layer {k}": v for k, v in hash_plan(work / "per_layer.json").items()}
        return hashes

    def cut_widths() -> Hashes:
        path, out = work / "widths.json", work / "cut_widths"
        options = [part for width in WIDTHS[name] for part in ("--width", width)]
        run("search", model, "--scores", scores, *options, "--granularity", 8, "-o", path, "--json")
        run("prune", model, "--plan", path, "-o", out, "--json")
        return {**hash_plan(out / "plan.json"), **hash_folder(out)}

    def prune() -> Hashes:
        run(
            *("prune", model, "--memory", "85%", *measured, "--granularity", 16, "--min-ffn", 0.5, "--context", 64),
            *("--candidates", 5, "--refine", "-o", pruned, "--json"),
        )
        return {**hash_plan(pruned / "plan.json"), **hash_folder(pruned)}

    def cut_per_layer() -> Hashes:
        if not variants:
            return {}
        run("prune", model, "--plan", work / "per_layer.json", "-o", work / "pruned_per_layer", "--json")
        return hash_folder(work / "pruned_per_layer")

    def distill() -> Hashes:
        tokens = 20 * 4 * length
        run(
            *("distill", pruned, "--data", text, "--tokens", tokens, "--sequence-length", length, "--batch", 4),
            *("--validation", text, "--learning-rate", 1e-3, "--device", "cpu", "-o", work / "distilled", "--json"),
        )
        return {"metrics": hash_metrics(work / "distilled/metrics.jsonl"), **hash_folder(work / "distilled")}

    def export(*options: str) -> Callable[[], Hashes]:
        def exported() -> Hashes:
            out = work / "-".join(["export", *(option.strip("-") for option in options)])
            calibration = [] if options[0] == "--bf16" else ["--data", text, "--samples", 4]
            calibration += [] if options[0] == "--bf16" else ["--sequence-length", length]
            run("export", pruned, *options, *calibration, "--device", "cpu", "-o", out, "--json")
            return hash_folder(out)

        return exported

    def evaluate() -> Hashes:
        folder = work / "export-fp8"
        found = run(
            *("evaluate", folder, "--against", model, "--data", text, "--sequence-length", length),
            *("--max-tokens", 600, "--device", "cpu", "--json"),
        )
        return {"quality": hash_json(without_speed(json.loads(found)))}

    yield from {"score": score, "iterative": iterative, "search": search, "prune": prune}.items()
    yield from {"cut per layer": cut_per_layer, "distill": distill, "bf16": export("--bf16")}.items()
    yield from {"fp8": export("--fp8"), "fp8 ct": export("--fp8", "--flavour", "compressed-tensors")}.items()
    if name not in WITHOUT_NVFP4:
        yield "nvfp4", export("--nvfp4")
    if name in WIDTHS:
        yield "cut widths", cut_widths
    yield "evaluate", evaluate


def hashes_of(name: str) -> Hashes:
    """All hashes of one model, named ``model / step / what``."""
    found: Hashes = {}
    with tempfile.TemporaryDirectory() as folder:
        for step, act in steps_of(name, Path(folder)):
            found |= {f"{name} / {step} / {what}": value for what, value in act().items()}
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
    expected = {key for key in known if key.split(" / ")[0] in names}
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
