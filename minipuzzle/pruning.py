"""Pruning as a whole: scores, candidates, the measured best plan, and the checkpoint folder cut by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipuzzle.candidates import Candidate
from minipuzzle.checkpoint import Checkpoint, ShardWriter, copy_companions, write_json
from minipuzzle.corpus import EvaluationWindows, read_documents, sample_windows, windows_of_tokens
from minipuzzle.errors import MinipuzzleError
from minipuzzle.memory import Deployment, memory_breakdown
from minipuzzle.models import load_tokenizer
from minipuzzle.outputs import fingerprint_files, output_file, output_folder
from minipuzzle.plan import Plan, read_plan
from minipuzzle.progress import Advance, no_progress, progress_bar
from minipuzzle.ranking import RankedPlan, rank_plans
from minipuzzle.scores import Scores, read_scores, write_scores
from minipuzzle.search import SearchRequest, find_candidates, plan_of
from minipuzzle.surgery import cut_tensors

PLAN_FILE = "plan.json"
SCORES_FILE = "scores.safetensors"
UNFINISHED_SCORES_FILE = "scores.unfinished.json"

# Measures a checkpoint on some token windows; the file keeps what an interrupted measurement has done.
Measure = Callable[[Checkpoint, torch.Tensor, Path], Scores]


@dataclass(frozen=True, kw_only=True)
class PruneRequest:
    """What to cut and how to find out: a plan, or a target with scores or with text to measure on."""

    checkpoint: Checkpoint
    target: SearchRequest | None
    deployment: Deployment
    plan: Path | None = None
    scores: Path | None = None
    data: tuple[Path, ...] = ()
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    num_candidates: int = 8
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.plan is not None:
            if self.target is not None or self.scores is not None:
                raise MinipuzzleError("--plan already says what to cut", "drop --scores, --memory, --keep and --width")
        elif self.target is None:
            raise MinipuzzleError("nothing says how small the model should be", "give --memory, --keep or --width")
        elif self.scores is None and not self.data:
            raise MinipuzzleError("there is nothing to measure on", "give --data, or --scores of an earlier run")

    def provenance(self) -> dict[str, Any]:
        """What the output remembers: its teacher, for `distill`, and what was asked."""
        files = [path for path in (self.plan, self.scores, *self.data) if path is not None]
        measuring = ("samples", "sequence_length", "seed", "num_candidates", "dtype")
        return {
            "command": "prune",
            "teacher": str(self.checkpoint.folder.resolve()),
            "teacher_fingerprint": self.checkpoint.fingerprint,
            "settings": {
                "target": asdict(self.target) if self.target else None,
                "deployment": asdict(self.deployment),
                **{name: getattr(self, name) for name in measuring},
                "inputs_fingerprint": fingerprint_files(files),
            },
        }


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The plan to cut by, and the candidates it was chosen from (measured, best first; empty if only predicted)."""

    plan: Plan
    ranked: tuple[RankedPlan, ...] = ()


def check_feasible(checkpoint: Checkpoint, target: SearchRequest, deployment: Deployment) -> list[Candidate]:
    """Everything that fits, whatever the scores will be: known from config.json, before any weight is read.

    Raises: InfeasibleBudgetError, or MinipuzzleError for impossible targets.
    """
    no_scores = np.zeros(len(checkpoint.architecture.layers))
    return find_candidates(checkpoint.architecture, Scores(layer={target.metric: no_scores}), target, deployment)


def prune(request: PruneRequest, measure: Measure, *, out: Path, overwrite: bool, quiet: bool) -> Choice:
    """Find the best plan and write the cut checkpoint to ``out``.

    Raises: MinipuzzleError for bad input, InfeasibleBudgetError, InputChangedError for another interrupted run.
    """
    checkpoint = request.checkpoint
    if request.target is not None:
        check_feasible(checkpoint, request.target, request.deployment)
    # Read before the output folder is begun, so that a broken file leaves no trace.
    documents = read_documents(request.data, load_tokenizer(checkpoint.folder)) if request.data else []
    plan = read_plan(request.plan) if request.plan is not None else None
    scores = read_scores(request.scores) if request.scores is not None else None
    with output_folder(out, request.provenance(), overwrite=overwrite) as folder:
        if plan is not None:
            choice = Choice(plan=plan)
        else:
            choice = _choose(request, scores or _measured_scores(request, documents, measure, folder), quiet)
        num_tensors = sum(1 for _ in choice.plan.apply(checkpoint.architecture).tensors())
        with progress_bar("cutting", num_tensors, quiet=quiet) as advance:
            write_pruned(checkpoint, choice.plan, folder, advance)
    return choice


def _measured_scores(request: PruneRequest, documents: list[str], measure: Measure, folder: Path) -> Scores:
    """Scores measured by an interrupted run of the same command, or measured now and kept in ``folder``."""
    kept = folder / SCORES_FILE
    if kept.is_file():
        return read_scores(kept)
    token_ids = sample_windows(
        load_tokenizer(request.checkpoint.folder),
        documents,
        num_samples=request.samples,
        sequence_length=request.sequence_length,
        seed=request.seed,
    )
    scores = measure(request.checkpoint, token_ids, folder / UNFINISHED_SCORES_FILE)
    with output_file(kept) as path:
        write_scores(scores, path)
    return scores


def _choose(request: PruneRequest, scores: Scores, quiet: bool) -> Choice:
    """The best of the candidates by predicted loss, the first ``num_candidates`` of which are measured.

    They are measured on the tokens of the scores; scores without tokens leave the prediction to decide.
    """
    assert request.target is not None
    checkpoint = request.checkpoint
    source, target = checkpoint.architecture, request.target
    scores.check_against(source, checkpoint.fingerprint)
    candidates = find_candidates(source, scores, target, request.deployment)
    num_measured = request.num_candidates if scores.token_ids is not None else 1
    plans = [plan_of(source, scores, candidate, metric=target.metric) for candidate in candidates[:num_measured]]
    if len(plans) == 1:
        return Choice(plan=plans[0])
    windows = _windows_of(scores, checkpoint)
    dtype: torch.dtype = getattr(torch, request.dtype)
    ranked = rank_plans(checkpoint, plans, windows, dtype=dtype, device=request.device, quiet=quiet)
    return Choice(plan=ranked[0].plan, ranked=tuple(ranked))


def _windows_of(scores: Scores, checkpoint: Checkpoint) -> EvaluationWindows:
    assert scores.token_ids is not None
    return windows_of_tokens(load_tokenizer(checkpoint.folder), torch.from_numpy(scores.token_ids).long())


def write_pruned(checkpoint: Checkpoint, plan: Plan, folder: Path, advance: Advance = no_progress) -> None:
    """Cut a checkpoint into an existing folder, shard by shard: weights, config.json, tokenizer and the plan.

    ``advance`` is called once a tensor. Raises: MinipuzzleError for a plan of another model or broken weights.
    """
    writer = ShardWriter(folder)
    for name, tensor in cut_tensors(checkpoint, plan):
        writer.add(name, tensor)
        advance(1)
    writer.finish()
    write_json(folder / "config.json", checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture)))
    copy_companions(checkpoint.folder, folder)
    (folder / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")


def planned_work(request: PruneRequest) -> dict[str, int]:
    """What a run would do apart from measuring, after checking all that can be checked without weights.

    Units: as the names say; ``disk_at_most_bytes`` is the weights of the largest candidate.
    """
    checkpoint = request.checkpoint
    source = checkpoint.architecture
    facts = {"source_memory_bytes": memory_breakdown(source, request.deployment).total_bytes}
    num_kept_parameters = source.num_parameters
    if request.plan is not None:
        plan = read_plan(request.plan)
        plan.check_against(source)
        num_kept_parameters = plan.apply(source).num_parameters
    if request.target is not None:
        candidates = check_feasible(checkpoint, request.target, request.deployment)
        num_kept_parameters = max(candidate.num_parameters for candidate in candidates)
        facts |= {
            "budget_bytes": request.target.budget_bytes(facts["source_memory_bytes"]),
            "candidates_that_fit": len(candidates),
            "candidates_to_measure": min(len(candidates), request.num_candidates),
        }
    if request.scores is not None:
        read_scores(request.scores).check_against(source, checkpoint.fingerprint)
    elif request.data:
        facts |= {
            "documents": len(read_documents(request.data, load_tokenizer(checkpoint.folder))),
            "calibration_tokens": request.samples * request.sequence_length,
        }
    disk_bytes = checkpoint.weight_bytes * num_kept_parameters // source.num_parameters
    return {**facts, "disk_at_most_bytes": disk_bytes}
