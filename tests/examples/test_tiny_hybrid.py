"""Guarantee: the embedded model is a trained hybrid, small enough to commit, and its held-out text was held out.

The text here is a part of the held-out slices, so that the file runs in seconds; examples/tiny_hybrid/measure.py
measures all of it.
"""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path

import pytest
import torch

from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import EvaluationWindows, evaluation_windows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.evaluate import documents_within, evaluate
from minipuzzle.runtime.models import load_model, load_tokenizer, parts_of

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_hybrid"
HELD_OUT = ("heldout_speeches", "heldout_code", "validation")
SEEN = ("calibration", "distillation")


def records(name: str) -> list[dict[str, str]]:
    lines = (FOLDER / "text" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def document_of(record: dict[str, str]) -> str:
    """Parts of a document share its name; what follows '#' is the part."""
    return record["id"].split("#")[0]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(FOLDER / "model")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> torch.nn.Module:
    return load_model(checkpoint)


def windows_of(checkpoint: Checkpoint, name: str, max_tokens: int) -> EvaluationWindows:
    tokenizer = load_tokenizer(checkpoint.folder)
    documents = documents_within(tokenizer, read_documents([FOLDER / "text" / f"{name}.jsonl"]), max_tokens)
    return evaluation_windows(tokenizer, documents, sequence_length=512)


def test_the_model_is_a_hybrid_of_the_promised_size(checkpoint: Checkpoint) -> None:
    counts = checkpoint.architecture.layer_counts
    assert len(checkpoint.architecture.layers) >= 24
    assert set(counts) == {"mamba", "attention", "mlp"}
    assert counts["attention"] >= 3
    assert 3e6 <= checkpoint.architecture.num_parameters <= 10e6
    assert checkpoint.weight_bytes <= 20e6
    assert {entry.dtype for entry in checkpoint.entries.values()} == {"BF16"}


def test_held_out_speeches_cost_at_most_1_8_bits_a_byte(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    windows = windows_of(checkpoint, "heldout_speeches", 6000)
    assert evaluate(model, checkpoint.family, windows).bits_per_byte <= 1.8


def test_the_model_compresses_speeches_far_better_than_primed_xz(
    checkpoint: Checkpoint, model: torch.nn.Module
) -> None:
    """xz is primed with the embedded training text; README has the figure for all training speeches."""
    held_out = "\n".join(record["text"] for record in records("heldout_speeches")).encode()
    seen = "\n".join(record["text"] for name in SEEN for record in records(name)).encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**26}]
    sizes = [len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters)) for text in (seen, seen + held_out)]
    xz_bits_per_byte = 8 * (sizes[1] - sizes[0]) / len(held_out)
    windows = windows_of(checkpoint, "heldout_speeches", 6000)
    assert evaluate(model, checkpoint.family, windows).bits_per_byte < 0.8 * xz_bits_per_byte


@pytest.mark.parametrize("kind", ["mamba", "attention", "mlp"])
def test_the_model_needs_its_layers_of_each_kind(checkpoint: Checkpoint, model: torch.nn.Module, kind: str) -> None:
    windows = windows_of(checkpoint, "heldout_speeches", 4000)
    whole = evaluate(model, checkpoint.family, windows).loss
    parts = parts_of(model, checkpoint.family)
    bypass = [
        parts.layers[idx].register_forward_hook(lambda _module, inputs, _output: inputs[0])
        for idx in checkpoint.architecture.layer_indices(kind)
    ]
    try:
        without = evaluate(model, checkpoint.family, windows).loss
    finally:
        for hook in bypass:
            hook.remove()
    assert without - whole >= 0.1
    assert math.isfinite(without)


def test_held_out_documents_occur_nowhere_else() -> None:
    seen = {document_of(record) for name in SEEN for record in records(name)}
    held_out = {document_of(record) for name in HELD_OUT for record in records(name)}
    assert not seen & held_out
    years_seen = {document.split("/")[1][:4] for document in seen if document.startswith("sotu/")}
    years_held_out = {document.split("/")[1][:4] for document in held_out if document.startswith("sotu/")}
    assert not years_seen & years_held_out, "several addresses of one year share sentences"


def test_reported_text_was_not_used_for_choosing() -> None:
    chosen_by = {document_of(record) for record in records("validation")}
    reported = {document_of(record) for name in ("heldout_speeches", "heldout_code") for record in records(name)}
    assert not chosen_by & reported


def test_no_long_line_of_held_out_text_occurs_in_training_text() -> None:
    seen = {line.strip() for name in SEEN for record in records(name) for line in record["text"].splitlines()}
    for name in HELD_OUT:
        for record in records(name):
            shared = [line for line in record["text"].splitlines() if len(line) > 120 and line.strip() in seen]
            assert not shared, f"{record['id']} shares {shared[0]!r}"


def test_text_and_model_stay_small() -> None:
    assert sum(path.stat().st_size for path in (FOLDER / "text").iterdir()) <= 2.4e6
    assert sum(path.stat().st_size for path in (FOLDER / "model").iterdir()) <= 20e6
