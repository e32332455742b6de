"""Digests of what one command writes and another believes, so that nothing in it rots unnoticed.

Folders list the SHA-256 of their files, records hold a checksum of the rest, and arrays have one in their metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import read_json, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

DIGESTS_FILE = "digests.json"
CHECKSUM = "checksum"  # the field of a record, and of the metadata of arrays, that tells whether the rest is as written


def checked_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of itself."""
    return {**record, CHECKSUM: _checksum(record)}


def unchanged_record(record: Mapping[str, Any], where: str, *, may_be_by_hand: bool = False) -> dict[str, Any]:
    """The inverse of ``checked_record``; ``may_be_by_hand``: or an object without a checksum, as it is.

    Raises: MinipuzzleError if it is not what was written.
    """
    bare = {name: value for name, value in record.items() if name != CHECKSUM}
    if not may_be_by_hand and CHECKSUM not in record:
        raise MinipuzzleError(f"{where} has no checksum of what was written", f"remove {where} to start afresh")
    if CHECKSUM in record and record[CHECKSUM] != _checksum(bare):
        raise MinipuzzleError(
            f"{where} is not as it was written: its checksum is {record[CHECKSUM]!r}, not {_checksum(bare)!r}",
            f"make or copy it again; if you changed it by hand, remove its field {CHECKSUM}",
        )
    return bare


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_arrays(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
    """A hash of named arrays with their types and shapes, and of what their metadata say besides it."""
    said = sorted((name, value) for name, value in metadata.items() if name != CHECKSUM)
    digest = hashlib.sha256(json.dumps(said).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


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
