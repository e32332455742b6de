"""Windows of tokens, cut from documents: random ones to measure and calibrate on, complete ones to evaluate on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from minipuzzle.errors import MinipuzzleError, warn

PIECE_CHARACTERS = 2**20
_PROBE = "a"  # to see what a tokenizer's own rule adds to a text
IGNORE = -100  # label of a position that predicts nothing


def document_tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one document, opened as the tokenizer itself opens any text, unless the text, as chat templates may
    write it, begins with that."""
    tokens = _opening(tokenizer, text)
    for piece in _pieces(text):
        tokens += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return tokens


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that end with a line or a word: a tokenizer takes a hundred times the memory of its text.

    Texts of usual length are one piece.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = start + PIECE_CHARACTERS
        cut = max(text.rfind("\n", start, stop), text.rfind(" ", start, stop)) if stop < len(text) else -1
        stop = cut if cut > start else stop  # the space begins the next word
        yield text[start:stop]
        start = stop
    yield text[start:]


def _opening(tokenizer: Any, text: str) -> list[int]:
    """What a tokenizer puts before a text: a first token, where it has one and its own rule adds it."""
    tokens = list(_tokens_before(tokenizer))
    return [] if tokens and text.startswith(tokenizer.decode(tokens)) else tokens


@lru_cache(maxsize=4)
def _tokens_before(tokenizer: Any) -> tuple[int, ...]:
    with_rule, plain = (tokenizer(_PROBE, add_special_tokens=adds)["input_ids"] for adds in (True, False))
    starts = range(len(with_rule) - len(plain) + 1)
    start = next((start for start in starts if with_rule[start : start + len(plain)] == plain), 0)
    return tuple(with_rule[:start])


def sample_windows(
    tokenizer: Any,
    documents: Sequence[str],
    *,
    num_samples: int,
    sequence_length: int,
    seed: int = 0,
    may_be_fewer: bool = False,
) -> torch.Tensor:
    """Random windows of packed documents, ``[samples, sequence_length]`` int64, without overlap.

    Documents follow each other in shuffled order, as in pre-training; state is not reset between them.
    ``may_be_fewer``: where the text is shorter, as many windows as it has.

    Raises: MinipuzzleError if the text is shorter than asked for.
    """
    shuffler = random.Random(seed)
    order = list(range(len(documents)))
    shuffler.shuffle(order)
    wanted_tokens = num_samples * sequence_length
    stream: list[int] = []
    for document_idx in order:
        stream += document_tokens(tokenizer, documents[document_idx])
    num_windows = len(stream) // sequence_length
    num_samples = min(num_samples, max(1, num_windows)) if may_be_fewer else num_samples
    if num_windows < num_samples:
        raise MinipuzzleError(
            f"the data has {len(stream):,} tokens, but {num_samples} samples of {sequence_length} need "
            f"{wanted_tokens:,}",
            "give more ‹data›, or lower ‹samples› or ‹sequence_length›",
        )
    starts = sorted(shuffler.sample(range(num_windows), num_samples))
    windows = [stream[start * sequence_length : (start + 1) * sequence_length] for start in starts]
    return torch.tensor(windows, dtype=torch.int64)


def wanted_windows(
    tokenizer: Any,
    documents: Sequence[str],
    *,
    samples: int | None,
    default_samples: int,
    sequence_length: int,
    seed: int = 0,
) -> torch.Tensor:
    """Random windows as above: as many as somebody asked for, else by default, or all there are, which is said.

    Raises: MinipuzzleError if the text is shorter than asked for.
    """
    token_ids = sample_windows(
        tokenizer,
        documents,
        num_samples=default_samples if samples is None else samples,
        sequence_length=sequence_length,
        seed=seed,
        may_be_fewer=samples is None,
    )
    if samples is None and len(token_ids) < default_samples:
        warn(
            f"the text holds {len(token_ids)} samples of {sequence_length} tokens, not {default_samples}: all are used"
        )
    return token_ids


@dataclass(frozen=True, kw_only=True)
class EvaluationWindows:
    """Every token of every document predicted exactly once.

    Shapes: ``token_ids`` and ``labels`` ``[windows, tokens]`` int64; a label is the next token, or IGNORE for padding.
    ``num_bytes``: UTF-8 bytes of the text that the labels spell.
    """

    token_ids: torch.Tensor
    labels: torch.Tensor
    num_bytes: int

    @property
    def num_predictions(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORE).sum())


def evaluation_windows(tokenizer: Any, documents: Sequence[str], *, sequence_length: int) -> EvaluationWindows:
    """Cut documents into windows for evaluation; a window starts with the last token of the one before it.

    Raises: MinipuzzleError if there is nothing to predict.
    """
    inputs, labels, num_bytes = [], [], 0
    for text in documents:
        tokens = document_tokens(tokenizer, text)
        for start in range(0, len(tokens) - 1, sequence_length):
            piece = tokens[start : start + sequence_length + 1]
            padding = sequence_length + 1 - len(piece)
            inputs.append((piece[:-1] + [0] * padding)[:sequence_length])
            labels.append((piece[1:] + [IGNORE] * padding)[:sequence_length])
        # Unless it is an opening of ours, the first token is part of the text but not predicted.
        unpredicted = "" if _opening(tokenizer, text) else tokenizer.decode(tokens[:1])
        num_bytes += len(text.encode()) - len(unpredicted.encode())
    if not inputs:
        raise MinipuzzleError("the evaluation text has fewer than two tokens", "give more ‹data›")
    return EvaluationWindows(token_ids=torch.tensor(inputs), labels=torch.tensor(labels), num_bytes=num_bytes)


def check_token_ids(token_ids: torch.Tensor, vocabulary: int) -> None:
    """Refuse tokens that a model does not know.

    Raises: MinipuzzleError if a token id is not in the vocabulary.
    """
    largest = int(token_ids.max())
    if largest >= vocabulary:
        raise MinipuzzleError(
            f"the text holds token id {largest}, but the model's vocabulary has {vocabulary:,} entries",
            "use the tokenizer that belongs to the model",
        )


def windows_of_tokens(tokenizer: Any, token_ids: torch.Tensor) -> EvaluationWindows:
    """Evaluation windows from sampled ones, ``[samples, tokens]``: every token but the first is predicted."""
    num_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in token_ids)
    return EvaluationWindows(token_ids=token_ids[:, :-1], labels=token_ids[:, 1:], num_bytes=num_bytes)
