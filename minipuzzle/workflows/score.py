"""Measuring a model as a whole: text into windows, the scores of layers, channels and heads, and the score file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from importance.alterations import LayerRequest, parse_layers, parse_widths
from importance.measure import measure
from importance.work import PlannedScoring, open_stack, predict_work
from minipuzzle.cut.scores import Scores, read_scores, write_scores
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.outputs import check_target_file, fingerprint_files, only_writer, output_file
from minipuzzle.runtime.mamba_scan import scan_path
from minipuzzle.workflows.settings import DEFAULT_SAMPLES, ScoreSettings, paths_of
from minipuzzle.workflows.verbs import Model, open_plain, sample_text, verb


def run_score(model: Model, settings: ScoreSettings) -> Scores:
    """Measure what a model loses without each layer, channel and head.

    With ``out`` the scores are written there, and an interrupted measurement continues. Under torchrun all processes
    call this together and share the samples; the first alone writes.

    Raises: MinipuzzleError for a model, text or memory that do not do; InputChangedError for another interrupted run.
    """
    checkpoint, compute = open_plain(model), settings.compute
    request, out = _checked_request(checkpoint, settings), None if settings.out is None else Path(settings.out)
    if out is None or not compute.processes.is_first:
        return _measured(checkpoint, settings, request)
    with only_writer(out, lock=out.with_name(f".{out.name}.writer")):
        scores = _measured(checkpoint, settings, request)
        with output_file(out) as path:
            write_scores(scores, path)
    return scores


score = verb(ScoreSettings, run_score)


def _measured(checkpoint: Checkpoint, settings: ScoreSettings, request: LayerRequest) -> Scores:
    data = paths_of(settings.data)
    scores = measure(
        checkpoint,
        sample_text(
            checkpoint,
            data,
            samples=settings.needed_samples,
            default_samples=DEFAULT_SAMPLES,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            is_shuffled=True,
        ),
        settings.compute,
        request=request,
        layer_samples=settings.num_layer_samples,
        channel_samples=settings.num_channel_samples,
        partial_file=None if settings.out is None else Path(f"{settings.out}.partial-sums"),
        starts_afresh=settings.overwrite,
    )
    provenance = {"data_fingerprint": fingerprint_files(list(data)), "seed": str(settings.seed)}
    return replace(scores, metadata={**scores.metadata, **provenance})


def plan_score(model: Model, settings: ScoreSettings) -> PlannedScoring:
    """Check everything that can be checked without reading weights, and predict the work.

    Raises: as ``run_score``.
    """
    checkpoint, compute = open_plain(model), settings.compute
    request = _checked_request(checkpoint, settings)
    token_ids = sample_text(
        checkpoint,
        paths_of(settings.data),
        samples=settings.needed_samples,
        default_samples=DEFAULT_SAMPLES,
        sequence_length=settings.sequence_length,
    )
    samples = {
        "layer_samples": min(settings.num_layer_samples, len(token_ids)),
        "channel_samples": min(settings.num_channel_samples, len(token_ids)),
    }
    stack = open_stack(
        checkpoint,
        compute,
        request=request,
        sequence_length=settings.sequence_length,
        num_windows=samples["layer_samples"],
    )
    work = predict_work(stack, request=request, sequence_length=settings.sequence_length, **samples)
    return PlannedScoring(
        work=work,
        memory_limit_bytes=stack.memory_bytes,
        processes=compute.processes.world_size,
        scan=scan_path(stack.device),
        removals=request.removals,
    )


def _checked_request(checkpoint: Checkpoint, settings: ScoreSettings) -> LayerRequest:
    if settings.out is not None and settings.compute.processes.is_first:
        _check_target(Path(settings.out), [checkpoint.folder, *paths_of(settings.data)], settings.overwrite)
    source = checkpoint.architecture
    request = LayerRequest(
        layers=None if settings.layers is None else parse_layers(settings.layers, source),
        widths=parse_widths(tuple(settings.variants), source),
        removals=settings.iterative,
        metric=settings.remove_by,
        is_compensated=settings.compensated,
    )
    request.candidates(source)
    return request


def _check_target(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    if out.suffix == ".json":
        raise MinipuzzleError(f"{out} would be read as JSON", "give ‹out› a name that ends in .safetensors")
    check_target_file(out, overwrite=overwrite, read=read_scores, inputs=inputs)
