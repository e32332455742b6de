"""safetensors files: headers read and checked without their weights, shards written one at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import write_json

if TYPE_CHECKING:
    import torch


INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DEFAULT_SHARD_BYTES = 5 * 10**9
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies on disk."""

    shard: Path
    dtype: str  # safetensors' name of it, e.g. BF16
    shape: tuple[int, ...]
    num_bytes: int
    offset: int  # of its first byte in the file


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file, after checking that all its bytes are there.

    Raises: MinipuzzleError for a missing, truncated or malformed file.
    """
    hint = "download or copy the file again"
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
            if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, file_bytes):
                raise MinipuzzleError(f"{path} is truncated or not a safetensors file", hint)
            header = json.loads(file.read(header_bytes))
    except FileNotFoundError:
        raise MinipuzzleError(f"{path} does not exist", "a shard of the checkpoint is missing: " + hint) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise MinipuzzleError(f"{path} has an unreadable safetensors header", hint) from None
    entries, end = {}, 0
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        begin, end_of_tensor = fields["data_offsets"]
        entries[name] = TensorEntry(
            shard=path,
            dtype=fields["dtype"],
            shape=tuple(fields["shape"]),
            num_bytes=end_of_tensor - begin,
            offset=_HEADER_LENGTH_BYTES + header_bytes + begin,
        )
        end = max(end, end_of_tensor)
    expected_bytes = _HEADER_LENGTH_BYTES + header_bytes + end
    if file_bytes != expected_bytes:
        raise MinipuzzleError(f"{path} is truncated: {file_bytes:,} bytes of {expected_bytes:,}", hint)
    return entries


_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


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
