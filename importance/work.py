"""What a measurement will cost, and a layer stack with room for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from importance import channels, layers
from importance.alterations import LayerRequest, plans_of_any_units
from importance.layers import alteration_tree, removal_plans
from importance.refits import work as refits
from importance.refits.scores import num_applications
from minipuzzle.cut.plan import plan_without
from minipuzzle.devices import Device
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import MEMORY_SHARE, Compute
from minipuzzle.runtime.layer_stack import EMBEDDINGS, FINAL_NORM, HEAD, LayerStack, WorkingSet, largest_part_bytes


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a measurement costs: exact numbers of layer applications and bytes read, an estimate of the memory.

    A layer application takes one stream of one slice of the samples through one layer: L (L + 1) / 2 of them score
    all layers on a slice, L score all channels. Where layers are removed one after another, the two numbers are what
    the work is at most: what it is depends on which layers go.
    """

    layer_slices: int
    channel_slices: int
    layer_applications: int
    weight_bytes_read: int
    weights_stay_in_memory: bool
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlannedScoring:
    """What a measurement will take; the figures are those of one process. ``scan``: how Mamba-2 layers will run."""

    work: Work
    memory_limit_bytes: int
    processes: int
    scan: str
    removals: int

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        facts = {"memory_limit_bytes": self.memory_limit_bytes, "processes": self.processes, "scan": self.scan}
        return {**asdict(self.work), **facts}


def open_stack(
    checkpoint: Checkpoint,
    compute: Compute = Compute(),
    *,
    sequence_length: int,
    request: LayerRequest | None = None,
    num_windows: int = 0,
) -> LayerStack:
    """A layer stack with room for measuring at a sequence length; no weight is read yet.

    ``num_windows``: of the layers' samples, which all stay in memory where altered models are mended.

    Raises: MinipuzzleError if the memory is too small, with the amount that is needed.
    """
    request, source, compute = request or LayerRequest(), checkpoint.architecture, compute.with_limit()
    needs = layers.working_set(source, sequence_length, request.num_alterations(source), compute)
    # A narrowed layer takes at most as much again as the layer itself.
    extra_bytes = largest_part_bytes(source, compute.torch_dtype) if request.widths else 0
    stack = needs.open_stack(checkpoint, compute, extra_bytes=extra_bytes)
    if not request.is_compensated:
        return stack
    mending = refits.open_stack(checkpoint, num_windows, sequence_length, compute)
    return max(stack, mending, key=lambda opened: opened.reserved_bytes)


def predict_work(
    stack: LayerStack,
    *,
    layer_samples: int,
    channel_samples: int,
    sequence_length: int,
    request: LayerRequest | None = None,
) -> Work:
    """What ``measure`` will do with a stack as ``open_stack`` gives it; of this process, where there are several."""
    request, processes = request or LayerRequest(), stack.compute.processes
    source = stack.architecture
    plans = removal_plans(source, request.candidates(source)) + plans_of_any_units(source, request)
    plans += [plan_without(source, block) for block in request.blocks(source)]
    needs = layers.working_set(source, sequence_length, len(plans), stack.compute)
    layer_share = len(layers.share_of_samples(layer_samples, processes))
    channel_share = len(layers.share_of_samples(channel_samples, processes))
    layer_slice = stack.sequences_that_fit(needs, layer_share)
    channel_slice = stack.sequences_that_fit(channels.working_set(sequence_length), channel_share)
    layer_slices, channel_slices = -(-layer_share // layer_slice), -(-channel_share // channel_slice)
    rounds = request.removals + 1
    body_bytes = sum(stack.stored_bytes(part) for part in (EMBEDDINGS, *range(stack.num_layers)))
    head_bytes, norm_bytes = stack.stored_bytes(HEAD), stack.stored_bytes(FINAL_NORM)
    if stack.is_resident:
        read_bytes = body_bytes + norm_bytes + (0 if source.tied_embeddings else head_bytes)
    else:  # the final norm is small and stays
        passes = layer_slices * rounds + channel_slices
        read_bytes = passes * body_bytes + layer_slices * rounds * head_bytes + norm_bytes
    applications = layer_slices * alteration_tree(source, plans).num_applications * rounds
    if request.is_compensated:
        applications = num_applications(source, plans) * rounds
    working_bytes = max(stack.activation_bytes(sequence_length), needs.head_bytes)
    working_bytes += layer_slice * needs.sequence_bytes(source, stack.dtype)
    return Work(
        layer_slices=layer_slices,
        channel_slices=channel_slices,
        layer_applications=applications + channel_slices * stack.num_layers,
        weight_bytes_read=read_bytes,
        weights_stay_in_memory=stack.is_resident,
        peak_bytes=stack.weight_bytes + working_bytes,
    )


def cache_bytes(stack: LayerStack, needs: WorkingSet, slice_samples: int) -> int:
    """Memory of the CPU that is left for streams to be used again: half of what is free beside a GPU, else what the
    streams of one slice leave."""
    if not stack.compute.own_device.is_cpu:
        return int(MEMORY_SHARE * Device("cpu").free_bytes) // 2
    used = slice_samples * needs.sequence_bytes(stack.architecture, stack.dtype)
    used += stack.activation_bytes(needs.num_tokens) + needs.head_bytes
    return max(0, stack.free_bytes - used)
