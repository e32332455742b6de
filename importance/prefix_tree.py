"""Candidate plans as a tree over layers: candidates that cut all layers so far alike share one stream of states.

A stream is the hidden states of some tokens after some layers. It splits where candidates part: at a layer that some
drop, or cut to different widths. A layer that is dropped costs nothing and leaves the stream as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan
from minipuzzle.runtime.narrowed_layers import LayerCut, NarrowedLayers, layer_cut

Branches = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True, kw_only=True)
class TreeLevel:
    """What one layer does to all streams.

    ``cuts``: the different forms in which candidates keep the layer. ``branches``: one (parent stream, index of a cut,
    or None where the layer is dropped) for each stream after the layer, ordered by parent.
    """

    layer_idx: int
    cuts: tuple[LayerCut, ...]
    branches: Branches

    @property
    def num_applications(self) -> int:
        """Streams that run through the layer."""
        return sum(cut is not None for _parent, cut in self.branches)


@dataclass(frozen=True, kw_only=True)
class PrefixTree:
    """The streams of some plans. ``roots``: the hidden units that each first stream keeps (None: all of them).

    Plans that narrow ``hidden`` have another input from the first layer on, so they share only among those that keep
    the same hidden units. ``stream_of_plan``: each plan's stream after the last layer; equal plans have one.
    """

    roots: tuple[tuple[int, ...] | None, ...]
    levels: tuple[TreeLevel, ...]
    stream_of_plan: tuple[int, ...]

    @property
    def num_streams(self) -> int:
        """Streams after the last layer; there are never more at once, since every stream leads to a candidate."""
        return max(self.stream_of_plan) + 1

    @property
    def num_applications(self) -> int:
        """Layer applications that measure all plans on one slice of tokens."""
        return sum(level.num_applications for level in self.levels)

    def num_steps(self, num_sequences: int) -> int:
        """Steps of progress of a measurement: applications of a layer, or of the head, to one sequence."""
        return num_sequences * (self.num_applications + self.num_streams)


def build_tree(source: Architecture, plans: Sequence[Plan]) -> PrefixTree:
    """The tree of some plans of one model."""
    roots: dict[tuple[int, ...] | None, int] = {}
    streams = [roots.setdefault(plan.units("hidden", None), len(roots)) for plan in plans]
    kept_layers = [set(plan.kept_layers) for plan in plans]
    levels = []
    for layer_idx in range(len(source.layers)):
        cuts: dict[LayerCut, int] = {}
        steps = []
        for plan, kept, stream in zip(plans, kept_layers, streams, strict=True):
            is_kept = layer_idx in kept
            cut_idx = cuts.setdefault(layer_cut(source, plan, layer_idx), len(cuts)) if is_kept else None
            steps.append((stream, cut_idx))
        # By parent, and where its layer is dropped last: a stream is at hand until it is handed on or overwritten.
        branches = sorted(set(steps), key=lambda step: (step[0], step[1] is None, step[1] or 0))
        numbers = {step: number for number, step in enumerate(branches)}
        streams = [numbers[step] for step in steps]
        levels.append(TreeLevel(layer_idx=layer_idx, cuts=tuple(cuts), branches=tuple(branches)))
    return PrefixTree(roots=tuple(roots), levels=tuple(levels), stream_of_plan=tuple(streams))


def run_level(narrowed: NarrowedLayers, level: TreeLevel, streams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All streams after one layer, each ``[batch, tokens, hidden]`` of its own width; those given are overwritten."""
    real_cuts = [cut for cut in level.cuts if cut.kept_units or cut.norm_scales]
    if not real_cuts:
        return _next_streams(narrowed, level, [None] * len(level.cuts), streams)
    with narrowed.modules(real_cuts) as modules:
        module_of = dict(zip(real_cuts, modules, strict=True))
        return _next_streams(narrowed, level, [module_of.get(cut) for cut in level.cuts], streams)


def _next_streams(
    narrowed: NarrowedLayers, level: TreeLevel, modules: Sequence[nn.Module | None], streams: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    following = []
    for position, (parent, cut_idx) in enumerate(level.branches):
        hidden_BTH = streams[parent]
        if cut_idx is not None:
            # The last child of a stream takes its place: there are never more streams than candidates.
            is_last = position + 1 == len(level.branches) or level.branches[position + 1][0] != parent
            out = hidden_BTH if is_last else None
            hidden_BTH = narrowed.stack.apply(level.layer_idx, hidden_BTH, out=out, module=modules[cut_idx])
        following.append(hidden_BTH)
    return following
