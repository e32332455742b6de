"""Measuring a model as a whole: text into windows, the scores of layers, channels and heads, and the score file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from importance.alterations import LayerRequest, parse_layers, parse_widths
from importance.measure import measure
from importance.work import PlannedScoring, open_stack, predict_work
from minipuzzle.cut.scores import Scores, write_scores
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.outputs import check_target_file, fingerprint_files, output_file
from minipuzzle.runtime.mamba_scan import scan_path
from minipuzzle.workflows.settings import ScoreSettings, paths_of
from minipuzzle.workflows.verbs import Model, open_model, sample_text, verb


def run_score(model: Model, settings: ScoreSettings) -> Scores:
    """Measure what a model loses without each layer, channel and head.

    With ``out`` the scores are written there, and an interrupted measurement continues. Under torchrun all processes
    call this together and share the samples; the first alone writes.

    Raises: MinipuzzleError for a model, text or memory that do not do; InputChangedError for another interrupted run.
    """
    checkpoint, compute = open_model(model), settings.compute
    request = _checked_request(checkpoint, settings)
    out, is_first = None if settings.out is None else Path(settings.out), compute.processes.is_first
    if out is not None and is_first:
        check_target_file(out)
    data = paths_of(settings.data)
    scores = measure(
        checkpoint,
        sample_text(
            checkpoint,
            data,
            samples=max(settings.samples, settings.num_channel_samples),
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            is_shuffled=True,
        ),
        compute,
        request=request,
        layer_samples=settings.samples,
        channel_samples=settings.num_channel_samples,
        partial_file=None if out is None else out.with_name(f"{out.name}.partial-sums"),
    )
    provenance = {"data_fingerprint": fingerprint_files(list(data)), "seed": str(settings.seed)}
    scores = replace(scores, metadata={**scores.metadata, **provenance})
    if out is not None and is_first:
        with output_file(out) as path:
            write_scores(scores, path)
    return scores


score = verb(ScoreSettings, run_score)


def plan_score(model: Model, settings: ScoreSettings) -> PlannedScoring:
    """Check everything that can be checked without reading weights, and predict the work.

    Raises: as ``run_score``.
    """
    checkpoint, compute = open_model(model), settings.compute
    request = _checked_request(checkpoint, settings)
    if settings.out is not None and compute.processes.is_first:
        check_target_file(Path(settings.out))
    samples = {"layer_samples": settings.samples, "channel_samples": settings.num_channel_samples}
    sample_text(
        checkpoint,
        paths_of(settings.data),
        samples=max(samples.values()),
        sequence_length=settings.sequence_length,
    )
    stack = open_stack(checkpoint, compute, request=request, sequence_length=settings.sequence_length)
    work = predict_work(stack, request=request, sequence_length=settings.sequence_length, **samples)
    return PlannedScoring(
        work=work,
        memory_limit_bytes=stack.memory_bytes,
        processes=compute.processes.world_size,
        scan=scan_path(stack.device),
        removals=request.removals,
    )


def _checked_request(checkpoint: Checkpoint, settings: ScoreSettings) -> LayerRequest:
    checkpoint.require_plain_weights()
    source = checkpoint.architecture
    request = LayerRequest(
        layers=None if settings.layers is None else parse_layers(settings.layers, source),
        widths=parse_widths(tuple(settings.variants), source),
        removals=settings.iterative,
        metric=settings.remove_by,
    )
    request.candidates(source)
    return request
