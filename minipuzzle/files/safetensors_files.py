"""safetensors files: headers read and checked without their weights, shards written one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import parse_json, require_regular_file, write_json

if TYPE_CHECKING:
    import torch


INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DEFAULT_SHARD_BYTES = 5 * 10**9
HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class Slab:
    """A matrix, or vector, of which a tensor is every ``step``-th row from ``start`` on; of its transpose if it is
    transposed."""

    shape: tuple[int, ...]
    start: int
    step: int
    is_transposed: bool


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies on disk; ``slab``: what is there, if the tensor is scattered over it."""

    shard: Path
    dtype: str  # safetensors' name of it, e.g. BF16
    shape: tuple[int, ...]
    num_bytes: int
    offset: int  # of its first byte in the file, or of the first of its slab
    slab: Slab | None = None


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file, after checking that all its bytes are there.

    Raises: MinipuzzleError for a missing, truncated or malformed file.
    """
    hint = "download or copy the file again"
    file_bytes = require_regular_file(path, "a file of the checkpoint is missing: " + hint)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, file_bytes):
            raise MinipuzzleError(f"{path} is truncated or not a safetensors file", hint)
        header = parse_json(file.read(header_bytes), f"the safetensors header of {path}", hint)
    if not isinstance(header, dict):
        raise MinipuzzleError(f"{path} has an unreadable safetensors header", hint)
    begin_of_data = HEADER_LENGTH_BYTES + header_bytes
    entries = {
        name: _entry(path, name, fields, begin_of_data) for name, fields in header.items() if name != "__metadata__"
    }
    end = begin_of_data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            raise MinipuzzleError(f"{path}: the bytes of {name} overlap others, or leave a hole before it", hint)
        end += entry.num_bytes
    if file_bytes != end:
        raise MinipuzzleError(f"{path} is truncated or too long: {file_bytes:,} bytes of {end:,}", hint)
    return entries


def _entry(path: Path, name: str, fields: Any, begin_of_data: int) -> TensorEntry:
    """One entry of a header, by the rules of the format.

    Raises: MinipuzzleError naming the tensor.
    """
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    is_whole = isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2
    if not is_whole or offsets[1] < offsets[0]:
        raise MinipuzzleError(f"{path}: the header's entry of {name} is damaged", "download or copy the file again")
    num_bytes = offsets[1] - offsets[0]
    if (size := _DTYPE_BYTES.get(dtype)) is not None and prod(shape) * size != num_bytes:
        raise MinipuzzleError(
            f"{path}: {name} of shape {shape} in {dtype} has {num_bytes:,} bytes, not {prod(shape) * size:,}",
            "download or copy the file again",
        )
    return TensorEntry(
        shard=path, dtype=dtype, shape=tuple(shape), num_bytes=num_bytes, offset=begin_of_data + offsets[0]
    )


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64"), 8),
    **dict.fromkeys(("F32", "I32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")  # of weights that can be measured, cut and trained as they are


def torch_dtype(name: str) -> torch.dtype:
    """torch's name of a precision that safetensors calls ``name``.

    Raises: MinipuzzleError for one that torch or this tool does not know.
    """
    import torch

    if name not in _TORCH_DTYPES:
        raise MinipuzzleError(f"tensors stored as {name} cannot be read", f"known are {', '.join(_TORCH_DTYPES)}")
    dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[name])
    return dtype


class ShardWriter:
    """Writes tensors into safetensors shards as they come, holding at most one shard in memory."""

    def __init__(self, folder: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._written: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor; a full shard is written at once."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + num_bytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += num_bytes

    def finish(self) -> None:
        """Write the last shard, give shards their final names, and write the index if there are several."""
        self._flush()
        if len(self._written) == 1:
            self._written[0][0].rename(self.folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._written, start=1):
            final_name = f"model-{number:05d}-of-{len(self._written):05d}.safetensors"
            path.rename(self.folder / final_name)
            weight_map |= dict.fromkeys(names, final_name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_json(self.folder / INDEX_FILE, index)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._pending:
            return
        path = self.folder / f"shard-{len(self._written)}.unfinished"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(self.folder.stat().st_mode & 0o666)  # safetensors lets only the owner read; servers run as others
        self._written.append((path, list(self._pending)))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
