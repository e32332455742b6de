"""Measuring a checkpoint: layer and channel scores of the same tokens, and beforehand what that will cost."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from importance import channels, layers
from importance.partial import PartialSums
from minipuzzle import __version__
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import progress_bar
from minipuzzle.scores import LAYER_METRICS, Scores
from minipuzzle.streaming import EMBEDDINGS, FINAL_NORM, HEAD, LayerStack, default_memory_bytes

_IDENTITY = ("model_fingerprint", "token_ids_sha256", "samples", "dtype", "tool_versions")  # of a measurement


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a measurement costs: exact numbers of layer applications and bytes read, an estimate of the memory.

    A layer application takes one stream of one slice of the samples through one layer: L (L + 1) / 2 of them score
    all layers on a slice, L score all channels.
    """

    layer_slices: int
    channel_slices: int
    layer_applications: int
    weight_bytes_read: int
    weights_stay_in_memory: bool
    peak_bytes: int


def measure(
    checkpoint: Checkpoint,
    token_ids_BT: torch.Tensor,
    *,
    layer_samples: int | None = None,
    channel_samples: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    device_memory_bytes: int | None = None,
    partial_file: Path | None = None,
    quiet: bool = False,
) -> Scores:
    """Scores of all layers, channels and heads of a checkpoint on some windows of tokens.

    ``layer_samples`` and ``channel_samples``: how many of the windows, from the first, each measurement takes
    (default: all). ``device_memory_bytes``: limit of weights and working memory together (default: most of what is
    free). ``partial_file``: keeps the sums of finished slices while layers are scored, so that an interrupted
    measurement continues. The metadata hold what is needed to repeat the measurement, and its counters.

    Shapes: ``token_ids_BT`` ``[samples, sequence_length]`` of token ids, as from ``corpus.sample_windows``.
    Raises: MinipuzzleError if ids lie outside the vocabulary, the memory is too small, or a score is not finite;
    InputChangedError if ``partial_file`` belongs to another measurement.
    """
    _check_token_ids(checkpoint, token_ids_BT)
    layer_ids, channel_ids = token_ids_BT[:layer_samples], token_ids_BT[:channel_samples]
    num_layers = len(checkpoint.architecture.layers)
    stack = open_stack(
        checkpoint,
        sequence_length=token_ids_BT.shape[1],
        device=device,
        dtype=dtype,
        device_memory_bytes=device_memory_bytes,
    )
    metadata = _metadata(checkpoint, token_ids_BT, len(layer_ids), len(channel_ids), dtype)
    partial = None if partial_file is None else PartialSums(partial_file, {key: metadata[key] for key in _IDENTITY})
    with progress_bar("scoring layers", layers.num_steps(num_layers, len(layer_ids)), quiet=quiet) as advance:
        layer_scores = layers.score_layers(
            stack,
            layer_ids,
            advance=advance,
            earlier=partial.read() if partial else None,
            after_slice=partial.write if partial else None,
        )
    with progress_bar("scoring channels", num_layers * len(channel_ids), quiet=quiet) as advance:
        units, energies = channels.score_channels(stack, channel_ids, advance=advance)
    if partial:
        partial.remove()
    return Scores(
        layer=layer_scores,
        units=units,
        energies=energies,
        token_ids=token_ids_BT.numpy().astype(np.int32),
        metadata={**metadata, "counters": json.dumps(asdict(stack.counters))},
    )


def open_stack(
    checkpoint: Checkpoint,
    *,
    sequence_length: int,
    device: str = "cpu",
    dtype: str = "float32",
    device_memory_bytes: int | None = None,
) -> LayerStack:
    """A layer stack with room for measuring at a sequence length; no weight is read yet.

    Raises: MinipuzzleError if the memory is too small, with the amount that is needed.
    """
    compute_dtype: torch.dtype = getattr(torch, dtype)
    memory_bytes = default_memory_bytes(device) if device_memory_bytes is None else device_memory_bytes
    return LayerStack(
        checkpoint,
        device=device,
        dtype=compute_dtype,
        device_memory_bytes=memory_bytes,
        reserved_bytes=layers.reserved_bytes(checkpoint, sequence_length, compute_dtype, memory_bytes, device),
    )


def predict_work(stack: LayerStack, *, layer_samples: int, channel_samples: int, sequence_length: int) -> Work:
    """What ``measure`` will do with a stack as ``open_stack`` gives it."""
    layer_slice = layers.samples_per_slice(stack, layer_samples, sequence_length)
    channel_slice = channels.samples_per_slice(stack, channel_samples, sequence_length)
    layer_slices, channel_slices = -(-layer_samples // layer_slice), -(-channel_samples // channel_slice)
    body_bytes = sum(stack.stored_bytes(part) for part in (EMBEDDINGS, *range(stack.num_layers)))
    head_bytes, norm_bytes = stack.stored_bytes(HEAD), stack.stored_bytes(FINAL_NORM)
    if stack.is_resident:
        read_bytes = body_bytes + norm_bytes + (0 if stack.architecture.tied_embeddings else head_bytes)
    else:  # the final norm is small and stays
        read_bytes = (layer_slices + channel_slices) * body_bytes + layer_slices * head_bytes + norm_bytes
    applications = layer_slices * stack.num_layers * (stack.num_layers + 1) // 2 + channel_slices * stack.num_layers
    streams_bytes = layer_slice * layers.sample_bytes(stack.checkpoint, sequence_length, stack.dtype)
    head_work_bytes = layers.head_bytes(stack.checkpoint, sequence_length, stack.memory_bytes, stack.device)
    working_bytes = streams_bytes + max(stack.activation_bytes(sequence_length), head_work_bytes)
    return Work(
        layer_slices=layer_slices,
        channel_slices=channel_slices,
        layer_applications=applications,
        weight_bytes_read=read_bytes,
        weights_stay_in_memory=stack.is_resident,
        peak_bytes=stack.weight_bytes + working_bytes,
    )


def _check_token_ids(checkpoint: Checkpoint, token_ids_BT: torch.Tensor) -> None:
    vocabulary = checkpoint.architecture.vocabulary
    largest = int(token_ids_BT.max())
    if largest >= vocabulary:
        raise MinipuzzleError(
            f"the text holds token id {largest}, but the model's vocabulary has {vocabulary} entries",
            "use the tokenizer that belongs to the model",
        )


def _metadata(
    checkpoint: Checkpoint, token_ids_BT: torch.Tensor, layer_samples: int, channel_samples: int, dtype: str
) -> dict[str, str]:
    definitions = {"layer": LAYER_METRICS, "unit": channels.UNIT_DEFINITIONS, "energy": channels.ENERGY_DEFINITIONS}
    versions = {"minipuzzle": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
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
