"""What the steps of a run are expected to take: seconds by counted work and this machine's rate, memory and disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.scale.estimate import estimate_run
from distill.scale.hardware import hardware_of
from minipuzzle.architecture.model import Architecture
from minipuzzle.architecture.quantities import parse_count
from minipuzzle.cut.plan import read_plan
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.workflows.compensation import COMPENSATION_TOKENS
from minipuzzle.workflows.prune import check_feasible, prune_request
from minipuzzle.workflows.settings import (
    DEFAULT_SAMPLES,
    EXPORT_SAMPLES,
    DistillOptions,
    EvaluateSettings,
    ExportSettings,
    PruneSettings,
    ScoreSettings,
)

_STATE_BYTES = 12  # a parameter of a saved state: float32 weights and two moments
_FLOPS_PER_PARAMETER = 2.0  # and token, forward
_SCORED_STREAMS = 0.5  # of all pairs of layers: what two altered models have in common runs once


def expected_work(checkpoint: Checkpoint, steps: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds, memory and disk of each step by name, from settings as they are given; what the cut leaves is taken to
    be the largest candidate.

    Units: as the names say. Raises: InfeasibleBudgetError, MinipuzzleError for what cannot be.
    """
    source = checkpoint.architecture
    student = _largest_cut(checkpoint, steps["prune"]) if "prune" in steps else source
    hardware = hardware_of(Compute())
    rate = hardware.bf16_flops * hardware.expected_fraction
    weight_bytes = checkpoint.weight_bytes
    cut_bytes = weight_bytes * student.num_parameters // source.num_parameters
    found: dict[str, dict[str, float]] = {}
    for name, settings in steps.items():
        flops, memory_bytes, disk_bytes = 0.0, 2.0 * weight_bytes, 0.0
        if isinstance(settings, ScoreSettings):
            flops = _scoring_flops(source, settings.num_layer_samples * settings.sequence_length)
        elif isinstance(settings, PruneSettings):
            flops, disk_bytes = _pruning_flops(source, student, settings, has_scores="score" in steps), cut_bytes
        elif isinstance(settings, DistillOptions):
            estimate = estimate_run(
                student, source, settings.training, settings.engine, hardware=hardware, num_processes=1
            )
            flops, memory_bytes = estimate.hours * 3600 * rate, estimate.memory.total_bytes
            disk_bytes = cut_bytes + _STATE_BYTES * student.num_parameters * (settings.engine.keep_last + 1)
        elif isinstance(settings, ExportSettings):
            flops = (
                _forward(student, (settings.samples or EXPORT_SAMPLES) * settings.sequence_length) * 2
            )  # calibrated, then verified
            disk_bytes = cut_bytes
        elif isinstance(settings, EvaluateSettings) and settings.max_tokens:
            flops = _forward(student, settings.max_tokens) + _forward(source, settings.max_tokens)
        found[name] = {"seconds": flops / rate, "memory_bytes": memory_bytes, "disk_bytes": disk_bytes}
    return found


def _forward(architecture: Architecture, num_tokens: int) -> float:
    return _FLOPS_PER_PARAMETER * architecture.num_active_parameters * num_tokens


def _scoring_flops(source: Architecture, num_tokens: int) -> float:
    return _forward(source, num_tokens) * (1 + _SCORED_STREAMS * len(source.layers))


def _pruning_flops(source: Architecture, student: Architecture, settings: PruneSettings, *, has_scores: bool) -> float:
    num_tokens = (settings.samples or DEFAULT_SAMPLES) * settings.sequence_length
    flops = 0.0 if has_scores or settings.scores or settings.plan else _scoring_flops(source, num_tokens)
    if settings.plan is None:
        flops += settings.num_candidates * _forward(student, num_tokens)
    if not settings.no_compensate:
        flops += 2 * _forward(source, COMPENSATION_TOKENS)  # both streams; solving takes little beside them
    if settings.race_tokens is not None:
        flops += 3 * settings.num_finalists * _forward(student, parse_count(str(settings.race_tokens)))
    return flops


def _largest_cut(checkpoint: Checkpoint, settings: PruneSettings) -> Architecture:
    """The architecture of the plan, or of the largest candidate that meets the limits."""
    if settings.plan is not None:
        plan = read_plan(Path(settings.plan)) if isinstance(settings.plan, str | Path) else settings.plan
        plan.check_against(checkpoint.architecture)
        return plan.apply(checkpoint.architecture)
    request = prune_request(checkpoint, settings)
    assert request.target is not None, "a request without a plan has a target"
    candidates = check_feasible(checkpoint, request.target, request.deployment)
    return max(candidates, key=lambda candidate: candidate.num_parameters).architecture
