"""Digests of every stored tensor of an export, by which ``verify`` notices what has changed since it was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.write import piece_rows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.progress import Advance, no_progress

# A file of its own: minipuzzle.json is compared with what was asked when an interrupted export continues.
DIGESTS_FILE = "digests.json"
_PIECE_ELEMENTS = 2**22


def tensor_digests(checkpoint: Checkpoint, advance: Advance = no_progress) -> dict[str, str]:
    """SHA-256 of each tensor as it is stored: its precision and shape, then its bytes."""
    found = {}
    for name, entry in sorted(checkpoint.entries.items()):
        digest = hashlib.sha256(f"{entry.dtype} {list(entry.shape)}\n".encode())
        for first, end in piece_rows(entry.shape, _PIECE_ELEMENTS):
            digest.update(checkpoint.unchecked_rows(name, first, end).reshape(-1).view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
        advance(1)
    return found


def record_digests(folder: Path) -> None:
    """Write the digests of what a folder holds beside it."""
    write_json(folder / DIGESTS_FILE, {"tensors": tensor_digests(Checkpoint.open(folder))})


def has_digests(checkpoint: Checkpoint) -> bool:
    """Whether digests were recorded."""
    return (checkpoint.folder / DIGESTS_FILE).is_file()


def changed_tensors(checkpoint: Checkpoint, advance: Advance = no_progress) -> list[str]:
    """Names of tensors that are not those whose digests were recorded.

    Raises: MinipuzzleError if the file of digests is damaged.
    """
    recorded = read_json(checkpoint.folder / DIGESTS_FILE).get("tensors")
    if not isinstance(recorded, dict) or not recorded:
        raise MinipuzzleError(f"{checkpoint.folder / DIGESTS_FILE} is damaged", "restore it, or export again")
    found = tensor_digests(checkpoint, advance)
    return sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
