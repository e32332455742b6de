"""What must come out the same on every machine: sizes, plans, codes and scales of given numbers, and rounded losses.

Measured scores differ in their last bits between machines, so that plans are made from given ones: whole numbers in no
order. Codes and scales of given weights involve no function that is not rounded the same everywhere. Losses are
compared with a tolerance (``test_golden.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minipuzzle.files.digests import CHECKSUM
from tests.support.cli import run_cli, run_json
from tests.support.tiny_models import EVERY_CONFIG, change_tensors, write_family_checkpoint

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "examples/tiny_hybrid/model"
TEXT = ROOT / "examples/tiny_hybrid/text/calibration.jsonl"
NAMES = ("embedded", *EVERY_CONFIG)
DEPLOYMENTS: Mapping[str, tuple[object, ...]] = {
    "as it is": (),
    "long": ("--context", "1M", "--batch", 3),
    "small": ("--weights", "nvfp4", "--kv-cache", "fp8", "--embeddings", "fp8", "--ssm-state", "fp32"),
}
LAYOUTS = ("uniform", "per-layer")
EXPORTS: Mapping[str, tuple[str, ...]] = {
    "fp8": ("--fp8",),
    "fp8 compressed-tensors": ("--fp8", "--flavour", "compressed-tensors", "--activations", "static"),
    "nvfp4": ("--nvfp4",),
}
DISTILLED = ("embedded", "granitemoehybrid", "llama", "nemotron_h")
Facts = dict[str, Any]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def given_numbers(num: int, start: int = 0) -> torch.Tensor:
    """Whole numbers below 65521 in no order, no two of them equal within that many."""
    return (torch.arange(start, start + num, dtype=torch.int64) * 40503 + 7919) % 65521


def given_weights(tensors: dict[str, torch.Tensor]) -> None:
    """Replace weights by multiples of 2**-15 on both sides of zero."""
    for number, name in enumerate(sorted(tensors)):
        flat = given_numbers(tensors[name].numel(), start=number * 1009) - 32760
        tensors[name] = (flat / 2.0**15).view(tensors[name].shape).to(tensors[name].dtype)


def give_scores(measured: Path, path: Path) -> Path:
    """A score file with given numbers in all places where another has measured ones."""
    with safe_open(measured, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != CHECKSUM}
    tensors = load_file(measured)
    for number, name in enumerate(sorted(tensors.keys() - {"token_ids"})):
        tensor = tensors[name]
        tensors[name] = (given_numbers(tensor.numel(), start=number * 1009) + 1).view(tensor.shape).to(tensor.dtype)
    save_file(tensors, path, metadata=metadata)
    return path


def rounded(values: Any) -> list[float]:
    return [float(f"{float(value):.6g}") for value in values]


def plan_facts(path: Path) -> Facts:
    """What a plan keeps; of units only their number and a hash, for there may be hundreds."""
    plan = json.loads(path.read_text(encoding="utf-8"))
    units = {
        f"{field} {axis} {layer}": f"{len(kept)} {sha256(json.dumps(kept).encode())}"
        for field in ("kept_units", "chosen_units")
        for axis, by_layer in plan.get(field, {}).items()
        for layer, kept in by_layer.items()
    }
    scales = {name: rounded(factors) for name, factors in plan["norm_scales"].items()}
    return {"kept_layers": plan["kept_layers"], "units": units, "norm_scales": scales}


def size_facts(model: Path) -> Facts:
    """Parameters, and bytes of every term of memory."""
    found = {name: run_json("inspect", model, *options) for name, options in DEPLOYMENTS.items()}
    parameters = {key: found["long"][key] for key in ("num_parameters", "num_active_parameters", "parameters")}
    terms = {n: {term["name"]: term["num_bytes"] for term in f["memory_terms"]} for n, f in found.items()}
    return {**parameters, "memory": terms}


def code_facts(source: Path, options: tuple[str, ...], text: Path, out: Path) -> Facts:
    """Hashes of the codes and the scales of all weights; scales of inputs come from what was measured."""
    measuring = ("--data", text, "--samples", 2, "--sequence-length", 16, "--device", "cpu")
    result = run_cli("export", source, *options, *measuring, "-o", out)
    assert result.exit_code == 0, result.output
    tensors = load_file(out / "model.safetensors")
    codes, scales = hashlib.sha256(), hashlib.sha256()
    for name in sorted(tensors):
        module = name.rpartition(".")[0]
        if name == f"{module}.weight" and f"{module}.weight_scale" in tensors:
            codes.update(tensors[name].view(torch.uint8).numpy().tobytes())
        elif ".weight_scale" in name:
            scales.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return {"codes": codes.hexdigest()[:16], "scales": scales.hexdigest()[:16]}


def loss_facts(student: Path, teacher: Path, text: Path, length: int, out: Path) -> Facts:
    """Losses of three steps of distillation."""
    tokens = 3 * 2 * length
    batch = ("--sequence-length", length, "--batch", 2, "--tokens", tokens, "--learning-rate", 1e-3, "--device", "cpu")
    result = run_cli("distill", student, "--teacher", teacher, "--data", text, *batch, "-o", out)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 3
    return {"losses": rounded(losses)}


def facts_of(name: str, work: Path) -> Facts:
    """All facts of the embedded model, or of a tiny one of a family."""
    model = EMBEDDED if name == "embedded" else write_family_checkpoint(work / "model", name)
    length, scores = (64, work / "scores.safetensors") if name == "embedded" else (16, work / "scores.safetensors")
    text = work / "text.jsonl"
    lines = TEXT.read_text(encoding="utf-8").splitlines()[: 12 if name == "embedded" else 2]
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    measuring = ("--data", text, "--samples", 2, "--sequence-length", length, "--device", "cpu")
    result = run_cli("score", model, *measuring, "-o", scores)
    assert result.exit_code == 0, result.output
    measured = load_file(scores)
    found: Facts = {
        "sizes": size_facts(model),
        "scores": {metric: rounded(measured[f"layer.{metric}"]) for metric in ("mse", "cosine", "kl")},
        "plans": {},
    }
    given = give_scores(scores, work / "given.safetensors")
    for layout in LAYOUTS:
        if layout == "per-layer" and "unit.ffn.1" not in measured:
            continue
        path = work / f"{layout}.json"
        budget = ("--memory", "85%", "--granularity", 16, "--min-ffn", 0.5, "--context", 64, "--layout", layout)
        run_json("search", model, "--scores", given, *budget, "-o", path)
        found["plans"][layout] = plan_facts(path)
    if name in DISTILLED:
        run_json("prune", model, "--plan", work / "uniform.json", "-o", work / "pruned")
        found |= loss_facts(work / "pruned", model, text, length, work / "distilled")
    if name == "llama":
        source = change_tensors(write_family_checkpoint(work / "given", name), given_weights)
        found |= {kind: code_facts(source, options, text, work / kind) for kind, options in EXPORTS.items()}
    return found
