"""The tensors of an export, computed from the source and written piece by piece in bounded memory.

A weight is read a few thousand rows at a time; where one scale serves a whole tensor, or a group that engines fuse, its
largest value is found in a first reading.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path

import torch

from minipuzzle.architecture.configs.puzzle import CONFIG_MODULE, write_puzzle_config
from minipuzzle.architecture.model import Architecture, PlacedTensor, StoredTensor
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.calibration import ActivationAmax
from minipuzzle.export.shards import Shard, TensorHeader, plan_shards, write_index
from minipuzzle.files.checkpoint import Checkpoint, save_config
from minipuzzle.files.companions import copy_companions
from minipuzzle.files.fused_experts import assembled
from minipuzzle.files.json_files import write_json
from minipuzzle.files.safetensors_files import DEFAULT_SHARD_BYTES, torch_dtype
from minipuzzle.formats.e4m3 import scale_of
from minipuzzle.formats.flavours import INPUT_SCALE, SCALES, TENSOR_SCALE
from minipuzzle.formats.layout import WEIGHT, ExportLayout, module_of
from minipuzzle.progress import Advance, no_progress

PIECE_ELEMENTS = 2**17  # float32 copies of this many elements stay in a processor's cache
_ONE = torch.tensor(1.0)


def portable_config(checkpoint: Checkpoint, *, is_puzzle: bool = False) -> dict[str, object]:
    """The config.json that all engines read alike, for BF16 weights; ``is_puzzle``: with ``block_configs``.

    Raises: MinipuzzleError if that form cannot say what the model is.
    """
    architecture = checkpoint.architecture.deployed
    config = checkpoint.family.write(checkpoint.config, architecture)
    if is_puzzle:
        config = write_puzzle_config(config, architecture)
    return {**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}


def source_name(checkpoint: Checkpoint, tensor: PlacedTensor) -> str:
    """The name in the source of a tensor of the export: a tied head reads the embeddings."""
    if tensor.part == "head" and tensor.name not in checkpoint.entries:
        return checkpoint.architecture.names.embeddings
    return tensor.name


def read_source(checkpoint: Checkpoint, tensor: PlacedTensor) -> torch.Tensor:
    """One tensor of the exported model in the source's precision."""
    return checkpoint.tensor(source_name(checkpoint, tensor))


def piece_rows(shape: tuple[int, ...], piece_elements: int = PIECE_ELEMENTS) -> Iterator[tuple[int, int]]:
    """(first, end) of the pieces in which a tensor is read."""
    num_rows = shape[0] if shape else 1
    step = max(1, piece_elements // max(1, prod(shape[1:])))
    return ((first, min(first + step, num_rows)) for first in range(0, num_rows, step))


@dataclass(frozen=True, kw_only=True)
class WeightScales:
    """Scales of whole weights and of inputs, and of cached keys and values, by module; float32, 0-d.

    Read as engines will read them: rounded to the precision in which the layout stores them.
    """

    weights: Mapping[str, torch.Tensor]
    inputs: Mapping[str, torch.Tensor]
    caches: Mapping[str, torch.Tensor]


class ExportTensors:
    """All tensors of one export of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: ExportLayout,
        amax: ActivationAmax,
        *,
        piece_elements: int = PIECE_ELEMENTS,
    ) -> None:
        """``amax``: calibrated activations; empty where the layout needs none. ``piece_elements``: read at once."""
        self.checkpoint = checkpoint
        self.layout = layout
        self._amax, self._piece_elements = amax, piece_elements
        self._tensor_scales: dict[str, torch.Tensor] = {}
        deployed = checkpoint.architecture.deployed
        self.tensors = (*deployed.tensors(), *deployed.carried)
        self._by_module = {module_of(tensor): tensor for tensor in self.tensors}

    def headers(self, tensor: PlacedTensor) -> list[TensorHeader]:
        """What is stored for one tensor of the model."""
        return tensor_headers(tensor, self.layout)

    def weight_scale(self, module: str) -> torch.Tensor:
        """The scale of a whole weight, shared by the modules that engines fuse; 1 where the scheme has none."""
        layout = self.layout
        assert layout.scheme is not None
        if layout.scheme.largest is None:
            return _ONE
        if module not in self._tensor_scales:
            group = layout.scale_group(module)
            largest = layout.scheme.weights_largest or layout.scheme.largest
            scale = scale_of(max(self._weight_amax(name) for name in group), largest)
            self._tensor_scales |= dict.fromkeys(group, self._as_stored(TENSOR_SCALE, scale))
        return self._tensor_scales[module]

    def input_scale(self, module: str) -> torch.Tensor:
        """The scale of a module's inputs."""
        assert self.layout.scheme is not None and self.layout.scheme.largest is not None
        amax = max(self._amax.inputs[name] for name in self.layout.scale_group(module))
        return self._as_stored(INPUT_SCALE, scale_of(amax, self.layout.scheme.largest))

    @cached_property
    def scales(self) -> WeightScales:
        """All scales of whole tensors; reads the weights that need one."""
        calibrated = self.layout.calibrated_inputs
        return WeightScales(
            weights={module: self.weight_scale(module) for module in self.layout.quantized},
            inputs={module: self.input_scale(module) for module in calibrated},
            caches={module: scale_of(self._amax.outputs[module]) for module in self.layout.cache_scales},
        )

    @property
    def row_scale_dtype(self) -> torch.dtype:
        """The precision in which row scales are stored."""
        return row_scale_dtype(self.layout)

    def _as_stored(self, role: str, scale: torch.Tensor) -> torch.Tensor:
        stored = next(stored for stored in self.layout.form if stored.role == role)
        if stored.is_reciprocal:  # two roundings: the file's and the reader's
            return 1 / (1 / scale)
        return scale.to(torch_dtype(stored.dtype)).float()

    def _weight_amax(self, module: str) -> float:
        tensor = self._by_module[module]
        name = source_name(self.checkpoint, tensor)
        pieces = piece_rows(tensor.shape, self._piece_elements)
        return max(self.checkpoint.rows_and_amax(name, first, end)[1] for first, end in pieces)

    def files(self) -> tuple[StoredTensor, ...]:
        """The tensors as the files will hold them: experts in one tensor where the source has them so, unless they are
        quantised, each with a scale of its own."""
        are_fused = self.checkpoint.is_fused and not any(
            self.layout.is_quantized(module_of(tensor)) for tensor in self.tensors if tensor.spec.routed
        )
        return tuple(self.checkpoint.architecture.deployed.stored_tensors(is_fused=are_fused))

    def headers_of_file(self, stored: StoredTensor) -> list[TensorHeader]:
        """What is stored for one tensor of ``files``."""
        if stored.form is not None:
            return [TensorHeader(name=stored.name, dtype="BF16", shape=stored.shape)]
        return self.headers(stored.parts[0])

    def write(self, shard: Shard, stored: StoredTensor) -> None:
        """Write what is stored for one tensor of ``files``."""
        if stored.form is not None:
            fused = assembled(stored, lambda name: self.checkpoint.tensor(name).to(torch.bfloat16))
            shard.write(stored.name, fused)
            return
        for name, first, values in self.stored(stored.parts[0]):
            shard.write(name, values, first_row=first)

    def stored(self, tensor: PlacedTensor, *, with_measured: bool = True) -> Iterator[tuple[str, int, torch.Tensor]]:
        """What is stored for one tensor of the model, in pieces: (name, first row, values).

        ``with_measured``: also the scales of activations, which depend on the calibration text.
        """
        module = module_of(tensor)
        is_quantized = self.layout.is_quantized(module)
        by_role = {stored.role: stored for stored in self.layout.form} if is_quantized else {}
        headers = {header.name: header for header in self.headers(tensor)}
        name = source_name(self.checkpoint, tensor)
        scale = self.weight_scale(module) if is_quantized else _ONE
        for first, end in piece_rows(tensor.shape, self._piece_elements):
            # What a scale of the whole tensor was found from was looked at then.
            if by_role and TENSOR_SCALE in by_role:
                rows, amax = self.checkpoint.unchecked_rows(name, first, end), 0.0
            else:
                rows, amax = self.checkpoint.rows_and_amax(name, first, end)
            if not by_role:
                _check_bf16(tensor.name, amax)
                yield tensor.name, first, rows.to(torch.bfloat16)
                continue
            assert self.layout.scheme is not None
            for role, part in self.layout.scheme.encode(rows, scale, self.row_scale_dtype).items():
                header = headers[f"{module}.{by_role[role].suffix}"]
                yield header.name, first, part.view(-1, *header.shape[1:])
        finds = {TENSOR_SCALE: self.weight_scale} | ({INPUT_SCALE: self.input_scale} if with_measured else {})
        for role in filter(by_role.__contains__, finds):
            stored, scale = by_role[role], finds[role](module)
            header = headers[f"{module}.{stored.suffix}"]
            value = 1 / scale if stored.is_reciprocal else scale
            yield header.name, 0, value.to(torch_dtype(stored.dtype)).reshape(header.shape)
        if with_measured and module in self.layout.cache_scales:
            yield self.layout.cache_scales[module], 0, scale_of(self._amax.outputs[module])


def _check_bf16(name: str, amax: float) -> None:
    if torch.tensor(amax).to(torch.bfloat16).isinf():
        raise MinipuzzleError(
            f"{name} holds {amax:.4g}, which BF16 cannot", "check the source: no weight should be so large"
        )


def row_scale_dtype(layout: ExportLayout) -> torch.dtype:
    """The precision in which a layout stores scales that run along rows; float32 where it stores none."""
    return torch_dtype(next((stored.dtype for stored in layout.form if stored.role == SCALES), "F32"))


def tensor_headers(tensor: PlacedTensor, layout: ExportLayout) -> list[TensorHeader]:
    """What a layout stores for one tensor of the model: the tensor itself, or its codes and scales."""
    module = module_of(tensor)
    headers = [TensorHeader(name=tensor.name, dtype="BF16", shape=tensor.shape)]
    if layout.is_quantized(module):
        out, inputs = tensor.shape
        headers = [
            TensorHeader(name=f"{module}.{stored.suffix}", dtype=stored.dtype, shape=stored.shape(out, inputs))
            for stored in layout.form
        ]
    if module in layout.cache_scales and tensor.name.endswith(WEIGHT):
        headers.append(TensorHeader(name=layout.cache_scales[module], dtype="F32", shape=()))
    return headers


def export_headers(architecture: Architecture, layout: ExportLayout) -> dict[str, TensorHeader]:
    """Every tensor that an export of an architecture stores, by name."""
    tensors = (*architecture.deployed.tensors(), *architecture.carried)
    return {header.name: header for tensor in tensors for header in tensor_headers(tensor, layout)}


@contextmanager
def _threads(workers: int) -> Iterator[Callable[..., Iterable[None]]]:
    """``map`` by some threads, in each of which torch computes by itself."""
    if workers == 1:
        yield map
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(before)


def write_export(
    tensors: ExportTensors,
    folder: Path,
    *,
    is_puzzle: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    workers: int = 1,
    advance: Advance = no_progress,
) -> None:
    """Write weights, scales, config files and the files that go along. ``advance`` is called with tensors done.

    ``workers``: threads, each of which encodes a tensor at a time.
    """
    checkpoint, layout = tensors.checkpoint, tensors.layout
    config = portable_config(checkpoint, is_puzzle=is_puzzle)
    if is_puzzle:
        shutil.copyfile(Path(__file__).with_name(f"{CONFIG_MODULE}.py"), folder / f"{CONFIG_MODULE}.py")
    if layout.flavour is not None:
        config["quantization_config"] = layout.flavour.config(layout.described)
        for name, content in layout.flavour.side_files(layout.described).items():
            write_json(folder / name, content)
    save_config(folder, config)
    copy_companions(checkpoint.folder, folder)
    files = tensors.files()
    headers = [tensors.headers_of_file(stored) for stored in files]
    shards = plan_shards(folder, headers, max_shard_bytes)
    shard_of = {name: shard for shard in shards for name in shard.headers}
    members: dict[Path, list[StoredTensor]] = {shard.path: [] for shard in shards}
    for stored, of_file in zip(files, headers, strict=True):
        members[shard_of[of_file[0].name].path].append(stored)
    for shard in shards:
        stored_here = members[shard.path]
        if shard.is_complete:
            advance(sum(len(stored.parts) for stored in stored_here))
            continue
        with shard.open(), _threads(workers) as mapped:
            for stored, _ in zip(stored_here, mapped(partial(tensors.write, shard), stored_here), strict=True):
                advance(len(stored.parts))
    write_index(folder, shards)
