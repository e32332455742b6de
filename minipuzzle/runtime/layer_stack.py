"""A model as a stack of layers over hidden states, with all weights in memory where they fit, else one part at a time.

The layers are transformers' own modules; they are called on hidden states, so that any order, batch or omission of
layers can be computed. Weights are read from the checkpoint when a layer is first needed.

Shape suffixes: B batch, T tokens, H hidden, V vocabulary; a leading S counts streams, i.e. variants of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.model import Architecture, PlacedTensor
from minipuzzle.architecture.quantities import format_gib
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import build_on_meta, parts_of

# Larger batches make a layer no faster, only larger. On a CPU they fall out of its caches, and the allocator hands
# their results back to the system: layers of a small model take up to twice as long at 2,048 tokens as at 512.
MAX_BATCH_TOKENS_CPU = 512
MAX_BATCH_TOKENS = 16384
DEFAULT_CHUNK_TOKENS = 128  # of Mamba-2's scan, where config.json does not say

EMBEDDINGS, FINAL_NORM, HEAD = "embeddings", "final_norm", "head"
PartName = int | str  # a layer index, or one of the three above


@dataclass(kw_only=True)
class WorkCounters:
    """What a stack has done so far.

    ``layer_applications``: one stream of one slice through one layer. ``weight_bytes_read``: bytes as stored.
    """

    layer_applications: int = 0
    weight_bytes_read: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkingSet:
    """What work on sequences of a length needs beside the weights.

    ``num_copies``: of the hidden states of a sequence, alive at once. ``head_bytes``: for what is done with the logits
    of a chunk of tokens.
    """

    num_tokens: int
    num_copies: int
    head_bytes: int = 0

    def sequence_bytes(self, architecture: Architecture, dtype: torch.dtype) -> int:
        """Memory of all copies of the hidden states of one sequence."""
        return self.num_copies * self.num_tokens * architecture.hidden * dtype.itemsize

    def reserved_bytes(self, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
        """The least: for one sequence, a layer at work on it, and the head."""
        states_bytes = self.sequence_bytes(checkpoint.architecture, dtype)
        return states_bytes + largest_activation_bytes(checkpoint, self.num_tokens, dtype) + self.head_bytes

    def open_stack(self, checkpoint: Checkpoint, compute: Compute, *, extra_bytes: int = 0) -> LayerStack:
        """A stack with room for that and ``extra_bytes``; no weight is read yet.

        Raises: MinipuzzleError if the memory is too small, with the amount that is needed.
        """
        reserved_bytes = self.reserved_bytes(checkpoint, compute.torch_dtype) + extra_bytes
        return LayerStack(checkpoint, compute, reserved_bytes=reserved_bytes)


class LayerStack:
    """Runs the layers of a checkpoint, one at a time, in float32 or another precision."""

    def __init__(self, checkpoint: Checkpoint, compute: Compute = Compute(), *, reserved_bytes: int = 0) -> None:
        """Lay out the model without reading weights.

        ``compute.memory_bytes`` limits weights and working sets together; ``reserved_bytes`` is what the caller needs
        beside the weights. If that leaves no room for all weights, only the part in use stays in memory and is read
        again each time its turn comes.

        Raises: MinipuzzleError if not even the largest part fits, or if the checkpoint is inconsistent.
        """
        checkpoint.require_plain_weights()
        self.checkpoint = checkpoint
        self.architecture: Architecture = checkpoint.architecture
        self.compute = compute.with_limit()
        self.device, self.dtype = compute.own_device.name, compute.torch_dtype
        self.memory_bytes, self.reserved_bytes = self.compute.limit_bytes, reserved_bytes
        self.counters = WorkCounters()
        model = build_on_meta(checkpoint.config, self.dtype)
        self._model = model.eval()
        self._modules = parts_of(model, checkpoint.family)
        self._loaded: set[PartName] = set()
        self._activation_bytes: dict[tuple[int, int], int] = {}
        all_weights = resident_weight_bytes(self.architecture, self.dtype)
        self.is_resident = all_weights + reserved_bytes <= self.memory_bytes
        one_part = largest_part_bytes(self.architecture, self.dtype)
        next_part = largest_layer_bytes(self.architecture, self.dtype)
        self._reads_ahead = not self.is_resident and one_part + next_part + reserved_bytes <= self.memory_bytes
        self.weight_bytes = all_weights if self.is_resident else one_part + (next_part if self._reads_ahead else 0)
        self._ahead: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1)  # starts no thread before there is something to read
        self.compute.require_room(
            self.weight_bytes + reserved_bytes,
            f"{format_gib(self.weight_bytes)} for the largest part of the model, {format_gib(reserved_bytes)} for "
            "activations",
            "lower ‹sequence_length› or the precision (‹dtype› bfloat16)",
        )

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.architecture.layers)

    @property
    def free_bytes(self) -> int:
        """Memory beside the weights."""
        return self.memory_bytes - self.weight_bytes

    def layer(self, layer_idx: int) -> nn.Module:
        """The runnable module of one layer, for hooks; its weights may not be in memory."""
        return self._modules.layers[layer_idx]

    def loaded_layer(self, layer_idx: int) -> nn.Module:
        """The runnable module of one layer with its weights, in memory at least until another part is needed."""
        return self._load(layer_idx)

    def loaded_final_norm(self) -> nn.Module:
        """transformers' module of the final norm with its weight."""
        return self._load(FINAL_NORM)

    def module_on_disk(self, name: str) -> nn.Module:
        """transformers' module whose weights have a name on disk, for hooks."""
        return self._model.get_submodule(self.checkpoint.family.modules.module_name(name))

    def replace_modules(self, replace: Callable[[nn.Module], None]) -> None:
        """Let a function put other modules into the whole model, which take over the weights of those they replace."""
        replace(self._model)
        self._modules = parts_of(self._model, self.checkpoint.family)

    def parameter_name(self, placed: PlacedTensor) -> str:
        """The name of a tensor inside the module of its layer, or inside the embeddings, final norm or head."""
        modules = self.checkpoint.family.modules
        if placed.layer_idx is None:
            return placed.name.rpartition(".")[2]
        prefix = f"{modules.layers}.{self.architecture.block_of(placed.layer_idx)}."
        return modules.module_name(placed.name).removeprefix(prefix)

    @property
    def final_norm_module(self) -> nn.Module:
        """transformers' module of the final norm, for hooks."""
        return self._modules.final_norm

    @torch.no_grad()
    def embed(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer, ``[batch, tokens, hidden]``."""
        hidden_BTH: torch.Tensor = self._load(EMBEDDINGS)(token_ids_BT.to(self.device))
        return hidden_BTH

    @torch.no_grad()
    def apply(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        module: nn.Module | None = None,
    ) -> torch.Tensor:
        """The output of one layer, its residual connection included, in batches that fit the memory.

        Shapes: ``hidden`` and the result ``[batch, tokens, hidden]``, or ``[streams, batch, tokens, hidden]`` for
        several variants of a batch, each of which counts as one application. ``out`` may be ``hidden`` itself.
        ``module``: a narrowed form of the layer to run in its place.
        """
        layer = self._load(layer_idx) if module is None else module
        out = torch.empty_like(hidden) if out is None else out
        sequences_BTH, results_BTH = hidden.flatten(0, -3), out.view(-1, *out.shape[-2:])
        batch = self.sequences_at_once(layer_idx, hidden.shape[-2])
        for start in range(0, len(sequences_BTH), batch):
            results_BTH[start : start + batch] = layer(sequences_BTH[start : start + batch])
        self.counters.layer_applications += hidden.shape[0] if hidden.ndim == 4 else 1
        return out

    @torch.no_grad()
    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the LM head sees, in the shape given."""
        normed: torch.Tensor = self._load(FINAL_NORM)(hidden)
        return normed

    def head_weight(self) -> torch.Tensor:
        """The LM head's matrix, ``[vocabulary, hidden]``."""
        weight_VH = self._load(HEAD).weight
        assert isinstance(weight_VH, torch.Tensor)
        return weight_VH.detach()

    def sequences_at_once(self, layer_idx: int, num_tokens: int) -> int:
        """Sequences of a length that one call of a layer takes: one at least, else within a quarter of the memory."""
        needed_bytes = self._activation_bytes_of(layer_idx, num_tokens)
        max_tokens = MAX_BATCH_TOKENS_CPU if self.compute.own_device.is_cpu else MAX_BATCH_TOKENS
        return max(1, min(self.free_bytes // 4 // needed_bytes, max_tokens // num_tokens))

    def sequences_that_fit(self, working_set: WorkingSet, num_sequences: int) -> int:
        """Of some sequences, as many as fit beside the weights and a layer at work; one always does."""
        beside_bytes = self.activation_bytes(working_set.num_tokens) + working_set.head_bytes
        fitting = (self.free_bytes - beside_bytes) // working_set.sequence_bytes(self.architecture, self.dtype)
        return max(1, min(num_sequences, fitting))

    def activation_bytes(self, num_tokens: int) -> int:
        """An estimate of what the layers need while they run, at sequences of a length."""
        return max(
            self.sequences_at_once(idx, num_tokens) * self._activation_bytes_of(idx, num_tokens)
            for idx in range(self.num_layers)
        )

    def _activation_bytes_of(self, layer_idx: int, num_tokens: int) -> int:
        """For one sequence; kept, because it is asked for before every call of a layer."""
        key = layer_idx, num_tokens
        if key not in self._activation_bytes:
            layer = self.architecture.layers[layer_idx]
            self._activation_bytes[key] = activation_bytes(self.checkpoint, layer, num_tokens, self.dtype)
        return self._activation_bytes[key]

    def stored_bytes(self, part: PartName) -> int:
        """Bytes on disk of the weights of one part."""
        return sum(self.checkpoint.entries[t.name].num_bytes for t in part_tensors(self.architecture, part))

    def _load(self, part: PartName) -> nn.Module:
        """The module of one part with its weights; where not all fit, the part before it leaves the memory.

        Then the layer after it is read while this one works, if there is room for it.
        """
        module = self._module(part)
        if part in self._loaded:
            return module
        if not self.is_resident:
            for other in self._loaded - {FINAL_NORM}:
                self._module(other).to("meta")
            self._loaded &= {FINAL_NORM}
        module.load_state_dict(self._weights(part), strict=True, assign=True)
        self._loaded.add(part)
        following = 0 if part == EMBEDDINGS else part + 1 if isinstance(part, int) else self.num_layers
        if self._reads_ahead and following < self.num_layers:
            self._ahead = following, self._reader.submit(lambda: dict(self._read(following)))
        return module

    def _weights(self, part: PartName) -> dict[str, torch.Tensor]:
        """Weights of one part: those that were read ahead, if they are of this part."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            weights = ahead[1].result()  # of another part too, so that no more than two are ever in memory
            if ahead[0] == part:
                return weights
            del weights
        return dict(self._read(part))

    def _read(self, part: PartName) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights of one part under the names they have inside its module."""
        if part == HEAD and self.architecture.tied_embeddings and EMBEDDINGS in self._loaded:
            yield "weight", self._modules.embeddings.get_parameter("weight").detach()
            return
        for placed in part_tensors(self.architecture, part):
            self.counters.weight_bytes_read += self.checkpoint.entries[placed.name].num_bytes
            yield self.parameter_name(placed), self.checkpoint.tensor(placed.name).to(self.device, self.dtype)

    def _module(self, part: PartName) -> nn.Module:
        if isinstance(part, int):
            return self._modules.layers[part]
        outer = {EMBEDDINGS: self._modules.embeddings, FINAL_NORM: self._modules.final_norm, HEAD: self._modules.head}
        return outer[part]


def part_names(architecture: Architecture) -> tuple[PartName, ...]:
    """The parts of a model in the order in which a forward pass needs them."""
    return (EMBEDDINGS, *range(len(architecture.layers)), FINAL_NORM, HEAD)


def part_tensors(architecture: Architecture, part: PartName) -> tuple[PlacedTensor, ...]:
    """The tensors that one part reads; a tied head reads the embeddings."""
    if isinstance(part, int):
        return tuple(architecture.layer_tensors(part))
    source = EMBEDDINGS if part == HEAD and architecture.tied_embeddings else part
    return tuple(tensor for tensor in architecture.outer_tensors() if tensor.part == source)


def part_bytes(architecture: Architecture, part: PartName, dtype: torch.dtype) -> int:
    """Memory of the weights of one part in the precision of the computation."""
    return sum(tensor.num_elements for tensor in part_tensors(architecture, part)) * dtype.itemsize


def resident_weight_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Memory of all weights; tied ones count once."""
    return architecture.num_parameters * dtype.itemsize


def largest_part_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Memory of the weights where only one part stays: the largest one and the final norm."""
    sizes = [part_bytes(architecture, part, dtype) for part in part_names(architecture)]
    return max(sizes) + part_bytes(architecture, FINAL_NORM, dtype)


def largest_layer_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Memory of the weights of the largest layer."""
    return max(part_bytes(architecture, layer_idx, dtype) for layer_idx, _times in architecture.distinct_layers())


def activation_bytes(checkpoint: Checkpoint, layer: LayerSpec, num_tokens: int, dtype: torch.dtype) -> int:
    """An estimate of what one layer needs to process one sequence, beside its weights.

    The outputs of its projections, four times over for what is computed from them; for Mamba-2 also the float32
    tables of the chunked scan, which PyTorch's own implementation writes out: five of tokens x chunk and six of
    tokens x state for every head; for gated delta nets such tables of eight keys and values for every value head.
    """
    sizes = layer.sizes
    matrices = [tensor for tensor in LAYER_KINDS[layer.kind].tensors(layer) if len(tensor.dims) > 1]
    outputs = sum(matrix.shape(sizes)[0] for matrix in matrices if not matrix.routed)
    if routed := sum(matrix.shape(sizes)[0] for matrix in matrices if matrix.routed):
        outputs += routed * sizes["experts_per_token"] // sizes["expert"]
    token_bytes = 4 * (sizes["hidden"] + outputs) * dtype.itemsize
    if "ssm_head" in sizes:
        chunk_sizes = (checkpoint.config.get(field) for field in ("chunk_size", "mamba_chunk_size"))
        chunk_tokens = int(next(filter(None, chunk_sizes), DEFAULT_CHUNK_TOKENS))
        token_bytes += 4 * sizes["ssm_head"] * (5 * chunk_tokens + 6 * sizes["ssm_state"])
    if "gdn_value_head" in sizes:
        num_heads = sizes["gdn_key_group"] * sizes["gdn_value_head"]
        token_bytes += 4 * num_heads * 8 * (sizes["gdn_key_channel"] + sizes["gdn_value_channel"])
    return num_tokens * token_bytes


def largest_activation_bytes(checkpoint: Checkpoint, num_tokens: int, dtype: torch.dtype) -> int:
    """The estimate for the most demanding layer."""
    return max(activation_bytes(checkpoint, layer, num_tokens, dtype) for layer in checkpoint.architecture.layers)
