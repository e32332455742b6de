"""Ranking candidates by what they really lose: each is cut in memory and run on validation tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.corpus import EvaluationWindows
from minipuzzle.evaluate import Evaluation, evaluate
from minipuzzle.models import build_model, load_model
from minipuzzle.plan import Plan
from minipuzzle.progress import Advance, no_progress
from minipuzzle.surgery import cut_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class RankedPlan:
    """A plan and what was measured of it before any distillation."""

    plan: Plan
    evaluation: Evaluation


def rank_plans(
    checkpoint: Checkpoint,
    plans: Sequence[Plan],
    windows: EvaluationWindows,
    *,
    dtype: torch.dtype,
    device: str,
    advance: Advance = no_progress,
) -> list[RankedPlan]:
    """Plans by their KL to the source model, lowest first. One candidate is in memory at a time, beside the source.

    KL, because it is the objective of the distillation that follows and its noise is far below that of accuracies on
    the same tokens.
    """
    teacher = load_model(checkpoint, dtype=dtype, device=device)
    ranked = []
    for plan in plans:
        config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
        student = build_model(config, cut_tensors(checkpoint, plan), dtype=dtype, device=device)
        evaluation = evaluate(student, checkpoint.family, windows, against=teacher, device=device)
        ranked.append(RankedPlan(plan=plan, evaluation=evaluation))
        advance(1)

    def divergence(candidate: RankedPlan) -> float:
        assert candidate.evaluation.kl is not None
        return candidate.evaluation.kl

    return sorted(ranked, key=divergence)
