"""What mending a cut takes: which weights are refitted, the memory for their sums, and floating-point operations."""

from __future__ import annotations

from minipuzzle.architecture.layers import HIDDEN
from minipuzzle.architecture.model import Architecture, PlacedTensor
from minipuzzle.cut.compensation import RIDGES
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack, WorkingSet, largest_layer_bytes

_SUMS_AT_ONCE = 6  # of fitted and held-out tokens, both, with a ridge, its Cholesky factor and room to work


def output_projections(architecture: Architecture, layer_idx: int) -> tuple[PlacedTensor, ...]:
    """The linear weights through which a layer adds to the stream for every token: all but routed experts'."""
    return tuple(placed for placed in _into_the_stream(architecture, layer_idx) if not placed.spec.routed)


def expert_projections(architecture: Architecture, layer_idx: int) -> tuple[PlacedTensor, ...]:
    """Those of routed experts, which add to the stream for the tokens that the router gives them.

    Experts of a latent width add to it through a projection that all tokens share: that one is refitted instead.
    """
    return tuple(placed for placed in _into_the_stream(architecture, layer_idx) if placed.spec.routed)


def _into_the_stream(architecture: Architecture, layer_idx: int) -> tuple[PlacedTensor, ...]:
    # What a shared expert adds may still be weighed, token by token; then its projection is not the last step.
    weighed = {"shared_down"} if "shared_gate" in architecture.layers[layer_idx].options else set()
    tensors = (placed for placed in architecture.layer_tensors(layer_idx) if placed.spec.role not in weighed)
    return tuple(placed for placed in tensors if len(placed.spec.dims) == 2 and placed.spec.dims[0] == HIDDEN)


def num_inputs(architecture: Architecture, layer_idx: int) -> int:
    """Inputs of all output projections of a layer, which are refitted together."""
    return sum(placed.shape[1] for placed in output_projections(architecture, layer_idx))


def open_stack(checkpoint: Checkpoint, num_windows: int, num_tokens: int, compute: Compute) -> LayerStack:
    """A layer stack with room for both streams of all windows, and for one layer's sums and their solution.

    Raises: MinipuzzleError if the memory is too small, with the amount that is needed.
    """
    per_process = -(-num_windows // compute.processes.world_size)
    working_set = WorkingSet(num_tokens=num_tokens, num_copies=2 * per_process)
    # A layer as it is cut may be a copy of its own.
    copy_bytes = largest_layer_bytes(checkpoint.architecture, compute.torch_dtype)
    extra_bytes = sums_bytes(checkpoint.architecture, num_windows * num_tokens) + copy_bytes
    return working_set.open_stack(checkpoint, compute, extra_bytes=extra_bytes)


def sums_bytes(architecture: Architecture, num_tokens: int) -> int:
    """Memory for the sums of the widest layer and the change of its weights, or for one of the widest experts."""
    indices = [layer_idx for layer_idx, _times in architecture.distinct_layers()]
    widest = max(num_inputs(architecture, layer_idx) for layer_idx in indices)
    experts = (placed.shape[1] for layer_idx in indices for placed in expert_projections(architecture, layer_idx))
    change_bytes = 8 if widest <= num_tokens else 4  # an element: float64 where it comes from sums
    return max(
        8 * _SUMS_AT_ONCE * widest * min(widest, num_tokens) + change_bytes * widest * architecture.hidden,
        max((expert_bytes(width, architecture.hidden) for width in experts), default=0),
    )


def expert_bytes(width: int, hidden: int) -> int:
    """Memory for the sums of one expert and their solution."""
    return 8 * _SUMS_AT_ONCE * width * max(width, hidden)


def predict_flops(source: Architecture, num_tokens: int) -> int:
    """What compensation computes at most, if nothing is dropped: three passes, the sums, and a solution for each ridge.

    Routed experts take a pass and a quarter more. Attention's scores and Mamba's scans are not counted.
    """
    flops = 0
    for layer_idx, times in source.distinct_layers():
        num_weights = sum(tensor.num_active_elements for tensor in source.layer_tensors(layer_idx))
        experts = expert_projections(source, layer_idx)
        passes = 4.25 if experts else 3
        refits = [(num_inputs(source, layer_idx), num_tokens)]
        if experts:
            sizes = source.layers[layer_idx].sizes
            routed = num_tokens * sizes["experts_per_token"] // sizes["expert"]
            refits += [(placed.shape[1], routed) for placed in experts]
        flops += times * int(2 * passes * num_tokens * num_weights)
        flops += times * sum(_refit_flops(width, tokens, source.hidden) for width, tokens in refits)
    return flops


def _refit_flops(width: int, num_tokens: int, hidden: int) -> int:
    size = min(width, num_tokens)
    summing = num_tokens * width * (size + hidden)
    solving = (len(RIDGES) + 1) * size * size * (size // 3 + 2 * hidden)
    return 2 * (summing + solving)
