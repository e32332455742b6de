"""Hugging Face checkpoint folders: read lazily, checked from their headers, written in shards.

Only safetensors are read. Everything that headers can tell (missing or truncated shards, names, shapes) is checked
before any weight is read; NaN and infinite values are caught as each tensor is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from minipuzzle.architecture.configs.composite import TEXT_CONFIG
from minipuzzle.architecture.configs.puzzle import without_blocks
from minipuzzle.architecture.families import Family, family_of, read_architecture
from minipuzzle.architecture.model import Architecture, carried_tensor
from minipuzzle.errors import MinipuzzleError, warn
from minipuzzle.files.companions import CHAT_TEMPLATES, COMPANION_FILES
from minipuzzle.files.fused_experts import split_entries
from minipuzzle.files.hub import fetched, is_hub_id
from minipuzzle.files.json_files import read_json, tagged, untagged, write_json
from minipuzzle.files.safetensors_files import (
    INDEX_FILE,
    PLAIN_DTYPES,
    SINGLE_FILE,
    Slab,
    TensorEntry,
    read_safetensors_header,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch

DERIVED_TABLES = ".rotary_emb.inv_freq"  # in early Llama files; every reader computes them from config.json
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def read_config(path: Path) -> Mapping[str, Any]:
    """config.json of a folder or a model on a hub, or a file of that kind; ``block_configs`` as our per-layer layout.

    Raises: MinipuzzleError if it is missing or damaged.
    """
    path = fetched(str(path), has_weights=False) if is_hub_id(path) else path
    config = without_blocks(untagged(read_json(path / "config.json" if path.is_dir() else path)))
    return {key: value for key, value in config.items() if key != "quantization_config" or value is not None}


def holds_weights(folder: Path) -> bool:
    """Whether weights lie in a folder, under the names that are read."""
    return any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def architecture_at(path: Path) -> Architecture:
    """What a folder or a config.json says that a model is; of a composite's folder, headers of weights are read, too.

    Raises: MinipuzzleError if something is missing or damaged.
    """
    config = read_config(path)
    if config.get(TEXT_CONFIG) and holds_weights(path):
        return Checkpoint.open(path).architecture
    return read_architecture(config)


def save_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a folder's config.json; numbers that JSON does not have are written as transformers writes them."""
    write_json(folder / "config.json", tagged(config))


class Checkpoint:
    """A checkpoint folder: its configuration, its architecture and, on demand, its tensors.

    ``is_fused``: whether its files hold the experts of a block in one tensor, which the entries take apart.
    ``origin``: the whole in the folder, of which this may be a part; ``tokenizer_folder``: whose tokenizer has its ids.
    ``hub_id``: its name on the hub, where it came from there.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        entries: Mapping[str, TensorEntry],
        *,
        is_fused: bool = False,
        hub_id: str | None = None,
    ) -> None:
        self.folder = self.tokenizer_folder = folder
        self.origin: Checkpoint = self
        self.hub_id = hub_id
        self.config = config
        self.entries = entries
        self.family: Family = family_of(config)
        carried = (
            carried_tensor(name, entry.shape, axes, is_dispensable=may_go)
            for name, entry in entries.items()
            if self.family.carries(name)
            for axes, may_go in (self.family.followed_axes(name),)
        )
        self.architecture: Architecture = replace(self.family.read(config), carried=tuple(carried))
        self.is_fused = is_fused or self.architecture.names.is_always_fused
        self._slab: tuple[object, torch.Tensor] | None = None

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the config.json of a folder, or of a model on a hub, and the headers of all its shards.

        Raises: MinipuzzleError if anything is missing, truncated or outside the folder.
        """
        hub_id = str(folder) if is_hub_id(folder) else None
        if hub_id is not None:
            folder = fetched(hub_id, (*COMPANION_FILES, f"{CHAT_TEMPLATES}/*"))
        if not folder.is_dir():
            hint = "give the folder of a Hugging Face checkpoint, or a name on the hub: org/name or org/name@revision"
            raise MinipuzzleError(f"{folder} is not a folder", hint)
        config = dict(read_config(folder))
        family = family_of(config)
        known = _known_entries(folder, family, config, _read_entries(folder))
        entries, is_fused = split_entries(family.read(config), known)
        checkpoint = cls(folder, MappingProxyType(config), MappingProxyType(entries), is_fused=is_fused, hub_id=hub_id)
        changes = _stored_dtype(checkpoint) | _tie_as_stored(checkpoint, entries)
        if changes:
            changed = MappingProxyType(config | changes)
            return cls(folder, changed, checkpoint.entries, is_fused=is_fused, hub_id=hub_id)
        return checkpoint

    @property
    def name(self) -> str:
        """The model as others know it: its name on the hub, or that of its folder."""
        return self.hub_id or self.folder.resolve().name

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are an FP8 or FP4 export rather than plain floating point."""
        return "quantization_config" in self.config

    def require_plain_weights(self) -> None:
        """Check names and shapes of all tensors against the architecture; exports with scales are refused.

        Raises: MinipuzzleError naming the first tensor that is missing, unexpected or misshapen.
        """
        if self.is_quantized:
            raise MinipuzzleError(
                f"{self.folder} is quantised (config.json has quantization_config) and was not decoded",
                "give its folder instead, which is decoded when it is opened",
            )
        expected = {tensor.name: tensor.shape for tensor in (*self.architecture.tensors(), *self.architecture.carried)}
        hint = "config.json and the weights do not belong together"
        for name in expected.keys() - self.entries.keys():
            raise MinipuzzleError(f"{self.folder}: tensor {name} is missing", hint)
        for name in self.entries.keys() - expected.keys():
            raise MinipuzzleError(f"{self.folder}: tensor {name} is unexpected", hint)
        for name, shape in expected.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise MinipuzzleError(f"{self.folder}: {name} has shape {list(entry.shape)}, not {list(shape)}", hint)
            if entry.dtype not in PLAIN_DTYPES:
                raise MinipuzzleError(
                    f"{self.folder}: {name} is stored as {entry.dtype}, and config.json does not say how to decode it",
                    f"use weights stored as one of {', '.join(PLAIN_DTYPES)}",
                )

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored precision.

        Raises: MinipuzzleError if it holds NaN or infinite values.
        """
        return self.rows(name, 0, None)

    def rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Read part of one tensor along its first dimension, as a slice would; 0-d tensors are read whole.

        Raises: MinipuzzleError if it holds NaN or infinite values.
        """
        return self.rows_and_amax(name, start, stop)[0]

    def rows_and_amax(self, name: str, start: int, stop: int | None) -> tuple[torch.Tensor, float]:
        """Rows of one tensor, and their largest absolute value; 0 for integers and FP8 codes, which are not looked at.

        Raises: MinipuzzleError if they hold NaN or infinite values.
        """
        tensor = self.unchecked_rows(name, start, stop)
        # FP8 has no kernel for it; readers of quantised exports check its codes.
        if not (tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel()):
            return tensor, 0.0
        smallest, largest = tensor.aminmax()  # NaN if there is one; much faster than isfinite on every element
        amax = max(-float(smallest), float(largest))
        if not math.isfinite(amax):
            shard = self.entries[name].shard
            raise MinipuzzleError(f"{name} in {shard} holds NaN or infinite values", "restore the checkpoint")
        return tensor, amax

    def unchecked_rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Rows of one tensor, whatever their values.

        The bytes are read, not mapped: pages of a mapped file would stay counted as this process's memory.
        """
        entry = self.entries[name]
        if entry.slab is None:
            return _read_rows(entry, start, stop)
        return self._scattered(entry, entry.slab)[start:stop].contiguous()

    def _scattered(self, entry: TensorEntry, slab: Slab) -> torch.Tensor:
        """A tensor that is scattered over a slab, which stays until the next: tensors are read a few rows at a time."""
        key = entry.shard, entry.offset
        if self._slab is None or self._slab[0] != key:
            num_bytes = entry.num_bytes // prod(entry.shape) * prod(slab.shape)
            self._slab = key, _read_rows(replace(entry, shape=slab.shape, num_bytes=num_bytes), 0, None)
        matrix = self._slab[1].T if slab.is_transposed else self._slab[1]
        return matrix[slab.start :: slab.step][: entry.shape[0]]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.num_bytes for entry in self.entries.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes with the configuration, with any header, and with sampled blocks of every shard.

        Hashing 100 GB in full would take longer than many a command; 16 blocks of 64 KiB a shard do not.
        """
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for shard in sorted({entry.shard for entry in self.entries.values()}):
            _hash_sampled_blocks(shard, digest)
        return digest.hexdigest()[:16]


def _read_rows(entry: TensorEntry, start: int, stop: int | None) -> torch.Tensor:
    import torch

    num_rows = entry.shape[0] if entry.shape else 1
    start, stop, _ = slice(start, stop).indices(num_rows)
    row_bytes = entry.num_bytes // max(num_rows, 1)
    content = torch.empty(max(stop - start, 0) * row_bytes, dtype=torch.uint8)
    _read_into(entry.shard, entry.offset + start * row_bytes, content.numpy())
    shape = (max(stop - start, 0), *entry.shape[1:]) if entry.shape else ()
    return content.view(torch_dtype(entry.dtype)).view(shape)


def _read_into(path: Path, offset: int, buffer: Any) -> None:
    """Fill a byte buffer from a file, in whatever pieces the system gives."""
    view = memoryview(buffer)
    with FileIO(path) as file:
        file.seek(offset)
        while view:
            num_read = file.readinto(view)
            if not num_read:
                raise MinipuzzleError(f"{path} ended early", "the file changed while it was read")
            view = view[num_read:]


def _read_entries(folder: Path) -> dict[str, TensorEntry]:
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        _require_weights(folder)
        return read_safetensors_header(folder / SINGLE_FILE)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise MinipuzzleError(f"{index_path} has no weight_map of names of files", "restore the file from its source")
    if (folder / SINGLE_FILE).exists() and SINGLE_FILE not in weight_map.values():
        raise MinipuzzleError(
            f"{folder} holds {SINGLE_FILE} beside {INDEX_FILE}, which names other files: readers differ in which they "
            "take",
            "remove the one that is stale",
        )
    shards: dict[str, dict[str, TensorEntry]] = {}
    for shard_name in sorted(set(weight_map.values())):
        path = folder / shard_name
        if path.parent.resolve() != folder.resolve():
            raise MinipuzzleError(
                f"{index_path} points outside its folder: {shard_name!r}", "do not use this checkpoint"
            )
        shards[shard_name] = read_safetensors_header(path)
    for name, shard_name in weight_map.items():
        if name not in shards[shard_name]:
            raise MinipuzzleError(f"{shard_name} does not hold {name}, which the index promises", "restore the shard")
    found: dict[str, TensorEntry] = {}
    for shard_name, entries in shards.items():
        for name in entries.keys() & found.keys():
            raise MinipuzzleError(f"{name} is in {shard_name} and in {found[name].shard.name}", "restore the shards")
        found |= entries
    return found


def _require_weights(folder: Path) -> None:
    """Refuse a folder without an index or a single file of weights.

    Raises: MinipuzzleError naming what there is instead.
    """
    path = folder / SINGLE_FILE
    if path.exists() or path.is_symlink():
        return
    found = {suffix: sorted(path.name for path in folder.glob(f"*{suffix}")) for suffix in _WEIGHT_SUFFIXES}
    for suffix, names in found.items():
        if names:
            is_shards = suffix == ".safetensors"
            problem = f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}, but {', '.join(names[:3])}"
            hint = (
                f"copy {INDEX_FILE} from the source" if is_shards else "convert it: load and save it with transformers"
            )
            raise MinipuzzleError(problem + (f" and {len(names) - 3} more" if len(names) > 3 else ""), hint)


def _known_entries(
    folder: Path, family: Family, config: Mapping[str, Any], found: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Entries under our names, without what every reader computes or leaves aside."""
    ignored = family.modules.ignored.format_map(config)
    entries: dict[str, TensorEntry] = {}
    num_ignored = 0
    for name, entry in found.items():
        ours = family.modules.disk_name(name)
        if ignored and name.startswith(ignored):
            num_ignored += 1
        elif ours in entries:
            raise MinipuzzleError(f"{folder}: {ours} is stored twice, under two names", "restore the checkpoint")
        elif not name.endswith(DERIVED_TABLES):
            entries[ours] = entry
    if num_ignored:
        warn(
            f"{folder}: {num_ignored} tensors named {ignored}* are left aside: they predict several "
            "tokens at once, and nothing here measures, cuts or writes them"
        )
    return entries


def _stored_dtype(checkpoint: Checkpoint) -> dict[str, str]:
    """The weights' own dtype, where config.json is silent and the weights are plain."""
    largest = max(checkpoint.entries.values(), key=lambda entry: entry.num_bytes, default=None)
    is_silent = not (checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    if largest is None or not is_silent or checkpoint.is_quantized or largest.dtype not in PLAIN_DTYPES:
        return {}
    return {"dtype": str(torch_dtype(largest.dtype)).removeprefix("torch.")}


def _tie_as_stored(checkpoint: Checkpoint, entries: dict[str, TensorEntry]) -> dict[str, bool]:
    """What config.json should say of a tied head that is stored all the same: an equal copy is dropped from
    ``entries``, another one kept apart, as transformers does."""
    names = checkpoint.architecture.names
    if not checkpoint.architecture.tied_embeddings or names.head not in entries:
        return {}
    if names.embeddings not in entries:
        entries[names.embeddings] = entries.pop(names.head)
    elif _holds_equal(checkpoint, names.embeddings, names.head):
        del entries[names.head]
    else:
        warn(
            f"{checkpoint.folder}: config.json ties {names.head} to the embeddings, but the weights differ: they are "
            "kept apart, as transformers does"
        )
        return {"tie_word_embeddings": False}
    return {}


def _holds_equal(checkpoint: Checkpoint, name: str, other: str, rows: int = 4096) -> bool:
    """Whether two tensors are equal, read a few rows at a time."""
    entries = checkpoint.entries[name], checkpoint.entries[other]
    if entries[0].shape != entries[1].shape or entries[0].dtype != entries[1].dtype:
        return False
    for start in range(0, entries[0].shape[0] if entries[0].shape else 1, rows):
        first, second = (checkpoint.unchecked_rows(each, start, start + rows) for each in (name, other))
        if not bool((first == second).all()):
            return False
    return True


def _hash_sampled_blocks(path: Path, digest: Any, num_blocks: int = 16, block_bytes: int = 65536) -> None:
    file_bytes = path.stat().st_size
    digest.update(f"{path.name}:{file_bytes}".encode())
    with path.open("rb") as file:
        for block_idx in range(num_blocks):
            file.seek(max(0, (file_bytes - block_bytes) * block_idx // (num_blocks - 1)))
            digest.update(file.read(block_bytes))
