"""Rows of recovery data: text or a conversation, where it came from, what is known of it; and shards of them.

A shard is a Parquet file with the columns of ``schema``, which training reads as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipuzzle.data.documents import iterate_records
from minipuzzle.errors import MinipuzzleError

if TYPE_CHECKING:
    import pyarrow

BYTES_PER_TOKEN = 4  # of English under the usual vocabularies; budgets of steps that know no tokenizer go by it
Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One document (``text``) or conversation (``messages`` with ``role`` and ``content``).

    ``parents``: ids of the rows it was made from. ``labels``: measures. ``tags``: words. ``made``: by which step,
    model, prompt and settings; empty for what was only read.
    """

    text: str = ""
    messages: tuple[Message, ...] = ()
    source: str = ""
    parents: tuple[str, ...] = ()
    labels: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The first 16 digits of the SHA-256 of the content."""
        content = json.dumps([self.text, [dict(message) for message in self.messages]], sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def content(self) -> str:
        """All words of it, without roles."""
        return self.text or "\n\n".join(message["content"] for message in self.messages)

    @property
    def num_tokens(self) -> int:
        """About how many tokens it has."""
        return tokens_of(self.content)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """What was not taken, and why; ``detail``: what was found in its place."""

    id: str
    reason: str
    attempt: str = ""
    detail: str = ""


def tokens_of(text: str) -> int:
    """About how many tokens a text has, at ``BYTES_PER_TOKEN``."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)


def unusable(text: str) -> str:
    """Why no row may hold a text; "" if it may."""
    if not text.strip():
        return "empty"
    if any(ord(letter) < 32 and letter not in "\t\n\r" for letter in text):
        return "control characters"
    return "" if text.isascii() or text.encode("utf-8", "ignore").decode() == text else "half of a character"


def read_rows(paths: Sequence[Path]) -> Iterator[Row | Rejected]:
    """The rows of files and folders one by one; a record that cannot be one is a rejection that says where.

    Raises: MinipuzzleError for files that cannot be read.
    """
    for record, where in iterate_records(paths):
        yield _row(record, where)


def _row(record: Mapping[str, Any], where: str) -> Row | Rejected:
    text, messages = record.get("text"), record.get("messages")
    try:
        made = record.get("made") or {}
        row = Row(
            text=text if isinstance(text, str) else "",
            messages=tuple({"role": str(m["role"]), "content": str(m["content"])} for m in messages or ()),
            source=str(record.get("source") or where.partition(",")[0]),
            parents=tuple(record.get("parents") or ()),
            labels={name: float(value) for name, value in dict(record.get("labels") or {}).items()},
            tags=_tags(record),
            made=json.loads(made) if isinstance(made, str) else made,
        )
    except (TypeError, ValueError, KeyError) as error:
        return Rejected(id="", reason="not a row", detail=f"{where}: {error}")
    reason = unusable(row.content)
    return Rejected(id=row.id, reason=reason, detail=where) if reason else row


def _tags(record: Mapping[str, Any]) -> dict[str, str]:
    """Tags as they are, and all other fields with text, such as the question and the answer of a trace."""
    known = (*(field_.name for field_ in schema()), "metadata")
    others = {name: value for name, value in record.items() if name not in known and isinstance(value, str | int)}
    return {name: str(value) for name, value in {**others, **dict(record.get("tags") or {})}.items()}


def schema() -> pyarrow.Schema:
    """The columns of a shard."""
    import pyarrow as pa

    text = pa.string()
    message = pa.struct([("role", text), ("content", text)])
    columns = {"id": text, "text": text, "messages": pa.list_(message), "source": text, "parents": pa.list_(text)}
    return pa.schema(
        {**columns, "labels": pa.map_(text, pa.float64()), "tags": pa.map_(text, text), "made": text}.items()
    )


def write_shard(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to a Parquet file; the caller sees to it that it appears whole."""
    import pyarrow as pa
    from pyarrow import parquet

    records = [
        {
            "id": row.id,
            "text": row.text or None,
            "messages": [dict(message) for message in row.messages] or None,
            "source": row.source,
            "parents": list(row.parents),
            "labels": list(row.labels.items()),
            "tags": list(row.tags.items()),
            "made": json.dumps(dict(row.made), sort_keys=True),
        }
        for row in rows
    ]
    parquet.write_table(pa.Table.from_pylist(records, schema=schema()), path)


def read_shard(path: Path) -> list[Row]:
    """The rows of a shard of ours.

    Raises: MinipuzzleError if it is damaged.
    """
    rows = [_row(record, str(path)) for record, _ in iterate_records([path])]
    for row in rows:
        if isinstance(row, Rejected):
            raise MinipuzzleError(f"{path} holds a row that is {row.reason}", "remove the folder and start afresh")
    return [row for row in rows if isinstance(row, Row)]
