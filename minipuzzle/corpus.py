"""Text for measuring and training: documents from files, and token windows cut from them.

Formats: ``.txt`` and ``.md`` (one document a file), ``.jsonl`` (one a line) and ``.parquet`` (one a row), and folders
of these. A record has a ``text``, or a conversation in ``messages``, which the tokenizer's chat template spells out.
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
JSONL_SUFFIX, PARQUET_SUFFIX = ".jsonl", ".parquet"
SUFFIXES = (*TEXT_SUFFIXES, JSONL_SUFFIX, PARQUET_SUFFIX)
FORMATS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
RECORD_FIELDS = ("text", "messages")
RECORD_HINT = 'a record is {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
IGNORE = -100  # label of a position that predicts nothing


def read_documents(paths: Sequence[Path], tokenizer: Any = None) -> list[str]:
    """All documents of some files or folders, in the order given; folders in alphabetical order.

    ``tokenizer``: its chat template turns ``messages`` into text; needed only for those.

    Raises: MinipuzzleError for a missing or empty file, an unknown format, or a record without a non-empty ``text``
    or ``messages``. No record is skipped silently.
    """
    return list(iterate_documents(paths, tokenizer))


def iterate_documents(paths: Sequence[Path], tokenizer: Any = None) -> Iterator[str]:
    """The documents of ``read_documents`` one by one; only plain text files are held whole."""
    for path in paths:
        for member in _members(path):
            num_documents = 0
            for text in _read_file(member, tokenizer):
                num_documents += 1
                yield text
            if not num_documents:
                raise MinipuzzleError(f"data file {member} is empty", "give a file with text")


def _members(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise MinipuzzleError(f"data file {path} does not exist", "check --data")
        return [path]
    members = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not members:
        raise MinipuzzleError(f"{path} holds no {FORMATS} files", "check the folder")
    return members


def _read_file(path: Path, tokenizer: Any) -> Iterator[str]:
    if path.suffix not in SUFFIXES:
        raise MinipuzzleError(f"{path} has an unknown format", f"use {FORMATS}, or a folder of them")
    if path.suffix == PARQUET_SUFFIX:
        yield from _read_parquet(path, tokenizer)
        return
    try:
        if path.suffix == JSONL_SUFFIX:
            yield from _read_jsonl(path, tokenizer)
        elif content := path.read_text(encoding="utf-8"):
            yield from [content] if content.strip() else []
    except UnicodeDecodeError as error:
        raise MinipuzzleError(f"{path} is not UTF-8 text: {error.reason}", "convert it to UTF-8") from None


def _read_jsonl(path: Path, tokenizer: Any) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise MinipuzzleError(f"{where}: not JSON: {error.msg}", "mend or remove the line") from None
            yield _document(record if isinstance(record, dict) else {}, tokenizer, where)


def _read_parquet(path: Path, tokenizer: Any) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in RECORD_FIELDS if name in file.schema_arrow.names]
            if not columns:
                raise MinipuzzleError(
                    f"{path} has no column text or messages", f"its columns: {file.schema_arrow.names}"
                )
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns[:1]):
                for record in batch.to_pylist():
                    number += 1
                    yield _document(record, tokenizer, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise MinipuzzleError(f"{path} is not a readable Parquet file: {error}", "write or copy it again") from None


def _document(record: dict[str, Any], tokenizer: Any, where: str) -> str:
    """The text of a record, or its conversation in the words of the tokenizer's chat template."""
    text, messages = (record.get(name) for name in RECORD_FIELDS)
    if isinstance(text, str) and text:
        return text
    if not messages or not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise MinipuzzleError(f"{where}: no text", RECORD_HINT)
    if getattr(tokenizer, "chat_template", None) is None:
        raise MinipuzzleError(
            f"{where} is a conversation, and the tokenizer has no chat template to write it out",
            "use a tokenizer with a chat template, or give records with a text",
        )
    from jinja2 import TemplateError

    # Parquet gives every message all fields that any message has, empty ones as null.
    present = [{name: value for name, value in message.items() if value is not None} for message in messages]
    try:
        spelled = tokenizer.apply_chat_template(present, tokenize=False)
    except (TemplateError, TypeError, KeyError) as error:
        raise MinipuzzleError(f"{where}: the chat template refuses the messages: {error}", RECORD_HINT) from None
    assert isinstance(spelled, str)
    return spelled


def document_tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one document, opened by the tokenizer's first token where it has one and the text, as chat
    templates may, does not begin with it."""
    opening: list[int] = [tokenizer.bos_token_id] if _needs_opening(tokenizer, text) else []
    return [*opening, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def _needs_opening(tokenizer: Any, text: str) -> bool:
    return tokenizer.bos_token_id is not None and not text.startswith(tokenizer.bos_token)


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
        # Unless it is an opening of ours, the first token is part of the text but not predicted.
        unpredicted = "" if _needs_opening(tokenizer, text) else tokenizer.decode(tokens[:1])
        num_bytes += len(text.encode()) - len(unpredicted.encode())
    if not inputs:
        raise MinipuzzleError("the evaluation text has fewer than two tokens", "give more --data")
    return EvaluationWindows(token_ids=torch.tensor(inputs), labels=torch.tensor(labels), num_bytes=num_bytes)


def windows_of_tokens(tokenizer: Any, token_ids: torch.Tensor) -> EvaluationWindows:
    """Evaluation windows from sampled ones, ``[samples, tokens]``: every token but the first is predicted."""
    num_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in token_ids)
    return EvaluationWindows(token_ids=token_ids[:, :-1], labels=token_ids[:, 1:], num_bytes=num_bytes)
