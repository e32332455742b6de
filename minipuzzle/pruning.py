"""Pruning as a whole: from scores to the measured best plan, and from a plan to a checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minipuzzle.checkpoint import Checkpoint, ShardWriter, copy_companions, write_json
from minipuzzle.corpus import EvaluationWindows
from minipuzzle.memory import Deployment
from minipuzzle.plan import Plan
from minipuzzle.progress import Advance, no_progress
from minipuzzle.scores import Scores
from minipuzzle.search import Candidate, SearchRequest, find_candidates, plan_of

if TYPE_CHECKING:
    import torch

    from minipuzzle.ranking import RankedPlan

PLAN_FILE = "plan.json"
SCORES_FILE = "scores.safetensors"
UNFINISHED_SCORES_FILE = "scores.unfinished.json"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The plan to cut by, and the candidates it was chosen from (measured, best first; empty if only predicted)."""

    plan: Plan
    candidates: tuple[Candidate, ...]
    ranked: tuple[RankedPlan, ...]


def choose_plan(
    checkpoint: Checkpoint,
    scores: Scores,
    request: SearchRequest,
    deployment: Deployment,
    windows: EvaluationWindows,
    *,
    num_measured: int,
    dtype: torch.dtype,
    device: str,
    advance: Advance = no_progress,
) -> Choice:
    """The best plan for a request: candidates by predicted loss, the first ``num_measured`` of them measured.

    Raises: InfeasibleBudgetError, or MinipuzzleError for impossible targets or scores of another model.
    """
    scores.check_against(checkpoint.architecture, checkpoint.fingerprint)
    candidates = find_candidates(checkpoint.architecture, scores, request, deployment)
    to_measure = candidates[: max(1, num_measured)]
    plans = [plan_of(checkpoint.architecture, scores, candidate, metric=request.metric) for candidate in to_measure]
    if len(plans) == 1:
        return Choice(plan=plans[0], candidates=tuple(candidates), ranked=())
    from minipuzzle.ranking import rank_plans

    ranked = rank_plans(checkpoint, plans, windows, dtype=dtype, device=device, advance=advance)
    return Choice(plan=ranked[0].plan, candidates=tuple(candidates), ranked=tuple(ranked))


def prune_provenance(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a pruned folder remembers: its teacher, for `distill`, and what was asked."""
    return {
        "command": "prune",
        "teacher": str(checkpoint.folder.resolve()),
        "teacher_fingerprint": checkpoint.fingerprint,
        "settings": dict(settings),
    }


def write_pruned(checkpoint: Checkpoint, plan: Plan, folder: Path, advance: Advance = no_progress) -> None:
    """Cut a checkpoint into an existing folder, shard by shard: weights, config.json, tokenizer and the plan.

    ``advance`` is called once a tensor. Raises: MinipuzzleError for a plan of another model or broken weights.
    """
    from minipuzzle.surgery import cut_tensors

    writer = ShardWriter(folder)
    for name, tensor in cut_tensors(checkpoint, plan):
        writer.add(name, tensor)
        advance(1)
    writer.finish()
    write_json(folder / "config.json", checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture)))
    copy_companions(checkpoint.folder, folder)
    (folder / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")


def check_feasible(checkpoint: Checkpoint, request: SearchRequest, deployment: Deployment) -> list[Candidate]:
    """Everything that fits, whatever the scores will be: known from config.json, before any weight is read.

    Raises: InfeasibleBudgetError, or MinipuzzleError for impossible targets.
    """
    no_scores = np.zeros(len(checkpoint.architecture.layers))
    return find_candidates(checkpoint.architecture, Scores(layer={request.metric: no_scores}), request, deployment)
