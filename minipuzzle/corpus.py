"""Text for measuring and training: documents from files, and token windows cut from them.

Formats: ``.txt`` and ``.md`` (one document a file), ``.jsonl`` (one a line, field ``text``), and folders of these.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipuzzle.errors import MinipuzzleError

TEXT_SUFFIXES = (".txt", ".md")
JSONL_SUFFIX = ".jsonl"
IGNORE = -100  # label of a position that predicts nothing


def read_documents(paths: Sequence[Path]) -> list[str]:
    """All documents of some files or folders, in the order given; folders in alphabetical order.

    Raises: MinipuzzleError for a missing or empty file, an unknown format, or a line that is not a JSON object
    with a non-empty ``text``. No line is skipped silently.
    """
    return [text for path in paths for text in _read_path(path)]


def _read_path(path: Path) -> Iterator[str]:
    if path.is_dir():
        members = sorted(p for p in path.rglob("*") if p.suffix in (*TEXT_SUFFIXES, JSONL_SUFFIX))
        if not members:
            raise MinipuzzleError(f"{path} holds no .txt, .md or .jsonl files", "check the folder")
        for member in members:
            yield from _read_path(member)
        return
    if not path.is_file():
        raise MinipuzzleError(f"data file {path} does not exist", "check --data")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MinipuzzleError(f"{path} is not UTF-8 text: {error.reason}", "convert it to UTF-8") from None
    if not content.strip():
        raise MinipuzzleError(f"data file {path} is empty", "give a file with text")
    if path.suffix == JSONL_SUFFIX:
        yield from _read_jsonl(path, content)
    elif path.suffix in TEXT_SUFFIXES:
        yield content
    else:
        raise MinipuzzleError(f"{path} has an unknown format", "use .txt, .md, .jsonl or a folder of them")


def _read_jsonl(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MinipuzzleError(f"{path}, line {number}: not JSON: {error.msg}", "mend or remove the line") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text:
            raise MinipuzzleError(f"{path}, line {number}: no text", 'each line needs {"text": "..."}')
        yield text


def document_tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one document, opened by the tokenizer's first token where it has one."""
    opening: list[int] = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return [*opening, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def sample_windows(
    tokenizer: Any, documents: Sequence[str], *, num_samples: int, sequence_length: int, seed: int = 0
) -> torch.Tensor:
    """Random windows of packed documents, ``[samples, sequence_length]`` int64, without overlap.

    Documents follow each other in shuffled order, as in pre-training; state is not reset between them.

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
    if num_windows < num_samples:
        raise MinipuzzleError(
            f"the data has {len(stream):,} tokens, but {num_samples} samples of {sequence_length} need "
            f"{wanted_tokens:,}",
            "give more --data, or lower --samples or --sequence-length",
        )
    starts = sorted(shuffler.sample(range(num_windows), num_samples))
    windows = [stream[start * sequence_length : (start + 1) * sequence_length] for start in starts]
    return torch.tensor(windows, dtype=torch.int64)


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
        # Without an opening token the first token is context only, and its bytes are not predicted.
        unpredicted = "" if tokenizer.bos_token_id is not None else tokenizer.decode(tokens[:1])
        num_bytes += len(text.encode()) - len(unpredicted.encode())
    if not inputs:
        raise MinipuzzleError("the evaluation text has fewer than two tokens", "give more --data")
    return EvaluationWindows(token_ids=torch.tensor(inputs), labels=torch.tensor(labels), num_bytes=num_bytes)


def windows_of_tokens(tokenizer: Any, token_ids: torch.Tensor) -> EvaluationWindows:
    """Evaluation windows from sampled ones, ``[samples, tokens]``: every token but the first is predicted."""
    num_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in token_ids)
    return EvaluationWindows(token_ids=token_ids[:, :-1], labels=token_ids[:, 1:], num_bytes=num_bytes)
