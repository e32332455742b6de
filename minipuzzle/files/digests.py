"""Folders whose files are listed with their SHA-256, so that nothing in them rots unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import read_json, write_json

DIGESTS_FILE = "digests.json"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_digests(folder: Path) -> None:
    """List the files of a folder that is otherwise complete."""
    write_json(folder / DIGESTS_FILE, {name: sha256_of(folder / name) for name in _files(folder)})


def damage_of(folder: Path, share: Callable[[Sequence[str]], Sequence[str]] = lambda names: names) -> str | None:
    """What is wrong with a folder that ``write_digests`` has listed, in words; None if all is as it was then.

    ``share``: the part of the files that is read, for many processes that check one folder together.
    """
    try:
        listed = read_json(folder / DIGESTS_FILE)
        found = _files(folder)
        if different := sorted(listed.keys() ^ set(found)):
            return f"{different[0]} is {'missing' if different[0] in listed else 'not one of its files'}"
        return next(
            (f"{name} is not as it was written" for name in share(found) if _differs(folder, listed, name)), None
        )
    except (MinipuzzleError, OSError) as error:
        return str(error)


def _differs(folder: Path, listed: dict[str, object], name: str) -> bool:
    return sha256_of(folder / name) != listed[name]


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != DIGESTS_FILE)
