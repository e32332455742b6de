"""Text for measuring and training: documents from files, and token windows cut from them.

Formats: ``.txt`` and ``.md`` (one document a file), ``.jsonl`` (one a line) and ``.parquet`` (one a row), and folders
of these. A record has a ``text``, or a conversation in ``messages``, which the tokenizer's chat template spells out,
with the ``tools`` that stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minipuzzle.data.conversations import spelled_out
from minipuzzle.data.limits import memory_at_most
from minipuzzle.errors import MinipuzzleError, warn
from minipuzzle.files.json_files import parse_json, read_json, require_regular_file

TEXT_SUFFIXES = (".txt", ".md")
JSONL_SUFFIX, PARQUET_SUFFIX = ".jsonl", ".parquet"
SUFFIXES = (*TEXT_SUFFIXES, JSONL_SUFFIX, PARQUET_SUFFIX)
FORMATS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
RECORD_FIELDS = ("text", "messages")
_DOCUMENTATION = ("README", "LICENSE", "LICENCE", "NOTICE")  # files that lie beside data
_NUM_NAMED = 5  # of the files of a folder that are not read
MAX_LINE_BYTES = 32 * 2**20  # of JSONL; a longer one is another kind of file, and would have to be held whole
_PARQUET_ROWS = 16  # read at a time
# A part of a column may unpack to so many times its bytes, or to so many; and a few rows to so many.
_PARQUET_RATIO, _PARQUET_BYTES, _PARQUET_BATCH_BYTES = 200, 64 * 2**20, 2**30
MAX_TEXT_BYTES = 512 * 2**20  # of a plain text file, which is one document
MANIFEST_FILE = "manifest.json"  # of a folder of recovery data: which shards it has, and what was rejected


def read_documents(paths: Sequence[Path], tokenizer: Any = None) -> list[str]:
    """All documents of some files or folders, in the order given; folders in alphabetical order.

    ``tokenizer``: its chat template turns ``messages`` into text; needed only for those.

    Raises: MinipuzzleError for a missing or empty file, an unknown format, or a record without a non-empty ``text``
    or ``messages``. No record is skipped silently; files of a folder that are not read are named in a warning.
    """
    return list(iterate_documents(paths, tokenizer))


def iterate_documents(paths: Sequence[Path], tokenizer: Any = None) -> Iterator[str]:
    """The documents of ``read_documents`` one by one; only plain text files are held whole."""
    for record, where in iterate_records(paths, columns=(*RECORD_FIELDS, "tools")):
        yield _document(record, tokenizer, where)


def iterate_records(
    paths: Sequence[Path], columns: Sequence[str] | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of some files one by one, and where each stands; a text file is one record with a ``text``.

    ``columns``: of Parquet files, which are read; default: all.

    Raises: as ``read_documents``, except for what a record must hold.
    """
    for path in paths:
        for member in _members(path):
            num_records = 0
            for record in _read_file(member, columns):
                num_records += 1
                yield record
            if not num_records:
                raise MinipuzzleError(f"data file {member} is empty", "give a file with text")


def _members(path: Path) -> list[Path]:
    if not path.is_dir():
        require_regular_file(path, "check ‹data›")
        return [path]
    if (manifest := path / MANIFEST_FILE).is_file() and isinstance(shards := read_json(manifest).get("shards"), dict):
        for name in shards:
            require_regular_file(path / name, "its manifest lists it: write the folder again")
        return [path / name for name in sorted(shards)]
    every = sorted(p for p in path.rglob("*") if not p.is_dir())
    members = [p for p in every if p.suffix in SUFFIXES and p.is_file() and not _is_about(p.relative_to(path))]
    if members and (skipped := [str(p.relative_to(path)) for p in sorted({*every} - {*members})]):
        more = f" and {len(skipped) - _NUM_NAMED} more" if len(skipped) > _NUM_NAMED else ""
        warn(f"{path}: not read as data: {', '.join(skipped[:_NUM_NAMED])}{more}")
    if not members:
        raise MinipuzzleError(f"{path} holds no {FORMATS} files", "check the folder")
    return members


def _is_about(path: Path) -> bool:
    """Whether a file in a data folder is hidden, or says something about the data."""
    return any(part.startswith(".") for part in path.parts) or path.stem.upper() in _DOCUMENTATION


def _read_file(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[dict[str, Any], str]]:
    if path.suffix not in SUFFIXES:
        raise MinipuzzleError(f"{path} has an unknown format", f"use {FORMATS}, or a folder of them")
    if path.suffix == PARQUET_SUFFIX:
        yield from _read_parquet(path, columns)
        return
    if path.suffix in TEXT_SUFFIXES and require_regular_file(path) > MAX_TEXT_BYTES:
        problem = f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB, and a text file is one document"
        raise MinipuzzleError(problem, "give it as JSONL, one document a line")
    try:
        if path.suffix == JSONL_SUFFIX:
            yield from _read_jsonl(path)
        elif (content := path.read_text(encoding="utf-8-sig")) and content.strip():
            if "\0" in content:
                raise MinipuzzleError(f"{path} holds NUL bytes and is no text", "give the text it came from")
            yield {"text": content}, str(path)
    except UnicodeDecodeError as error:
        raise MinipuzzleError(f"{path} is not UTF-8 text: {error.reason}", "convert it to UTF-8") from None


def _read_jsonl(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise MinipuzzleError(f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB", "give one document a line")
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                record = parse_json(text, where, "mend or remove the line")
                yield record if isinstance(record, dict) else {}, where


def _read_parquet(path: Path, wanted: Sequence[str] | None) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        # A dictionary stays one: rows that repeat a long text would each hold it.
        with parquet.ParquetFile(path, read_dictionary=["text"] if "text" in names else None) as file:
            columns = names if wanted is None else [name for name in wanted if name in names]
            if not columns or (wanted is not None and not set(columns).intersection(RECORD_FIELDS)):
                raise MinipuzzleError(f"{path} has no column text or messages", f"its columns: {names}")
            _check_parquet(path, file.metadata, columns)
            batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns, use_threads=False)
            number = 0
            while (batch := _next_batch(batches)) is not None:
                for row_idx in range(batch.num_rows):
                    number += 1
                    record = {name: _without_nulls(batch.column(name)[row_idx].as_py()) for name in columns}
                    _check_lengths(record, f"{path}, row {number}")
                    yield record, f"{path}, row {number}"
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise MinipuzzleError(f"{path} is not a readable Parquet file: {error}", "write or copy it again") from None


def _check_parquet(path: Path, metadata: Any, columns: Sequence[str]) -> None:
    """Refuse a file that says of itself that it unpacks to far more than text does.

    Raises: MinipuzzleError with both sizes.
    """
    for group_idx in range(metadata.num_row_groups):
        group = metadata.row_group(group_idx)
        for chunk in (group.column(column_idx) for column_idx in range(group.num_columns)):
            packed, unpacked = max(chunk.total_compressed_size, 1), chunk.total_uncompressed_size
            is_read = chunk.path_in_schema.partition(".")[0] in columns
            if is_read and unpacked > max(_PARQUET_BYTES, _PARQUET_RATIO * packed):
                problem = f"{path}: {packed:,} bytes of {chunk.path_in_schema} would unpack to {unpacked:,}"
                raise MinipuzzleError(problem, "no text is packed so tightly: write the file again from its source")


def _next_batch(batches: Iterator[Any]) -> Any:
    with memory_at_most(_PARQUET_BATCH_BYTES):
        return next(batches, None)


def _check_lengths(record: dict[str, Any], where: str) -> None:
    for name, value in record.items():
        if isinstance(value, str) and len(value) > MAX_LINE_BYTES:
            problem = f"{where} has a {name} of {len(value):,} characters"
            raise MinipuzzleError(problem, f"give documents of at most {MAX_LINE_BYTES:,}")


def _without_nulls(value: Any) -> Any:
    """A value without the fields that are null: Parquet gives every object all fields that any has."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _document(record: dict[str, Any], tokenizer: Any, where: str) -> str:
    """The text of a record, or its conversation in the words of the tokenizer's chat template."""
    text = record.get("text")
    if not isinstance(text, str) or not text:
        text = spelled_out(tokenizer, record.get("messages"), record.get("tools"), where)
    return _whole(text, where)


def _whole(text: str, where: str) -> str:
    """The text, unless it holds half of a character, which no tokenizer takes.

    Raises: MinipuzzleError saying where.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = f"{where}: the text holds half of a surrogate pair"
        raise MinipuzzleError(problem, "mend or remove the record") from None
    return text
