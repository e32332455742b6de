"""Scores of altered models: how far the LM head's input moves when a layer is left out, or run at a smaller width.

Without layer j nothing below j changes. So the altered models and the full one form a tree over layers
(``importance.prefix_tree``): one stream of hidden states for the full model and one for each altered model below the
present layer; a layer is loaded once and applied to all of them. Leaving out each of L layers costs L (L + 1) / 2 layer
applications a slice of the calibration data, and one read of the weights, where removing layers one by one costs L * L
and L. Each of K narrower forms costs what a removal costs and one application more.

Shape suffixes: S streams of altered models, B batch, T tokens, C a chunk of them, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from importance.metrics import HeadInputMetrics, chunk_bytes, chunk_tokens, next_token_labels
from importance.prefix_tree import PrefixTree, TreeLevel, build_tree, run_level
from importance.stream_cache import StreamCache, streams_before
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan, keep_everything, plan_without
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import Advance, no_progress
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack, WorkingSet
from minipuzzle.runtime.narrowed_layers import NarrowedLayers
from minipuzzle.runtime.processes import Processes

Metrics = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a caller wants to know or keep while slices are run.

    ``after_slice`` receives the sums so far, and ``earlier`` takes such sums of an interrupted run: the samples they
    cover are not run again. ``cache`` keeps streams for a later run that shares their beginnings.
    """

    advance: Advance = no_progress
    earlier: HeadInputMetrics | None = None
    after_slice: Callable[[HeadInputMetrics], None] | None = None
    cache: StreamCache | None = None


def removal_plans(source: Architecture, layers: Sequence[int], removed: frozenset[int] = frozenset()) -> list[Plan]:
    """For each of some layers, the plan that leaves it out, beside those that are removed already."""
    return [plan_without(source, removed | {layer_idx}) for layer_idx in layers]


def working_set(source: Architecture, num_tokens: int, num_streams: int, compute: Compute) -> WorkingSet:
    """What scoring needs: the altered models' streams, the full model's and one being computed, and the metrics."""
    sizes = _head_sizes(source, num_streams)
    chunk = chunk_tokens(num_tokens, compute.limit_bytes, **sizes)
    head_bytes = chunk_bytes(chunk, on_cpu=compute.own_device.is_cpu, **sizes)
    return WorkingSet(num_tokens=num_tokens, num_copies=num_streams + 2, head_bytes=head_bytes)


def _head_sizes(source: Architecture, num_streams: int) -> dict[str, int]:
    return {"num_streams": num_streams, "hidden": source.hidden, "vocabulary": source.vocabulary}


def alteration_tree(source: Architecture, plans: Sequence[Plan]) -> PrefixTree:
    """The tree of the full model and the altered ones."""
    return build_tree(source, [keep_everything(source), *plans])


def score_plans(
    stack: LayerStack,
    plans: Sequence[Plan],
    token_ids_BT: torch.Tensor,
    *,
    slice_samples: int | None = None,
    hooks: Hooks | None = None,
) -> Metrics:
    """All metrics of LAYER_METRICS between the full model and each altered one, ``[plans]``.

    ``slice_samples``: samples at a time (default: as many as fit). The slicing changes nothing but rounding. Where
    there are several processes each takes a share of the samples, and all get the scores of all samples.

    Raises: MinipuzzleError naming the layer and the sample at which a value is not a finite number.
    Source: arXiv 2504.03624, section 3.2, for ``mse``.
    """
    hooks = hooks or Hooks()
    tree = alteration_tree(stack.architecture, plans)
    run = _Run(stack=stack, plans=plans, tree=tree, narrowed=NarrowedLayers(stack), hooks=hooks)
    samples = share_of_samples(len(token_ids_BT), stack.compute.processes)
    num_tokens = token_ids_BT.shape[1]
    if slice_samples is None:
        needs = working_set(stack.architecture, num_tokens, len(plans), stack.compute)
        slice_samples = stack.sequences_that_fit(needs, len(samples))
    metrics = hooks.earlier or HeadInputMetrics(len(plans))
    num_done = metrics.num_tokens // num_tokens
    hooks.advance(tree.num_steps(num_done))
    for start in range(samples.start + num_done, samples.stop, slice_samples):
        token_ids = token_ids_BT[start : min(start + slice_samples, samples.stop)]
        streams_BTH = run.streams(token_ids, start)
        run.compare(streams_BTH, token_ids, metrics, start)
        if hooks.after_slice is not None:
            hooks.after_slice(metrics)
    return metrics.summed_over(stack.compute.processes).result()


def share_of_samples(num_samples: int, processes: Processes) -> range:
    """The samples that fall to this process, one stretch of them.

    Raises: MinipuzzleError if there are fewer samples than processes.
    """
    if num_samples < processes.world_size:
        raise MinipuzzleError(
            f"{processes.world_size} processes cannot share {num_samples} samples",
            "give more ‹samples›, or start fewer processes",
        )
    edges = [num_samples * rank // processes.world_size for rank in (processes.rank, processes.rank + 1)]
    return range(*edges)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What all slices of one measurement have in common."""

    stack: LayerStack
    plans: Sequence[Plan]
    tree: PrefixTree
    narrowed: NarrowedLayers
    hooks: Hooks

    @torch.no_grad()
    def streams(self, token_ids_BT: torch.Tensor, first_sample: int) -> list[torch.Tensor]:
        """Hidden states before the final norm of all streams, each ``[B, T, H]``."""
        cache = self.hooks.cache
        all_plans = [keep_everything(self.stack.architecture), *self.plans]
        found = None if cache is None else cache.restore(first_sample, self.tree, all_plans, self.stack.device)
        first_level, streams = (0, [self.stack.embed(token_ids_BT)]) if found is None else found
        self.hooks.advance(sum(level.num_applications for level in self.tree.levels[:first_level]) * len(token_ids_BT))
        for level in self.tree.levels[first_level:]:
            if cache is not None:
                cache.store(
                    first_sample, level.layer_idx, streams, streams_before(self.tree, level.layer_idx), all_plans
                )
            streams = run_level(self.narrowed, level, streams)
            self._require_finite(level, streams, first_sample)
            self.hooks.advance(level.num_applications * len(token_ids_BT))
        return streams

    def _require_finite(self, level: TreeLevel, streams: Sequence[torch.Tensor], first_sample: int) -> None:
        """A sum is finite only if all its terms are; one look at the sums of all streams costs next to nothing."""
        sums_SB = torch.stack([stream_BTH.sum(dim=(1, 2), dtype=torch.float32) for stream_BTH in streams])
        for stream, sample in (~torch.isfinite(sums_SB)).nonzero().tolist():
            of_plan = streams_before(self.tree, level.layer_idx + 1).index(stream)
            raise not_finite(level.layer_idx, first_sample + sample, self._name(of_plan))

    def compare(
        self, streams: list[torch.Tensor], token_ids_BT: torch.Tensor, metrics: HeadInputMetrics, first_sample: int
    ) -> None:
        """Add the samples of one slice to the sums."""
        stack, stream_of = self.stack, self.tree.stream_of_plan
        labels_BT = next_token_labels(token_ids_BT).to(stack.device)
        head_VH = stack.head_weight()
        num_tokens = token_ids_BT.shape[1]
        chunk = chunk_tokens(num_tokens, stack.memory_bytes, **_head_sizes(stack.architecture, len(self.plans)))
        for sample_idx in range(len(token_ids_BT)):
            for start in range(0, num_tokens, chunk):
                tokens = slice(start, start + chunk)
                states_SCH = stack.final_norm(torch.stack([streams[s][sample_idx, tokens] for s in stream_of]))
                added_MS = metrics.add(states_SCH[0], states_SCH[1:], head_VH, labels_BT[sample_idx, tokens])
                if not torch.isfinite(added_MS).all():
                    plan_idx = int((~torch.isfinite(added_MS)).any(0).nonzero()[0, 0])
                    raise not_finite("the LM head", first_sample + sample_idx, self._name(plan_idx + 1))
            self.hooks.advance(len(streams))

    def _name(self, plan_idx: int) -> str:
        """The model of a plan in words; 0 is the full one."""
        if plan_idx == 0:
            return "the full model"
        plan = self.plans[plan_idx - 1]
        dropped = self.stack.architecture.layers_besides(plan.kept_layers)
        narrowed = [f"{axis} of layer {idx} narrowed" for axis, by in plan.kept_units.items() for idx in by]
        parts = [*narrowed, *([f"without layer {', '.join(map(str, dropped))}"] if dropped else [])]
        return f"the model {' and '.join(parts)}" if parts else "the full model"


def not_finite(layer: int | str, sample: int, model: str = "the full model") -> MinipuzzleError:
    """The error for a value that is not a finite number."""
    where = f"layer {layer}" if isinstance(layer, int) else layer
    return MinipuzzleError(
        f"{where} computes NaN or infinite values for sample {sample} in {model}",
        "measure in float32 (‹dtype› float32); if that is in use, check the checkpoint",
    )
