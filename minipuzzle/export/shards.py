"""Safetensors shards whose content is known in advance: tensors are written piece by piece, in constant memory.

A shard appears under its final name once it is complete; what an interrupted run has finished is not written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from minipuzzle.files.json_files import write_json
from minipuzzle.files.outputs import write_whole
from minipuzzle.files.safetensors_files import HEADER_LENGTH_BYTES, INDEX_FILE, SINGLE_FILE, torch_dtype

_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """A tensor that will be written: its name, safetensors' name of its precision, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return torch_dtype(self.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.itemsize


class Shard:
    """One file: its tensors, where each of them begins, and its header."""

    def __init__(self, path: Path, headers: Sequence[TensorHeader]) -> None:
        self.path = path
        self.headers = {header.name: header for header in headers}
        self._offsets: dict[str, int] = {}
        fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wider elements first, as readers that map files want each tensor at a multiple of its element's size.
        for header in sorted(headers, key=lambda header: -header.itemsize):
            begin, end = end, end + header.num_bytes
            self._offsets[header.name] = begin
            fields[header.name] = {"dtype": header.dtype, "shape": header.shape, "data_offsets": [begin, end]}
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT_BYTES)
        self._header = len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text
        self.file_bytes = len(self._header) + end
        self._file: FileIO | None = None

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run wrote this file."""
        return self.path.is_file() and self.path.stat().st_size == self.file_bytes

    @contextmanager
    def open(self) -> Iterator[None]:
        """Write the file within this block; it gets its name at the end of it."""
        with write_whole(self.path) as path, path.open("wb", buffering=0) as file:
            _write_all(file, self._header, 0)
            file.truncate(self.file_bytes)
            self._file = file
            yield
            self._file = None
            os.fsync(file.fileno())

    def write(self, name: str, values: torch.Tensor, *, first_row: int = 0) -> None:
        """Write some rows of a tensor, or all of it."""
        header = self.headers[name]
        assert self._file is not None
        assert values.dtype == torch_dtype(header.dtype), f"{name}: {values.dtype} is not {header.dtype}"
        assert values.shape[1:] == header.shape[1:], f"{name}: {values.shape} are not rows of {header.shape}"
        row_bytes = prod(header.shape[1:]) * header.itemsize
        offset = len(self._header) + self._offsets[name] + first_row * row_bytes
        _write_all(self._file, values.contiguous().cpu().flatten().view(torch.uint8).numpy(), offset)


def _write_all(file: FileIO, content: Any, offset: int) -> None:
    """Write bytes at an offset, in whatever pieces the system takes; threads may write at once."""
    view = memoryview(content)
    while view:
        num_written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[num_written:], offset + num_written


def plan_shards(folder: Path, units: Sequence[Sequence[TensorHeader]], max_shard_bytes: int) -> list[Shard]:
    """Divide tensors over files in their order; the tensors of a unit share a file."""
    bins: list[list[TensorHeader]] = [[]]
    filled_bytes = 0
    for unit in units:
        unit_bytes = sum(header.num_bytes for header in unit)
        if bins[-1] and filled_bytes + unit_bytes > max_shard_bytes:
            bins.append([])
            filled_bytes = 0
        bins[-1] += unit
        filled_bytes += unit_bytes
    if len(bins) == 1:
        return [Shard(folder / SINGLE_FILE, bins[0])]
    names = (f"model-{number:05d}-of-{len(bins):05d}.safetensors" for number in range(1, len(bins) + 1))
    return [Shard(folder / name, headers) for name, headers in zip(names, bins, strict=True)]


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index of several shards; a single file needs none."""
    if len(shards) > 1:
        total_bytes = sum(header.num_bytes for shard in shards for header in shard.headers.values())
        weight_map = {name: shard.path.name for shard in shards for name in shard.headers}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
