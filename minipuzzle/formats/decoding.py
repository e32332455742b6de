"""Quantised checkpoints of any origin that read as plain ones: each tensor is decoded as it is read.

What a tensor is follows from how it is stored, not from who wrote it: E4M3 bytes, or two E2M1 values a byte, beside
scales for whole tensors, rows or blocks. That covers FP8 of ModelOpt and compressed-tensors, block FP8 as in
DeepSeek-V3 (arXiv 2412.19437, section 3.3), NVFP4 of both, and MXFP4 as in gpt-oss (OCP Microscaling Formats v1.0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from minipuzzle.errors import MinipuzzleError, warn
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import PLAIN_DTYPES, TensorEntry, torch_dtype

if TYPE_CHECKING:
    import torch

_PIECE_ELEMENTS = 2**20
_USUAL_BLOCK = 128  # of DeepSeek's files, where config.json is silent
_E8M0_BIAS = 127
_FP8, _FP4 = "F8_E4M3", "U8"
_FP4_SCALES = (_FP8, "U8", "F8_E8M0")
# Of activations and caches, which a plain model does not round; and the shape of what is packed.
_LEFT_ASIDE = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale", ".input_scale_ub", ".weight_shape")
_PLAIN_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_READ = ("modelopt", "compressed-tensors", "fp8", "fbgemm_fp8", "mxfp4")  # methods whose scales multiply
# What needs more than codes and scales to be read, by its name in config.json.
_REFUSED = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "pack-quantized": "packed integers"}


@dataclass(frozen=True, kw_only=True)
class _Naming:
    """What follows a tensor's name in those of its parts. ``tensor_scale``: over the scales, where there is one.

    ``is_transposed``: codes are ``[expert, outputs, blocks, bytes]`` of a tensor ``[expert, inputs, outputs]``.
    """

    codes: str
    scales: str
    tensor_scale: str = ""
    is_reciprocal: bool = False
    is_transposed: bool = False


_NAMINGS = (
    _Naming(codes="", scales="_scale", tensor_scale="_scale_2"),
    _Naming(codes="", scales="_scale_inv"),
    _Naming(codes="_packed", scales="_scale", tensor_scale="_global_scale", is_reciprocal=True),
    _Naming(codes="_blocks", scales="_scales", is_transposed=True),
)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """How one tensor is stored. ``shape``: of its values, in the order of the codes; ``parts``: the names of all."""

    name: str
    naming: _Naming
    parts: tuple[str, ...]
    title: str
    shape: tuple[int, ...]

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """As a plain model has it."""
        *outer, rows, columns = self.shape
        return (*outer, columns, rows) if self.naming.is_transposed else self.shape


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose weights read as plain ones, which is said; one that has plain weights as it is.

    Raises: MinipuzzleError for formats that cannot be decoded, by their name.
    """
    if not checkpoint.is_quantized:
        return checkpoint
    found = DecodedCheckpoint(checkpoint)
    warn(found.note)
    return found


class DecodedCheckpoint(Checkpoint):
    """A quantised checkpoint that reads like a plain one, in the precision that its config.json names, else BF16."""

    def __init__(self, source: Checkpoint) -> None:
        """Find from headers alone how each tensor is stored.

        Raises: MinipuzzleError naming the format or the tensor that cannot be decoded.
        """
        settings = source.config["quantization_config"]
        if not isinstance(settings, Mapping):
            raise MinipuzzleError("config.json: quantization_config is not an object", "restore the file")
        self._source, self._block = source, _block_of(settings)
        _refuse_by_name(source, settings)
        self._stored = {stored.name: stored for stored in _stored_tensors(source.entries)}
        parts = {part for stored in self._stored.values() for part in stored.parts}
        entries = {
            name: entry
            for name, entry in source.entries.items()
            if name not in parts and not name.endswith(_LEFT_ASIDE)
        }
        for name, entry in entries.items():
            if entry.dtype not in PLAIN_DTYPES:
                raise _cannot_decode(source, settings, f": {name} is stored as {entry.dtype}")
        dtype = str(source.config.get("dtype") or source.config.get("torch_dtype") or "bfloat16")
        self._dtype = _PLAIN_NAMES.get(dtype.removeprefix("torch."), "BF16")
        entries |= {stored.name: self._plain_entry(stored) for stored in self._stored.values()}
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        frozen = MappingProxyType(config), MappingProxyType(entries)
        super().__init__(source.folder, *frozen, is_fused=source.is_fused, hub_id=source.hub_id)

    @property
    def note(self) -> str:
        """What a user should know."""
        titles = sorted({stored.title for stored in self._stored.values()})
        return (
            f"{self.folder}: {len(self._stored):,} tensors are stored in {' and '.join(titles) or 'no format'} and "
            f"decoded to {self._dtype} as they are read; activations are not rounded"
        )

    @cached_property
    def fingerprint(self) -> str:
        """That of what is stored."""
        return self._source.fingerprint

    def unchecked_rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Rows of one tensor, decoded in float32 a piece at a time and rounded once.

        Raises: MinipuzzleError for scales that fit no blocks.
        """
        stored = self._stored.get(name)
        if stored is None:
            return super().unchecked_rows(name, start, stop)
        import torch

        start, stop, _ = slice(start, stop).indices(stored.shape[0])
        values = torch.empty((max(stop - start, 0), *stored.decoded_shape[1:]), dtype=torch_dtype(self._dtype))
        step = max(1, _PIECE_ELEMENTS // max(1, prod(stored.shape[1:])))
        scales, blocks = self._scales_and_blocks(stored)
        for first in range(start, stop, step):
            end = min(first + step, stop)
            codes = self._source.unchecked_rows(stored.parts[0], first, end)
            piece = _e2m1_values(codes) if codes.dtype == torch.uint8 else codes.float()
            factors = scales[torch.arange(first, end) // blocks[0]]
            for dim_idx in range(1, len(stored.shape)):
                factors = _spread(factors, dim_idx, blocks[dim_idx], stored.shape[dim_idx])
            piece = piece.reshape(end - first, *stored.shape[1:]).mul_(factors)
            values[first - start : end - start] = piece.transpose(-1, -2) if stored.naming.is_transposed else piece
        return values

    def _plain_entry(self, stored: _Stored) -> TensorEntry:
        codes = self._source.entries[stored.parts[0]]
        num_bytes = prod(stored.shape) * torch_dtype(self._dtype).itemsize
        return TensorEntry(
            shard=codes.shard, dtype=self._dtype, shape=stored.decoded_shape, num_bytes=num_bytes, offset=codes.offset
        )

    def _scales_and_blocks(self, stored: _Stored) -> tuple[torch.Tensor, list[int]]:
        """Scales in float32 with as many dimensions as the values, and how many of these share one along each."""
        _, of_scales, *of_tensor = stored.parts
        scales = _factors(self._source.unchecked_rows(of_scales, 0, None))
        for name in of_tensor:
            whole = _factors(self._source.unchecked_rows(name, 0, None)).reshape(-1, *(1,) * (scales.ndim - 1))
            scales = scales * (1 / whole if stored.naming.is_reciprocal else whole)
        num_dims = len(stored.shape)
        if scales.ndim == 2 * num_dims:  # ModelOpt's: rows of blocks, 1, columns of blocks, 1
            scales = scales.reshape(scales.shape[::2])
        if scales.numel() == 1:
            scales = scales.reshape((1,) * num_dims)
        scales = scales.reshape(*scales.shape, *(1,) * (num_dims - scales.ndim))
        blocks = [
            _block_along(size, num_blocks, block)
            for size, num_blocks, block in zip(stored.shape, scales.shape, self._blocks(num_dims), strict=True)
        ]
        if 0 in blocks or not bool((scales >= 0).all()):  # also true for NaN
            raise MinipuzzleError(f"{self.folder}: the scales of {stored.name} are damaged", "restore the checkpoint")
        return scales, blocks

    def _blocks(self, num_dims: int) -> list[int]:
        return [_USUAL_BLOCK] * (num_dims - len(self._block)) + list(self._block)


def _stored_tensors(entries: Mapping[str, TensorEntry]) -> Iterator[_Stored]:
    for part, entry in entries.items():
        for naming in _NAMINGS if entry.dtype in (_FP8, _FP4) else ():
            name = part.removesuffix(naming.codes)
            scales = entries.get(name + naming.scales)
            if scales is None or not part.endswith(naming.codes) or len(entry.shape) < 2:
                continue
            if entry.dtype == _FP4 and scales.dtype not in _FP4_SCALES:
                continue
            of_tensor = name + naming.tensor_scale
            others = (of_tensor,) if naming.tensor_scale and of_tensor in entries else ()
            shape = (*entry.shape[:-2], prod(entry.shape[-2:])) if naming.is_transposed else entry.shape
            title = "FP8"
            if entry.dtype == _FP4:
                shape, title = (*shape[:-1], 2 * shape[-1]), "NVFP4" if scales.dtype == _FP8 else "MXFP4"
            yield _Stored(
                name=name, naming=naming, parts=(part, name + naming.scales, *others), title=title, shape=shape
            )
            break


def _block_of(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows and columns that share a scale, as config.json has them; the usual ones where it is silent."""
    groups = settings.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    named = [one.get("block_structure") for one in weights if isinstance(one, Mapping)]
    for block in (settings.get("weight_block_size"), *named):
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            return tuple(block)
    return (_USUAL_BLOCK, _USUAL_BLOCK)


def _block_along(size: int, num_blocks: int, block: int) -> int:
    """How many of ``size`` values share one of ``num_blocks`` scales; 0 if they cannot."""
    if -(-size // block) == num_blocks:
        return block
    return size // num_blocks if num_blocks and size % num_blocks == 0 else 0


def _spread(factors: torch.Tensor, dim_idx: int, block: int, size: int) -> torch.Tensor:
    """Scales of blocks for each value of them; one for all stays one."""
    if factors.shape[dim_idx] in (1, size):
        return factors
    return factors.repeat_interleave(block, dim_idx).narrow(dim_idx, 0, size)


def _factors(scales: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.exp2(scales.float() - _E8M0_BIAS) if scales.dtype == torch.uint8 else scales.float()


def _e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    from minipuzzle.formats.e2m1 import unpacked

    return unpacked(codes)


def _refuse_by_name(source: Checkpoint, settings: Mapping[str, Any]) -> None:
    said = " ".join(str(settings.get(name)).lower() for name in ("quant_method", "quant_algo", "format"))
    for name, title in _REFUSED.items():
        if name in said.replace("_", " ").split():
            raise _cannot_decode(source, settings, f", which is {title}")
    if settings.get("quant_method") not in _READ:
        raise _cannot_decode(source, settings, "")


def _cannot_decode(source: Checkpoint, settings: Mapping[str, Any], why: str) -> MinipuzzleError:
    names = (settings.get("quant_method"), settings.get("quant_algo") or settings.get("format"))
    method = "/".join(str(name) for name in names if name)
    return MinipuzzleError(
        f"{source.folder}: weights quantised as {method} cannot be decoded{why}",
        "use the plain weights that they were made from; FP8, NVFP4 and MXFP4 are decoded",
    )
