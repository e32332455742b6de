"""Guarantee: windows hold documents' tokens as they are: evaluation reads each once, samples never overlap."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipuzzle.data.windows import IGNORE, document_tokens, evaluation_windows, sample_windows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.runtime.models import load_tokenizer

DOCUMENTS = st.lists(st.text(alphabet="abcé ü", max_size=40), min_size=1, max_size=5)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(tiny_folder)


def test_bits_per_byte_count_what_is_predicted(tokenizer: Any) -> None:
    spelled = "<s>[user] Where is Ayr?\n[assistant] In Scotland.\n"
    opened = evaluation_windows(tokenizer, [spelled], sequence_length=16)
    assert opened.num_bytes == opened.num_predictions == len(spelled) - len("<s>")


@given(DOCUMENTS, st.integers(1, 20))
def test_evaluation_predicts_every_token_of_every_document_once(
    tokenizer: Any, documents: list[str], length: int
) -> None:
    tokens = [document_tokens(tokenizer, text) for text in documents]
    wanted = [token for document in tokens for token in document[1:]]
    if not wanted:
        with pytest.raises(MinipuzzleError, match="fewer than two tokens"):
            evaluation_windows(tokenizer, documents, sequence_length=length)
        return
    windows = evaluation_windows(tokenizer, documents, sequence_length=length)
    assert windows.labels[windows.labels != IGNORE].tolist() == wanted
    assert windows.token_ids.shape == windows.labels.shape == (len(windows.labels), length)
    assert windows.num_bytes == sum(len(text.encode()) for text in documents)
    shifted = windows.labels[:, :-1], windows.token_ids[:, 1:]
    counts = windows.labels[:, 1:] != IGNORE  # a position that predicts is read as the label before it
    assert torch.equal(shifted[0][counts], shifted[1][counts])


@given(DOCUMENTS, st.integers(1, 6), st.integers(1, 6), st.integers(0, 5))
def test_samples_are_different_stretches_of_the_shuffled_text(
    tokenizer: Any, documents: list[str], num_samples: int, length: int, seed: int
) -> None:
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    stream = [token for idx in order for token in document_tokens(tokenizer, documents[idx])]
    arguments: dict[str, Any] = {"num_samples": num_samples, "sequence_length": length, "seed": seed}
    if len(stream) // length < num_samples:
        with pytest.raises(MinipuzzleError, match="tokens, but"):
            sample_windows(tokenizer, documents, **arguments)
        return
    found = sample_windows(tokenizer, documents, **arguments).tolist()
    stretches = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    assert len(found) == num_samples
    remaining = iter(stretches)
    assert all(window in remaining for window in found), "in the order of the text, each stretch once"
