"""results.md: what each step kept of the model, and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tasks import TASKS
from texts import DOMAINS

from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.cut.plan import read_plan
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json

STEPS = ("scores", "pruned", "distilled", "bf16", "fp8")
NAMES = ("original", "pruned", "distilled", "fp8")
_HEADER = """# SmolLM2-135M: what pruning costs and distillation recovers

Written by `run.py` (`make smollm2`). The original is SmolLM2-135M-Instruct as a package of the Python index holds it:
4-bit weights, turned into plain numbers and stored as BF16, so its figures are not those of the published BF16 release.

"""


def write_page(work: Path, original: Path, page: Path, times: Mapping[str, Mapping[str, float]]) -> None:
    """Write the page from what the steps left; a run that is not finished gives the rows that it has."""
    evaluated = [name for name in NAMES if all((work / f"{what}_{name}.json").is_file() for what in ("text", "tasks"))]
    found = {name: _quality(work, name) for name in evaluated}
    rows = [_row(name, original if name == "original" else work / name, found[name]) for name in evaluated]
    labels = [*DOMAINS, "nats/token", "KL", *TASKS]
    parts = [
        _HEADER,
        _table(["", "blocks", "KV groups", "FFN", "parameters", "memory, GiB", *labels], rows),
        *(["\n" + _recovery(found)] if "distilled" in found else []),
        "\n" + _legend(found["original"]),
        "\n## What was cut\n\n" + _cut(Checkpoint.open(original), work / "pruned"),
        "\n## What it took\n\n" + _times(times),
    ]
    page.write_text("".join(parts), encoding="utf-8")


def _quality(work: Path, name: str) -> dict[str, Any]:
    text = read_json(work / f"text_{name}.json")
    by_domain = {domain: text[f"heldout_{domain}"] for domain in DOMAINS}
    return {"text": {**by_domain, "all": text["total"]}, "tasks": read_json(work / f"tasks_{name}.json")}


def _row(name: str, folder: Path, found: Mapping[str, Any]) -> list[str]:
    checkpoint = Checkpoint.open(folder)
    source = checkpoint.architecture
    deployment = Deployment(weights="fp8") if checkpoint.is_quantized else Deployment()
    text, asked = found["text"], found["tasks"]
    kl = text["all"]["kl"]
    return [
        name,
        str(len(source.blocks)),
        str(source.width("kv_group")),
        f"{source.width('ffn'):,}",
        f"{source.num_parameters / 1e6:.1f} M",
        f"{memory_breakdown(source, deployment).total_bytes / 2**30:.4f}",
        *(f"{text[domain]['perplexity']:.2f}" for domain in DOMAINS),
        f"{text['all']['loss']:.4f}",
        "" if kl is None else f"{kl:.4f}",
        *(f"{asked[task]['accuracy']:.3f} ± {asked[task]['standard_error']:.3f}" for task in TASKS),
    ]


def _recovery(found: Mapping[str, Any]) -> str:
    original, pruned, distilled, *fp8 = (values["text"]["all"]["loss"] for values in found.values())
    by_domain = []
    for domain in DOMAINS:
        before, lost, after = (found[name]["text"][domain]["loss"] for name in NAMES[:3])
        by_domain.append(f"{domain} {(lost - after) / (lost - before):.0%}")
    recovered = (
        f"Pruning loses {pruned - original:.4f} nats/token on held-out text; distillation wins back "
        f"{pruned - distilled:.4f} of them, **{(pruned - distilled) / (pruned - original):.0%}** "
        f"({', '.join(by_domain)})."
    )
    return recovered + "".join(f" FP8 costs {loss - distilled:+.4f}." for loss in fp8) + "\n"


def _legend(found: Mapping[str, Any]) -> str:
    num_tokens = {domain: found["text"][domain]["num_tokens"] for domain in DOMAINS}
    counts = ", ".join(f"{count:,} of {domain}" for domain, count in num_tokens.items())
    asked = ", ".join(
        f"{task}: {values['num_questions']} questions, guessing gives {values['chance']:.3f}"
        for task, values in found["tasks"].items()
    )
    return (
        f"Speeches, wikipedia, code: perplexity on held-out documents ({counts} tokens, windows of 512). nats/token: "
        f"loss on all of them; KL: from the original, on the same tokens. {asked}; ± is one standard error of the "
        "sample, and differences below two of them say nothing; the form of the questions was chosen by the original's "
        "answers. Memory: weights and KV cache at a context of 8,192, weights in BF16, those of linear layers in FP8 "
        "for `fp8`, which is evaluated with weights and activations rounded as engines do.\n"
    )


def _cut(source: Checkpoint, pruned: Path) -> str:
    plan = read_plan(pruned / "plan.json")
    architecture, table = source.architecture, pruned / "candidates.json"
    kept = set(plan.kept_layers)
    dropped = [str(number) for number, block in enumerate(architecture.blocks) if not kept & set(block)]
    target = plan.apply(architecture)
    text = f"Blocks left out of {len(architecture.blocks)}: {', '.join(dropped) or 'none'}"
    text += "".join(
        f", {axis} was cut from {architecture.width(axis):,} to {target.width(axis):,}"
        for axis in ("ffn", "kv_group", "hidden")
        if architecture.width(axis) != target.width(axis)
    )
    if not table.is_file():
        return text + ".\n"
    candidates = read_json(table)["candidates"]
    num_tokens = candidates[0]["num_tokens"]
    return (
        f"{text}. {len(candidates)} candidates were measured, on {num_tokens:,} tokens of validation text:\n\n"
        + _table(
            ["parameters", "memory, GiB", "KL", "nats/token"],
            [
                [
                    f"{item['num_parameters'] / 1e6:.1f} M",
                    f"{item['memory_bytes'] / 2**30:.4f}",
                    f"{item['kl']:.4f}",
                    f"{item['loss']:.4f}",
                ]
                for item in candidates
            ],
        )
    )


def _times(times: Mapping[str, Mapping[str, float]]) -> str:
    spent = {name: times[name] for name in STEPS if name in times}
    rows = [
        [name, f"{took['cpu_seconds'] / 60:.1f}", f"{took['seconds'] / 60:.1f}", f"{took['threads']:.0f}"]
        for name, took in spent.items()
    ]
    return (
        _table(["step", "CPU minutes", "minutes", "threads"], rows)
        + f"\nEvaluations not counted. float32, torch {torch.__version__}, on a machine that other work shared, so CPU "
        "time counts. This CPU multiplies bfloat16 slower than float32.\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
