"""Streams kept between measurements that share their beginnings, so that only what lies above a change runs again.

When one layer more is removed, nothing below it changes: every altered model of the next round was, up to that layer,
an altered model of this one. Streams before some layers are therefore kept, on the CPU, as many as the memory allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from importance.prefix_tree import PrefixTree
from minipuzzle.cut.plan import Plan

Prefix = tuple[int, ...]  # the layers below some layer that a model keeps: all that its stream there depends on


def streams_before(tree: PrefixTree, layer_idx: int) -> list[int]:
    """For each plan of a tree that cuts no units, or each stream of it, the stream that leads to it before a layer."""
    ends = list(range(tree.num_streams))
    for level in reversed(tree.levels[layer_idx:]):
        ends = [level.branches[stream][0] for stream in ends]
    return [ends[stream] for stream in tree.stream_of_plan]


class StreamCache:
    """Streams before some layers, of every slice, within a number of bytes."""

    def __init__(self, *, max_bytes: int, num_slices: int) -> None:
        self._bytes_a_slice = max_bytes // max(1, num_slices)
        self._kept: dict[int, dict[int, dict[Prefix, torch.Tensor]]] = {}  # first sample -> layer -> streams

    def store(
        self,
        first_sample: int,
        layer_idx: int,
        streams: Sequence[torch.Tensor],
        stream_of: Sequence[int],
        plans: Sequence[Plan],
    ) -> None:
        """Keep the streams before a layer, if they fit; from the first layers on, where streams are few."""
        levels = self._kept.setdefault(first_sample, {})
        levels.pop(layer_idx, None)
        used = sum(t.numel() * t.element_size() for level in levels.values() for t in level.values())
        wanted = sum(stream.numel() * stream.element_size() for stream in streams)
        if used + wanted <= self._bytes_a_slice:
            by_prefix = {
                _prefix(plan, layer_idx): stream
                for plan, stream in zip(plans, stream_of, strict=True)
                if not plan.kept_units  # narrowed layers are measured once
            }
            levels[layer_idx] = {prefix: streams[stream].to("cpu", copy=True) for prefix, stream in by_prefix.items()}

    def restore(
        self, first_sample: int, tree: PrefixTree, plans: Sequence[Plan], device: str
    ) -> tuple[int, list[torch.Tensor]] | None:
        """The highest kept layer before which every stream of a tree is at hand, and those streams; or None."""
        levels = self._kept.get(first_sample, {})
        if any(plan.kept_units for plan in plans):
            return None
        for layer_idx in sorted(levels, reverse=True):
            kept, stream_of = levels[layer_idx], streams_before(tree, layer_idx)
            prefixes = [_prefix(plan, layer_idx) for plan in plans]
            if layer_idx and all(prefix in kept for prefix in prefixes):
                by_stream = dict(zip(stream_of, prefixes, strict=True))
                return layer_idx, [kept[by_stream[s]].to(device, copy=True) for s in sorted(by_stream)]
        return None


def _prefix(plan: Plan, layer_idx: int) -> Prefix:
    return tuple(idx for idx in plan.kept_layers if idx < layer_idx)
