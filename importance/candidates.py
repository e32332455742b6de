"""Ranking candidates by what they really lose: all of them run on validation tokens, with shared prefixes.

The candidates and the source model form a tree over layers (``prefix_tree``). Tokens come in slices; a slice passes
the layers from first to last, all streams at each, so that every layer's weights are read once a slice and the model
need not fit into memory.

Shape suffixes: B windows of a slice, T tokens, N tokens that count, C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch.nn import functional as F

from importance.prefix_tree import PrefixTree, build_tree, run_level
from minipuzzle.cut.plan import Plan, keep_everything
from minipuzzle.data.windows import IGNORE, EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.progress import Advance, no_progress, progress_bar
from minipuzzle.quality.evaluate import ReferenceLogits, TokenSums, head_chunks
from minipuzzle.quality.ranked import DEFAULT_RANK_BY, PlanQuality, RankedPlan, best_first
from minipuzzle.runtime.layer_stack import LayerStack, default_memory_bytes, largest_activation_bytes
from minipuzzle.runtime.narrowed_layers import NarrowedLayers
from minipuzzle.runtime.processes import Processes

_CHUNK_BUFFERS = 6  # of [chunk, vocabulary] in float32, at once
_MAX_CHUNK_LOGITS = 2**25
_MAX_CHUNK_LOGITS_CPU = 2**20  # more falls out of its caches
_CHUNK_MEMORY_SHARE = 8  # the buffers take no more than this fraction of the memory


def rank_plans(
    checkpoint: Checkpoint,
    plans: Sequence[Plan],
    windows: EvaluationWindows,
    *,
    dtype: torch.dtype,
    device: str,
    rank_by: str = DEFAULT_RANK_BY,
    device_memory_bytes: int | None = None,
    processes: Processes | None = None,
    quiet: bool = True,
) -> list[RankedPlan]:
    """Plans by their measured quality, best first; see ``best_first`` for ``rank_by``.

    ``device_memory_bytes``: weights and working memory together (default: most of what is free). ``processes``: those
    of a torchrun job share the windows. A progress bar is drawn unless ``quiet``.

    Raises: MinipuzzleError if the memory is too small or a candidate computes values that are not finite.
    """
    tree = build_tree(checkpoint.architecture, [keep_everything(checkpoint.architecture), *plans])
    stack = open_stack(checkpoint, tree, windows, dtype=dtype, device=device, device_memory_bytes=device_memory_bytes)
    with progress_bar("measuring candidates", num_steps(tree, len(windows.token_ids)), quiet=quiet) as advance:
        qualities = measure_plans(stack, tree, plans, windows, processes=processes, advance=advance)
    return best_first(
        [RankedPlan(plan=plan, quality=quality) for plan, quality in zip(plans, qualities, strict=True)], rank_by
    )


def open_stack(
    checkpoint: Checkpoint,
    tree: PrefixTree,
    windows: EvaluationWindows,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    device_memory_bytes: int | None = None,
) -> LayerStack:
    """A layer stack with room for all streams of one window; no weight is read yet.

    Raises: MinipuzzleError if the memory is too small, with the amount that is needed.
    """
    memory_bytes = default_memory_bytes(device) if device_memory_bytes is None else device_memory_bytes
    num_tokens = windows.token_ids.shape[1]
    working_bytes = _window_bytes(checkpoint, tree, num_tokens, dtype)
    working_bytes += largest_activation_bytes(checkpoint, num_tokens, dtype)
    working_bytes += _head_bytes(checkpoint, dtype, _chunk_logits(device, memory_bytes))
    return LayerStack(
        checkpoint, device=device, dtype=dtype, device_memory_bytes=memory_bytes, reserved_bytes=working_bytes
    )


def _window_bytes(checkpoint: Checkpoint, tree: PrefixTree, num_tokens: int, dtype: torch.dtype) -> int:
    """Memory of all streams of one window; one more is being computed."""
    return (tree.num_streams + 1) * num_tokens * checkpoint.architecture.hidden * dtype.itemsize


def _chunk_logits(device: str, memory_bytes: int) -> int:
    """Logits of one stream that exist at once."""
    most = _MAX_CHUNK_LOGITS_CPU if torch.device(device).type == "cpu" else _MAX_CHUNK_LOGITS
    return min(most, memory_bytes // _CHUNK_MEMORY_SHARE // (4 * _CHUNK_BUFFERS))


def _head_bytes(checkpoint: Checkpoint, dtype: torch.dtype, chunk_logits: int) -> int:
    """Memory of the logits of one chunk, and of the head in float32."""
    vocabulary, hidden = checkpoint.architecture.vocabulary, checkpoint.architecture.hidden
    wide_head_bytes = 0 if dtype.itemsize >= 4 else vocabulary * hidden * 4
    return _CHUNK_BUFFERS * 4 * max(chunk_logits, vocabulary) + wide_head_bytes


def windows_per_slice(stack: LayerStack, tree: PrefixTree, windows: EvaluationWindows) -> int:
    """Windows whose streams fit beside the weights, a layer at work and the logits of a chunk; one always does."""
    num_windows, num_tokens = windows.token_ids.shape
    chunk_logits = _chunk_logits(stack.device, stack.memory_bytes)
    beside_bytes = stack.activation_bytes(num_tokens) + _head_bytes(stack.checkpoint, stack.dtype, chunk_logits)
    window_bytes = _window_bytes(stack.checkpoint, tree, num_tokens, stack.dtype)
    return max(1, min(num_windows, (stack.free_bytes - beside_bytes) // window_bytes))


def num_steps(tree: PrefixTree, num_windows: int) -> int:
    """Steps of progress: layer applications and heads x windows."""
    return (tree.num_applications + tree.num_streams) * num_windows


def measure_plans(
    stack: LayerStack,
    tree: PrefixTree,
    plans: Sequence[Plan],
    windows: EvaluationWindows,
    *,
    slice_windows: int | None = None,
    processes: Processes | None = None,
    advance: Advance = no_progress,
) -> list[PlanQuality]:
    """The quality of each plan, in the order given. ``tree`` is that of the source model and then ``plans``.

    ``slice_windows``: windows at a time (default: as many as fit); the slicing changes nothing but rounding.

    Raises: MinipuzzleError if a candidate computes values that are not finite.
    """
    processes = processes or Processes()
    slice_windows = slice_windows or windows_per_slice(stack, tree, windows)
    narrowed = NarrowedLayers(stack)
    sums = [TokenSums() for _ in range(tree.num_streams)]
    starts = range(0, len(windows.token_ids), slice_windows)
    for start in processes.share(starts):
        token_ids_BT = windows.token_ids[start : start + slice_windows]
        labels_BT = windows.labels[start : start + slice_windows].to(stack.device)
        streams_BTH = _run_streams(narrowed, tree, token_ids_BT, advance)
        _compare_streams(narrowed, tree, plans, streams_BTH, labels_BT, sums, advance)
    _add_up(sums, processes)
    return [_quality(plan, sums[stream]) for plan, stream in zip(plans, tree.stream_of_plan[1:], strict=True)]


@torch.no_grad()
def _run_streams(
    narrowed: NarrowedLayers, tree: PrefixTree, token_ids_BT: torch.Tensor, advance: Advance
) -> list[torch.Tensor]:
    """Hidden states before the final norm of all streams, each ``[B, T, H]`` of its own width."""
    embedded_BTH = narrowed.stack.embed(token_ids_BT)
    streams = [embedded_BTH.clone() if units is None else embedded_BTH[..., list(units)] for units in tree.roots]
    for level in tree.levels:
        streams = run_level(narrowed, level, streams)
        advance(level.num_applications * len(token_ids_BT))
    return streams


@torch.no_grad()
def _compare_streams(
    narrowed: NarrowedLayers,
    tree: PrefixTree,
    plans: Sequence[Plan],
    streams: list[torch.Tensor],
    labels_BT: torch.Tensor,
    sums: list[TokenSums],
    advance: Advance,
) -> None:
    """Add up what every stream predicts, and how far that is from the source model's stream, the first plan's."""
    source = narrowed.stack.architecture
    plan_of_stream = dict(zip(tree.stream_of_plan, (keep_everything(source), *plans), strict=True))
    norms = [narrowed.final_norm(plan_of_stream[stream]) for stream in range(len(streams))]
    head_VH = narrowed.stack.head_weight().float()
    heads_VH = [_columns(head_VH, plan_of_stream[stream]) for stream in range(len(streams))]
    counts_BT = labels_BT != IGNORE
    labels_N = labels_BT[counts_BT]
    for stream, norm in enumerate(norms):
        streams[stream] = norm(streams[stream][counts_BT])
    chunk_logits = _chunk_logits(narrowed.stack.device, narrowed.stack.memory_bytes)
    for chunk in head_chunks(len(labels_N), head_VH.shape[0], chunk_logits):
        labels_C = labels_N[chunk]
        reference_stream = tree.stream_of_plan[0]
        reference = ReferenceLogits(F.linear(streams[reference_stream][chunk].float(), heads_VH[reference_stream]))
        for stream, stream_NH in enumerate(streams):
            sums[stream].add(F.linear(stream_NH[chunk].float(), heads_VH[stream]), labels_C, reference)
    advance(len(streams) * len(labels_BT))


def _columns(head_VH: torch.Tensor, plan: Plan) -> torch.Tensor:
    units = plan.units("hidden", None)
    return head_VH if units is None else head_VH[:, list(units)]


def _add_up(sums: Sequence[TokenSums], processes: Processes) -> None:
    """Add the sums of all processes, in place."""
    if processes.world_size == 1:
        return
    names = ("loss", "kl", "num_correct", "num_agreed", "num_tokens")
    table = torch.tensor([[getattr(item, name) for name in names] for item in sums], dtype=torch.float64)
    for item, row in zip(sums, processes.sum_(table).tolist(), strict=True):
        for name, value in zip(names, row, strict=True):
            setattr(item, name, type(getattr(item, name))(value))


def _quality(plan: Plan, sums: TokenSums) -> PlanQuality:
    loss = sums.loss / sums.num_tokens
    if not loss < inf:
        name = plan.notes.get("pattern", plan.kept_layers)
        raise MinipuzzleError(f"candidate {name} computes values that are not finite", "measure with --dtype float32")
    return PlanQuality(
        loss=loss,
        kl=sums.kl / sums.num_tokens,
        next_token_accuracy=sums.num_correct / sums.num_tokens,
        agreement=sums.num_agreed / sums.num_tokens,
        num_tokens=sums.num_tokens,
    )
