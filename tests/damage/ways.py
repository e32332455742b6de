"""Ways to damage a file or a record, each a function that a case keeps and applies to its own copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
GONE = object()  # a value that takes its key away


def setting(key: str, value: object) -> Callable[[Record], None]:
    """Give a key of a record another value, or take it away."""

    def change(record: Record) -> None:
        record[key] = value
        if value is GONE:
            del record[key]

    return change


def holding(content: bytes, name: str = ".") -> Callable[[Path], None]:
    """Replace what a file holds; ``name``: of the file, relative to the path that is given."""
    return lambda path: _write(path / name if name != "." else path, content)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def at(name: str, way: Callable[[Path], object]) -> Callable[[Path], object]:
    """Apply a way to a file below the path that is given."""
    return lambda path: way(path / name)


def all_of(*ways: Callable[[Path], object]) -> Callable[[Path], None]:
    """One way after another."""

    def change(path: Path) -> None:
        for way in ways:
            way(path)

    return change


def linked(target: str) -> Callable[[Path], object]:
    """A symbolic link in the place of a file."""
    return lambda path: path.symlink_to(target)


def folder_with(files: dict[str, str | Callable[[Path], object]]) -> Callable[[Path], None]:
    """A folder of files by their text, or made by a way."""

    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            if isinstance(content, str):
                (path / name).write_text(content, encoding="utf-8")
            else:
                content(path / name)

    return make


def flipped(content: bytes, positions: Iterable[float], bit: int) -> bytes:
    """Bytes with one bit flipped at each of some positions, given as shares of the length."""
    changed = bytearray(content)
    for position in positions:
        changed[int(position * (len(changed) - 1))] ^= 1 << bit
    return bytes(changed)
