"""The score of every layer: how far the LM head's input moves when the layer's residual branch contributes zero.

Without layer j nothing below j changes. So one stream of hidden states is kept for the full model and one for each
removed layer below the current one; layer i is loaded once and applied to all i + 1 of them as one batch. A model of L
layers costs L (L + 1) / 2 layer applications a slice of the calibration data, and one read of the weights, where
removing layers one by one costs L * L and L.

Shape suffixes: S streams (0 is the full model, j + 1 lacks layer j), B batch, T tokens, C a chunk of them, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from importance.metrics import HeadInputMetrics, chunk_bytes, chunk_tokens, next_token_labels
from minipuzzle.architecture import Architecture
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import Advance, no_progress
from minipuzzle.streaming import LayerStack, largest_activation_bytes


def reserved_bytes(
    checkpoint: Checkpoint, num_tokens: int, dtype: torch.dtype, memory_bytes: int, device: str = "cpu"
) -> int:
    """The least that scoring layers needs beside the weights: all streams of one sample, one layer at work on one
    sequence, and the logits of one chunk."""
    return (
        sample_bytes(checkpoint, num_tokens, dtype)
        + largest_activation_bytes(checkpoint, num_tokens, dtype)
        + head_bytes(checkpoint, num_tokens, memory_bytes, device)
    )


def sample_bytes(checkpoint: Checkpoint, num_tokens: int, dtype: torch.dtype) -> int:
    """Memory of all streams of one sample."""
    architecture = checkpoint.architecture
    return (len(architecture.layers) + 1) * num_tokens * architecture.hidden * dtype.itemsize


def head_bytes(checkpoint: Checkpoint, num_tokens: int, memory_bytes: int, device: str) -> int:
    """Memory that the metrics of one chunk of tokens take."""
    sizes = _head_sizes(checkpoint.architecture)
    return chunk_bytes(chunk_tokens(num_tokens, memory_bytes, **sizes), device, **sizes)


def _head_sizes(architecture: Architecture) -> dict[str, int]:
    return {
        "num_streams": len(architecture.layers),
        "hidden": architecture.hidden,
        "vocabulary": architecture.vocabulary,
    }


def samples_per_slice(stack: LayerStack, num_samples: int, num_tokens: int) -> int:
    """Samples whose streams fit beside the weights, a layer at work and the metrics; one always does."""
    beside = stack.activation_bytes(num_tokens)
    beside += head_bytes(stack.checkpoint, num_tokens, stack.memory_bytes, stack.device)
    fitting = (stack.free_bytes - beside) // sample_bytes(stack.checkpoint, num_tokens, stack.dtype)
    return max(1, min(num_samples, fitting))


def num_steps(num_layers: int, num_samples: int) -> int:
    """Steps of progress that ``score_layers`` reports: applications of a layer, or of the head, to one sequence."""
    return num_samples * (num_layers * (num_layers + 1) // 2 + num_layers + 1)


def score_layers(
    stack: LayerStack,
    token_ids_BT: torch.Tensor,
    *,
    slice_samples: int | None = None,
    advance: Advance = no_progress,
    earlier: HeadInputMetrics | None = None,
    after_slice: Callable[[HeadInputMetrics], None] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """All metrics of LAYER_METRICS for each layer, ``[num_layers]``.

    ``slice_samples``: samples at a time (default: as many as fit). The slicing changes nothing but rounding.
    ``after_slice`` receives the sums so far, and ``earlier`` takes such sums of an interrupted run: the samples they
    cover are not run again.

    Raises: MinipuzzleError if a score is not a finite number.
    Source: arXiv 2504.03624, section 3.2, for ``mse``.
    """
    num_samples, num_tokens = token_ids_BT.shape
    slice_samples = slice_samples or samples_per_slice(stack, num_samples, num_tokens)
    metrics = earlier or HeadInputMetrics(stack.num_layers)
    num_done = metrics.num_tokens // num_tokens
    advance(num_steps(stack.num_layers, num_done))
    for start in range(num_done, num_samples, slice_samples):
        token_ids = token_ids_BT[start : start + slice_samples]
        streams_SBTH = _run_streams(stack, token_ids, advance)
        _compare_streams(stack, streams_SBTH, token_ids, metrics, advance)
        if after_slice is not None:
            after_slice(metrics)
    scores = metrics.result()
    _require_finite(scores)
    return scores


def _run_streams(stack: LayerStack, token_ids_BT: torch.Tensor, advance: Advance) -> torch.Tensor:
    """Hidden states before the final norm, of the full model and without each layer, ``[layers + 1, B, T, H]``."""
    embedded_BTH = stack.embed(token_ids_BT)
    streams_SBTH = embedded_BTH.new_empty(stack.num_layers + 1, *embedded_BTH.shape)
    streams_SBTH[0] = embedded_BTH
    for layer_idx in range(stack.num_layers):
        streams_SBTH[layer_idx + 1] = streams_SBTH[0]  # passes this layer by
        running = streams_SBTH[: layer_idx + 1]
        stack.apply(layer_idx, running, out=running)
        advance(len(running) * len(token_ids_BT))
    return streams_SBTH


def _compare_streams(
    stack: LayerStack,
    streams_SBTH: torch.Tensor,
    token_ids_BT: torch.Tensor,
    metrics: HeadInputMetrics,
    advance: Advance,
) -> None:
    labels_BT = next_token_labels(token_ids_BT).to(streams_SBTH.device)
    head_VH = stack.head_weight()
    num_tokens = token_ids_BT.shape[1]
    chunk = chunk_tokens(num_tokens, stack.memory_bytes, **_head_sizes(stack.architecture))
    for sample_idx in range(len(token_ids_BT)):
        for start in range(0, num_tokens, chunk):
            normed_SCH = stack.final_norm(streams_SBTH[:, sample_idx, start : start + chunk])
            metrics.add(normed_SCH[0], normed_SCH[1:], head_VH, labels_BT[sample_idx, start : start + chunk])
        advance(len(streams_SBTH))


def _require_finite(scores: Mapping[str, NDArray[np.float64]]) -> None:
    for metric, values in scores.items():
        for layer_idx in np.flatnonzero(~np.isfinite(values)):
            raise MinipuzzleError(
                f"the {metric} score of layer {layer_idx} is {values[layer_idx]}: the hidden states overflow",
                "measure in float32 (--dtype float32); if that is in use, check the checkpoint",
            )
