"""Measuring a checkpoint: layer and channel scores of the same tokens, in one process or several."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from importance import channels, layers
from importance.alterations import LayerRequest, narrowed_plans
from importance.layers import Hooks, Metrics, alteration_tree, removal_plans, score_plans
from importance.metrics import HeadInputMetrics
from importance.partial import PartialSums
from importance.refits.scores import score_mended
from importance.stream_cache import StreamCache
from importance.work import cache_bytes, open_stack
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.cut.plan import Plan, plan_without
from minipuzzle.cut.scores import Scores
from minipuzzle.data.windows import check_token_ids
from minipuzzle.errors import InputChangedError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.mamba_scan import scan_path
from minipuzzle.runtime.processes import Processes
from minipuzzle.version import __version__

# What must agree for the sums of an interrupted measurement to be continued.
_IDENTITY = ("model_fingerprint", "token_ids_sha256", "samples", "channel_samples", "dtype", "tool_versions")


@dataclass(frozen=True, kw_only=True)
class _Measurement:
    """A measurement under way."""

    stack: LayerStack
    partial: PartialSums | None

    @property
    def processes(self) -> Processes:
        """Those that share the samples."""
        return self.stack.compute.processes


def measure(
    checkpoint: Checkpoint,
    token_ids_BT: torch.Tensor,
    compute: Compute = Compute(),
    *,
    request: LayerRequest | None = None,
    layer_samples: int | None = None,
    channel_samples: int | None = None,
    partial_file: Path | None = None,
    starts_afresh: bool = False,
) -> Scores:
    """Scores of layers, channels and heads of a checkpoint on some windows of tokens.

    ``request``: which layers, narrower forms and removals (default: leaving out each layer). ``layer_samples`` and
    ``channel_samples``: how many of the windows, from the first, each measurement takes (default: all).
    ``partial_file``: keeps the sums of finished slices, so that an interrupted measurement continues (each process
    but the first has its own beside it); with ``starts_afresh`` sums of another measurement there are dropped. The
    processes of a torchrun job share the samples and all get all scores.
    The metadata hold what is needed to repeat the measurement, and its counters.

    Shapes: ``token_ids_BT`` ``[samples, sequence_length]`` of token ids, as from ``sample_windows``.
    Raises: MinipuzzleError if ids lie outside the vocabulary, the memory is too small, or a value is not finite;
    InputChangedError if ``partial_file`` belongs to another measurement, unless ``starts_afresh``.
    """
    check_token_ids(token_ids_BT, checkpoint.architecture.vocabulary)
    request, processes = request or LayerRequest(), compute.processes
    layer_ids, channel_ids = token_ids_BT[:layer_samples], token_ids_BT[:channel_samples]
    num_windows, sequence_length = layer_ids.shape
    stack = open_stack(checkpoint, compute, request=request, sequence_length=sequence_length, num_windows=num_windows)
    metadata = _metadata(checkpoint, token_ids_BT, len(layer_ids), len(channel_ids), compute.dtype)
    metadata |= {**request.to_metadata(), "scan": scan_path(stack.device)}
    identity = {key: metadata[key] for key in (*_IDENTITY, *request.to_metadata())}
    partial = None if partial_file is None else _open_partial(partial_file, identity, processes, starts_afresh)
    run = _Measurement(stack=stack, partial=partial)
    units, energies = channels.score_channels(
        stack,
        channel_ids,
        earlier=partial.stage("channels") if partial else None,
        after_slice=(lambda arrays: partial.write("channels", arrays)) if partial else None,
    )
    of_units = Scores(layer={}, units=units, energies=energies)
    found = _score_layers(run, request, of_units, layer_ids)
    counters = processes.sum_(torch.tensor(list(asdict(stack.counters).values()), dtype=torch.int64)).tolist()
    if partial:
        processes.wait()  # all are done before any forgets
        partial.remove()
    return replace(
        of_units,
        layer=found.layer,
        variants=found.variants,
        blocks=found.blocks,
        token_ids=token_ids_BT.numpy().astype(np.int32),
        metadata={
            **metadata,
            "processes": str(processes.world_size),
            "removed_layers": json.dumps(found.removed),
            "counters": json.dumps(dict(zip(asdict(stack.counters), counters, strict=True))),
        },
    )


def _open_partial(path: Path, identity: dict[str, str], processes: Processes, starts_afresh: bool) -> PartialSums:
    path = path if processes.is_first else path.with_name(f"{path.name}.{processes.rank}")
    identity = {**identity, "processes": str(processes.world_size)}
    try:
        return PartialSums(path, identity)
    except InputChangedError:
        if not starts_afresh:
            raise
        path.unlink()
        return PartialSums(path, identity)


@dataclass(kw_only=True)
class _LayerScores:
    layer: dict[str, NDArray[np.float64]]
    variants: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    blocks: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)


def _score_layers(
    run: _Measurement, request: LayerRequest, of_units: Scores, token_ids_BT: torch.Tensor
) -> _LayerScores:
    """Scores of leaving out layers and of narrower ones; then of what is left, as often as a layer is removed.

    A removed layer keeps the score at which it was removed; the others have those of the last round.
    """
    source = run.stack.architecture
    candidates, narrowings = request.candidates(source), request.narrowings(source)
    narrowed, blocks = narrowed_plans(source, of_units, request), request.blocks(source)
    num_samples = len(layers.share_of_samples(len(token_ids_BT), run.processes))
    needs = layers.working_set(source, token_ids_BT.shape[1], request.num_alterations(source), run.stack.compute)
    slice_samples = run.stack.sequences_that_fit(needs, num_samples)
    caches = request.removals and not request.is_compensated
    max_bytes = cache_bytes(run.stack, needs, slice_samples) if caches else 0
    cache = StreamCache(max_bytes=max_bytes, num_slices=-(-num_samples // slice_samples)) if max_bytes else None
    found = _LayerScores(layer={metric: np.full(len(source.layers), np.nan) for metric in LAYER_METRICS})
    for round_idx in range(request.removals + 1):
        left = [layer_idx for layer_idx in candidates if layer_idx not in found.removed]
        plans = removal_plans(source, left, frozenset(found.removed))
        plans += [] if round_idx else [*narrowed, *(plan_without(source, block) for block in blocks)]
        if request.is_compensated:
            values = _score_mended_round(run, round_idx, plans, token_ids_BT)
        else:
            values = _score_round(run, round_idx, plans, token_ids_BT, slice_samples, cache)
        for metric, scores in values.items():
            found.layer[metric][left] = scores[: len(left)]
            if blocks and not round_idx:
                found.blocks[metric] = np.zeros(len(source.layers))
                found.blocks[metric][[block[0] for block in blocks]] = scores[len(left) + len(narrowed) :]
            of_narrowings = scores[len(left) : len(left) + len(narrowed)]
            for (layer_idx, axis, width), score in zip(narrowings, of_narrowings, strict=not round_idx):
                name = f"{metric}.{axis}.{width}"
                found.variants.setdefault(name, np.zeros(len(source.layers)))[layer_idx] = score
        if round_idx < request.removals:
            cheapest = left[int(np.argmin(values[request.metric][: len(left)]))]
            found.removed.append(run.processes.broadcast(cheapest))
    return found


def _score_round(
    run: _Measurement,
    round_idx: int,
    plans: list[Plan],
    token_ids_BT: torch.Tensor,
    slice_samples: int,
    cache: StreamCache | None,
) -> Metrics:
    stage, partial = f"layers-{round_idx}", run.partial
    earlier = partial.stage(stage) if partial else None
    num_samples = len(layers.share_of_samples(len(token_ids_BT), run.processes))
    steps = alteration_tree(run.stack.architecture, plans).num_steps(num_samples)
    title = f"round {round_idx + 1} of layers" if round_idx else "scoring layers"
    with run.stack.compute.progress(title, steps) as advance:
        hooks = Hooks(
            advance=advance,
            earlier=HeadInputMetrics.from_arrays(earlier) if earlier else None,
            after_slice=(lambda metrics: partial.write(stage, metrics.to_arrays())) if partial else None,
            cache=cache,
        )
        return score_plans(run.stack, plans, token_ids_BT, slice_samples=slice_samples, hooks=hooks)


def _score_mended_round(run: _Measurement, round_idx: int, plans: list[Plan], token_ids_BT: torch.Tensor) -> Metrics:
    stage, partial = f"mended-layers-{round_idx}", run.partial
    with run.stack.compute.progress(f"scoring layers, mended, round {round_idx + 1}", len(plans)) as advance:
        return score_mended(
            run.stack,
            plans,
            token_ids_BT,
            advance=advance,
            earlier=partial.stage(stage) if partial else None,
            after_plan=(lambda values: partial.write(stage, values)) if partial else None,
        )


def _metadata(
    checkpoint: Checkpoint, token_ids_BT: torch.Tensor, layer_samples: int, channel_samples: int, dtype: str
) -> dict[str, str]:
    of_layers = {name: metric.definition for name, metric in LAYER_METRICS.items()}
    definitions = {"layer": of_layers, "unit": channels.UNIT_DEFINITIONS, "energy": channels.ENERGY_DEFINITIONS}
    versions = {"minipuzzle": __version__, "torch": torch.__version__, "transformers": version("transformers")}
    return {
        "model_fingerprint": checkpoint.fingerprint,
        "architecture_fingerprint": checkpoint.architecture.fingerprint(),
        "samples": str(layer_samples),
        "channel_samples": str(channel_samples),
        "sequence_length": str(token_ids_BT.shape[1]),
        "token_ids_sha256": hashlib.sha256(token_ids_BT.numpy().astype(np.int32).tobytes()).hexdigest(),
        "dtype": dtype,
        "metric_definitions": json.dumps({kind: dict(table) for kind, table in definitions.items()}),
        "tool_versions": json.dumps(versions),
    }
