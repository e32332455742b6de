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
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan, keep_everything
from minipuzzle.data.windows import IGNORE, EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.progress import Advance
from minipuzzle.quality.evaluate import CHUNK_LOGITS, ReferenceLogits, TokenSums, head_chunks
from minipuzzle.quality.ranked import DEFAULT_RANK_BY, RankedPlan, best_first
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack, WorkingSet
from minipuzzle.runtime.narrowed_layers import NarrowedLayers
from minipuzzle.runtime.processes import Processes

_CHUNK_BUFFERS = 6  # of [chunk, vocabulary] in float32, at once
_MAX_CHUNK_LOGITS_CPU = 2**20  # more falls out of its caches
_CHUNK_MEMORY_SHARE = 8  # the buffers take no more than this fraction of the memory


def rank_plans(
    checkpoint: Checkpoint,
    plans: Sequence[Plan],
    windows: EvaluationWindows,
    compute: Compute = Compute(),
    *,
    rank_by: str = DEFAULT_RANK_BY,
) -> list[RankedPlan]:
    """Plans by their measured quality, best first; see ``best_first`` for ``rank_by``.

    Raises: MinipuzzleError if the memory is too small or a candidate computes values that are not finite.
    """
    tree = build_tree(checkpoint.architecture, [keep_everything(checkpoint.architecture), *plans])
    stack = open_stack(checkpoint, tree, windows, compute)
    qualities = measure_plans(stack, tree, plans, windows)
    return best_first(
        [RankedPlan(plan=plan, quality=quality) for plan, quality in zip(plans, qualities, strict=True)], rank_by
    )


def open_stack(
    checkpoint: Checkpoint, tree: PrefixTree, windows: EvaluationWindows, compute: Compute = Compute()
) -> LayerStack:
    """A layer stack with room for all streams of one window; no weight is read yet.

    Raises: MinipuzzleError if the memory is too small, with the amount that is needed.
    """
    compute = compute.with_limit()
    return working_set(checkpoint.architecture, tree, windows, compute).open_stack(checkpoint, compute)


def working_set(source: Architecture, tree: PrefixTree, windows: EvaluationWindows, compute: Compute) -> WorkingSet:
    """All streams, one more that is being computed, the logits of one chunk, and the head in float32."""
    wide_head_bytes = 0 if compute.torch_dtype.itemsize >= 4 else source.vocabulary * source.hidden * 4
    logits_bytes = _CHUNK_BUFFERS * 4 * max(_chunk_logits(compute), source.vocabulary)
    return WorkingSet(
        num_tokens=windows.token_ids.shape[1],
        num_copies=tree.num_streams + 1,
        head_bytes=logits_bytes + wide_head_bytes,
    )


def _chunk_logits(compute: Compute) -> int:
    """Logits of one stream that exist at once."""
    most = _MAX_CHUNK_LOGITS_CPU if compute.own_device.is_cpu else CHUNK_LOGITS
    return min(most, compute.limit_bytes // _CHUNK_MEMORY_SHARE // (4 * _CHUNK_BUFFERS))


def measure_plans(
    stack: LayerStack,
    tree: PrefixTree,
    plans: Sequence[Plan],
    windows: EvaluationWindows,
    *,
    slice_windows: int | None = None,
) -> list[Quality]:
    """The quality of each plan, in the order given. ``tree`` is that of the source model and then ``plans``.

    ``slice_windows``: windows at a time (default: as many as fit); the slicing changes nothing but rounding. The
    processes of a torchrun job share the windows.

    Raises: MinipuzzleError if a candidate computes values that are not finite.
    """
    compute, num_windows = stack.compute, len(windows.token_ids)
    if slice_windows is None:
        slice_windows = stack.sequences_that_fit(working_set(stack.architecture, tree, windows, compute), num_windows)
    narrowed = NarrowedLayers(stack)
    plan_of_stream = dict(zip(tree.stream_of_plan, (keep_everything(stack.architecture), *plans), strict=True))
    of_streams = [plan_of_stream[stream] for stream in range(tree.num_streams)]
    sums = [TokenSums() for _ in range(tree.num_streams)]
    with compute.progress("measuring candidates", tree.num_steps(num_windows)) as advance:
        for start in compute.processes.share(range(0, num_windows, slice_windows)):
            token_ids_BT = windows.token_ids[start : start + slice_windows]
            labels_BT = windows.labels[start : start + slice_windows].to(stack.device)
            streams_BTH = _run_streams(narrowed, tree, token_ids_BT, advance)
            compare_streams(narrowed, of_streams, streams_BTH, labels_BT, sums, reference=tree.stream_of_plan[0])
            advance(tree.num_streams * len(labels_BT))
    add_up(sums, compute.processes)
    return [quality_of(plan, sums[stream]) for plan, stream in zip(plans, tree.stream_of_plan[1:], strict=True)]


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
def compare_streams(
    narrowed: NarrowedLayers,
    plans: Sequence[Plan],
    streams: list[torch.Tensor],
    labels_BT: torch.Tensor,
    sums: Sequence[TokenSums],
    *,
    reference: int = 0,
) -> None:
    """Add up what every stream predicts, and how far that is from the source model's, the one called ``reference``.

    ``plans``: of each stream. ``streams`` are overwritten.
    """
    head_VH = narrowed.stack.head_weight().float()
    kept = [plan.units("hidden", None) for plan in plans]
    norms = [narrowed.final_norm(plan) for plan in plans]
    heads_VH = [head_VH if units is None else head_VH[:, list(units)] for units in kept]
    counts_BT = labels_BT != IGNORE
    labels_N = labels_BT[counts_BT]
    for stream, norm in enumerate(norms):
        streams[stream] = norm(streams[stream][counts_BT])
    for chunk in head_chunks(len(labels_N), head_VH.shape[0], _chunk_logits(narrowed.stack.compute)):
        labels_C = labels_N[chunk]
        full = ReferenceLogits(F.linear(streams[reference][chunk].float(), heads_VH[reference]))
        for stream, stream_NH in enumerate(streams):
            sums[stream].add(F.linear(stream_NH[chunk].float(), heads_VH[stream]), labels_C, full)


def add_up(sums: Sequence[TokenSums], processes: Processes) -> None:
    """Add the sums of all processes, in place."""
    if processes.world_size == 1:
        return
    names = ("loss", "kl", "num_correct", "num_agreed", "num_tokens")
    table = torch.tensor([[getattr(item, name) for name in names] for item in sums], dtype=torch.float64)
    for item, row in zip(sums, processes.sum_(table).tolist(), strict=True):
        for name, value in zip(names, row, strict=True):
            setattr(item, name, type(getattr(item, name))(value))


def quality_of(plan: Plan, sums: TokenSums) -> Quality:
    """What the sums over all tokens say of a plan.

    Raises: MinipuzzleError if they are not finite.
    """
    loss = sums.loss / sums.num_tokens
    if not loss < inf:
        name = plan.figures.pattern if plan.figures else plan.kept_layers
        raise MinipuzzleError(f"candidate {name} computes values that are not finite", "measure with ‹dtype› float32")
    return Quality(
        loss=loss,
        kl=sums.kl / sums.num_tokens,
        accuracy=sums.num_correct / sums.num_tokens,
        agreement=sums.num_agreed / sums.num_tokens,
        num_tokens=sums.num_tokens,
    )
