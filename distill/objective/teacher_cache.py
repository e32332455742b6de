"""A teacher's distributions kept on disk, for further epochs and further students: its K likeliest tokens and the rest.

``<folder>/cache.json`` says whose targets these are. Every process appends to a part of its own:
``part-<id>.targets`` holds one record a window, ``part-<id>.keys`` a 16-byte hash of the window's tokens and one of
these tokens with their record. A key is written after its record, so a run killed at any moment leaves only records
that nobody finds; one that no longer has its hash is computed again. Because the key is the text itself, it does not
matter which student, seed, blend or step a window was met in.

A token takes K ids (2 bytes each up to 65,536 tokens, 3 beyond) and K + 1 log-probabilities in steps of 1/2048 nat (2
bytes each): 258 or 322 bytes for K = 64, where all logits in bfloat16 would take 2 bytes a token of the vocabulary.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.objective.losses import TopKTargets
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import read_json, write_json

CACHE_FILE = "cache.json"
_SCHEMA_VERSION = 2  # version 1 had no hashes of records
_KEY_BYTES = 16
_ENTRY_BYTES = 2 * _KEY_BYTES
_STEPS_PER_NAT = 2048
_LARGEST_CODE = 65535
_SHORT_IDS = 1 << 16
_UNFINISHED = ".cache-"
_Place = tuple[Path, int, bytes]  # the part, the number of its record, and the hash of that


@dataclass(frozen=True, kw_only=True)
class CacheDescription:
    """Whose targets a cache holds, and how many of them. What differs is another cache."""

    teacher_fingerprint: str
    vocabulary: int
    top_k: int
    temperature: float
    sequence_length: int
    dtype: str
    schema_version: int = _SCHEMA_VERSION

    @property
    def id_bytes(self) -> int:
        """Bytes of one token id."""
        return 2 if self.vocabulary <= _SHORT_IDS else 3

    @property
    def bytes_per_token(self) -> int:
        """Bytes on disk of one token's targets."""
        return self.top_k * (self.id_bytes + 2) + 2

    @property
    def window_bytes(self) -> int:
        """Bytes on disk of one window's targets, without its key."""
        return self.sequence_length * self.bytes_per_token


class TeacherCache:
    """The targets of one teacher in a folder that many processes and runs may share.

    Raises: MinipuzzleError if the folder holds targets of another teacher, number or temperature.
    """

    def __init__(self, folder: Path, description: CacheDescription) -> None:
        self.folder = folder
        self.description = description
        self.num_found = self.num_written = self.num_damaged = 0
        self._places: dict[bytes, list[_Place]] = {}
        self._read_keys: dict[Path, int] = {}
        self._own_part = folder / f"part-{uuid.uuid4().hex}.targets"
        _claim(folder, description)
        self._refresh()

    @property
    def num_windows(self) -> int:
        """Windows whose targets are known."""
        return len(self._places)

    def holds(self, token_ids_BT: Tensor) -> bool:
        """Whether the targets of all windows are known, and are what was written."""
        keys = _keys_of(token_ids_BT)
        if not all(self._read(key) for key in keys):
            self._refresh()  # another process may have met them
        return all(self._read(key) for key in keys)

    def targets(self, token_ids_BT: Tensor, compute: Callable[[], TopKTargets] | None) -> TopKTargets:
        """Targets of all tokens of some windows; ``compute`` gives those of all of them, and what is new is written.

        What comes back was read from disk always, so that a window's targets are the same in every epoch.
        """
        keys = _keys_of(token_ids_BT)
        if compute is not None:
            self._write(keys, compute())
        else:
            self.num_found += len(keys)
        records = b"".join(self._read(key) or _unreadable(self.folder) for key in keys)
        return decode_targets(records, self.description, token_ids_BT.device)

    def _write(self, keys: Sequence[bytes], targets: TopKTargets) -> None:
        records = encode_targets(targets, self.description)
        size = self.description.window_bytes
        new = [idx for idx, key in enumerate(keys) if key not in keys[:idx] and not self._read(key)]
        entries = []
        with self._own_part.open("ab") as file:
            first = file.tell() // size
            for number, idx in enumerate(new, start=first):
                record = records[idx * size : (idx + 1) * size]
                file.write(record)
                entries.append(keys[idx] + _hash(keys[idx] + record))
                self._places.setdefault(keys[idx], []).append((self._own_part, number, entries[-1][_KEY_BYTES:]))
        with self._own_part.with_suffix(".keys").open("ab") as file:
            file.write(b"".join(entries))
        self._read_keys[self._own_part] = first + len(new)
        self.num_written += len(new)

    def _read(self, key: bytes) -> bytes | None:
        """A window's record from the first place that still holds what was written there; None if there is none."""
        while places := self._places.get(key):
            part, number, wanted = places[0]
            with suppress(OSError), part.open("rb") as file:
                file.seek(number * self.description.window_bytes)
                record = file.read(self.description.window_bytes)
                if _hash(key + record) == wanted:
                    return record
            del places[0]
            self.num_damaged += 1
        self._places.pop(key, None)
        return None

    def _refresh(self) -> None:
        for part in sorted(self.folder.glob("part-*.targets")):
            keys_file = part.with_suffix(".keys")
            if not keys_file.exists():
                continue
            known = self._read_keys.get(part, 0)
            num_records = part.stat().st_size // self.description.window_bytes
            with keys_file.open("rb") as file:
                file.seek(known * _ENTRY_BYTES)
                found = file.read()
            num_keys = min(known + len(found) // _ENTRY_BYTES, num_records)
            for number in range(known, num_keys):
                start = (number - known) * _ENTRY_BYTES
                key, of_record = found[start : start + _KEY_BYTES], found[start + _KEY_BYTES : start + _ENTRY_BYTES]
                self._places.setdefault(key, []).append((part, number, of_record))
            self._read_keys[part] = num_keys


def encode_targets(targets: TopKTargets, description: CacheDescription) -> bytes:
    """Rows of targets as records, one after the other."""
    token_ids = targets.token_ids.cpu().numpy().astype("<u4")
    id_bytes = token_ids[..., None].view(np.uint8)[..., : description.id_bytes].reshape(len(token_ids), -1)
    codes = (-targets.log_p.cpu().double().numpy() * _STEPS_PER_NAT).round().clip(0, _LARGEST_CODE).astype("<u2")
    return np.concatenate([id_bytes, codes.view(np.uint8).reshape(len(codes), -1)], axis=1).tobytes()


def decode_targets(records: bytes, description: CacheDescription, device: torch.device) -> TopKTargets:
    """Rows of targets from records; rounding is undone as far as that each row sums to one."""
    rows = np.frombuffer(records, np.uint8).reshape(-1, description.bytes_per_token)
    num_rows, top_k, id_bytes = len(rows), description.top_k, description.id_bytes
    ids = np.zeros((num_rows, top_k, 4), np.uint8)
    ids[..., :id_bytes] = rows[:, : top_k * id_bytes].reshape(num_rows, top_k, id_bytes)
    codes = np.ascontiguousarray(rows[:, top_k * id_bytes :]).view("<u2").astype(np.float32)
    return TopKTargets(
        token_ids=torch.from_numpy(ids.view("<u4")[..., 0].astype(np.int64)).to(device),
        log_p=torch.from_numpy(-codes / _STEPS_PER_NAT).log_softmax(-1).to(device),
        vocabulary=description.vocabulary,
        temperature=description.temperature,
    )


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


def _unreadable(folder: Path) -> bytes:
    raise MinipuzzleError(f"{folder} does not give back what was just written there", "check the disk")


def _keys_of(token_ids_BT: Tensor) -> list[bytes]:
    rows = token_ids_BT.to("cpu", torch.int32).numpy().astype("<i4")
    return [_hash(row.tobytes()) for row in rows]


def is_cache(folder: Path) -> bool:
    """Whether a folder is a teacher cache, or empty but for what others have just begun."""
    is_begun = all(member.name.startswith(_UNFINISHED) for member in folder.iterdir())
    return is_begun or (folder / CACHE_FILE).exists()


def _claim(folder: Path, description: CacheDescription) -> None:
    """Write what a new folder will hold, or compare with what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    path, wanted = folder / CACHE_FILE, asdict(description)
    if not path.exists():
        if not is_cache(folder):
            raise MinipuzzleError(f"{folder} holds files, but is no teacher cache", "give ‹teacher_cache› a new folder")
        unfinished = folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
        write_json(unfinished, wanted)
        unfinished.replace(path)  # whole, whoever comes first
        return
    found = read_json(path)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise MinipuzzleError(
                f"{folder} was written with {name.replace('_', ' ')} {found.get(name)}, not {value}",
                "give another folder as ‹teacher_cache›, or the settings it was written with",
            )
