"""Scores of altered models that are mended: what remains of a removal once the layers above make up for it.

Each altered model is mended on most of the windows and compared with the source on the others, which no fit saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from importance.compensate import mended_states
from importance.metrics import HeadInputMetrics, chunk_tokens, next_token_labels
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import Advance, no_progress
from minipuzzle.runtime.layer_stack import LayerStack

COMPARED_EVERY = 4  # of the windows, one
Arrays = Mapping[str, NDArray[np.float64]]


def score_mended(
    stack: LayerStack,
    plans: Sequence[Plan],
    token_ids_BT: torch.Tensor,
    *,
    advance: Advance = no_progress,
    earlier: Arrays | None = None,
    after_plan: Callable[[dict[str, NDArray[np.float64]]], None] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """All metrics of LAYER_METRICS between the source and each altered model once it is mended, ``[plans]``.

    ``after_plan`` receives what is found so far, and ``earlier`` takes such figures of an interrupted run. Several
    processes share the windows.

    Raises: MinipuzzleError for fewer than four windows, or values that are not finite.
    """
    if len(token_ids_BT) < COMPARED_EVERY * stack.compute.processes.world_size:
        raise MinipuzzleError(
            f"{len(token_ids_BT)} samples are too few to mend on some and to compare on others",
            f"give at least {COMPARED_EVERY} ‹samples› a process",
        )
    is_compared_B = torch.arange(len(token_ids_BT)) % COMPARED_EVERY == COMPARED_EVERY - 1
    found = {name: values.copy() for name, values in (earlier or {}).items()}
    for plan_idx, plan in enumerate(plans):
        if not found or np.isnan(next(iter(found.values()))[plan_idx]):
            states = mended_states(stack, plan, token_ids_BT[~is_compared_B], token_ids_BT[is_compared_B])
            for name, values in _compared(stack, *states).items():
                found.setdefault(name, np.full(len(plans), np.nan))[plan_idx] = values[0]
            if after_plan is not None:
                after_plan(found)
        advance(1)
    return found


def _compared(
    stack: LayerStack, token_ids_BT: torch.Tensor, teacher_BTH: torch.Tensor, student_BTH: torch.Tensor
) -> dict[str, NDArray[np.float64]]:
    metrics, head_VH = HeadInputMetrics(1), stack.head_weight()
    sizes = {"num_streams": 1, "hidden": stack.architecture.hidden, "vocabulary": stack.architecture.vocabulary}
    chunk = chunk_tokens(token_ids_BT.shape[1], stack.memory_bytes, **sizes)
    labels_BT = next_token_labels(token_ids_BT).to(stack.device)
    for labels_T, *states_TH in zip(labels_BT, teacher_BTH, student_BTH, strict=True):
        for start in range(0, len(labels_T), chunk):
            tokens = slice(start, start + chunk)
            full_CH, altered_CH = (stack.final_norm(state_TH[tokens]) for state_TH in states_TH)
            metrics.add(full_CH, altered_CH[None], head_VH, labels_T[tokens])
    found = metrics.summed_over(stack.compute.processes).result()
    if not all(np.isfinite(values).all() for values in found.values()):
        raise MinipuzzleError("a mended model computes values that are not finite", "measure with ‹dtype› float32")
    return found


def num_applications(source: Architecture, plans: Sequence[Plan]) -> int:
    """Layer applications that mend and compare plans without layers, where no routed experts are refitted.

    Below the first removed layer both texts pass as one stream each; above it the source's stream and the cut form's,
    and the windows that are fitted once more.
    """
    total = 0
    for plan in plans:
        kept = set(plan.kept_layers)
        first = min((idx for idx in range(len(source.layers)) if idx not in kept), default=len(source.layers))
        total += 2 * len(source.layers) + 3 * sum(idx > first for idx in kept)
    return total
