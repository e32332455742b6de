"""Layer scores: shared prefixes against replace-one-block (load, drop one layer, run the whole model; for each layer).

Same model, same tokens, same metrics, one process, runs alternating; the best of each counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from importance.layers import score_layers
from importance.metrics import HeadInputMetrics, next_token_labels
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.corpus import read_documents, sample_windows
from minipuzzle.models import load_model, load_tokenizer, parts_of
from minipuzzle.streaming import LayerStack

EXAMPLE = Path(__file__).parents[1] / "tiny_hybrid"


@dataclass(frozen=True, kw_only=True)
class ScoringResult:
    """Best seconds of both ways, the work they did, and their largest relative difference over all metrics."""

    num_layers: int
    num_tokens: int
    shared_seconds: float
    replace_one_block_seconds: float
    shared_applications: int
    shared_bytes_read: int
    replace_one_block_applications: int
    replace_one_block_bytes_read: int
    largest_relative_difference: float

    @property
    def ratio(self) -> float:
        """How many times faster shared prefixes are."""
        return self.replace_one_block_seconds / self.shared_seconds


def replace_one_block(folder: Path, token_ids_BT: torch.Tensor) -> dict[str, np.ndarray]:
    """Scores of all layers by loading the checkpoint anew for each, as block-wise tools do."""
    num_layers = len(Checkpoint.open(folder).architecture.layers)
    full_BTH, head_VH = _head_input(folder, token_ids_BT, skipped=None)
    labels_BT = next_token_labels(token_ids_BT)
    results = []
    for layer_idx in range(num_layers):
        altered_BTH, _ = _head_input(folder, token_ids_BT, skipped=layer_idx)
        metrics = HeadInputMetrics(1)
        for full_TH, altered_TH, labels_T in zip(full_BTH, altered_BTH, labels_BT, strict=True):
            metrics.add(full_TH, altered_TH[None], head_VH, labels_T)
        results.append(metrics.result())
    return {metric: np.concatenate([result[metric] for result in results]) for metric in results[0]}


@torch.no_grad()
def _head_input(folder: Path, token_ids_BT: torch.Tensor, skipped: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    parts = parts_of(load_model(checkpoint), checkpoint.family)
    outputs = []
    for tokens_BT in token_ids_BT.split(8):
        hidden_BTH = parts.embeddings(tokens_BT)
        for layer_idx, layer in enumerate(parts.layers):
            hidden_BTH = hidden_BTH if layer_idx == skipped else layer(hidden_BTH)
        outputs.append(parts.final_norm(hidden_BTH))
    return torch.cat(outputs), parts.head.weight


def best_seconds(function: Callable[[], object], repeats: int) -> float:
    """The fastest of several runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def run(*, num_samples: int = 16, sequence_length: int = 256, repeats: int = 3) -> ScoringResult:
    """Measure both ways on the embedded model."""
    folder = EXAMPLE / "model"
    checkpoint = Checkpoint.open(folder)
    token_ids_BT = sample_windows(
        load_tokenizer(folder),
        read_documents([EXAMPLE / "text" / "calibration.jsonl"]),
        num_samples=num_samples,
        sequence_length=sequence_length,
    )
    num_layers = len(checkpoint.architecture.layers)
    stack = LayerStack(checkpoint)
    shared = score_layers(stack, token_ids_BT)
    naive = replace_one_block(folder, token_ids_BT)
    difference = max(float(np.max(np.abs(shared[m] - naive[m]) / np.abs(naive[m]).max())) for m in naive)
    shared_seconds, naive_seconds = [], []
    for _ in range(repeats):
        shared_seconds.append(best_seconds(lambda: score_layers(LayerStack(checkpoint), token_ids_BT), 1))
        naive_seconds.append(best_seconds(lambda: replace_one_block(folder, token_ids_BT), 1))
    return ScoringResult(
        num_layers=num_layers,
        num_tokens=token_ids_BT.numel(),
        shared_seconds=min(shared_seconds),
        replace_one_block_seconds=min(naive_seconds),
        shared_applications=stack.counters.layer_applications,
        shared_bytes_read=stack.counters.weight_bytes_read,
        replace_one_block_applications=num_layers * num_layers,
        replace_one_block_bytes_read=(num_layers + 1) * checkpoint.weight_bytes,
        largest_relative_difference=difference,
    )


if __name__ == "__main__":
    print(run())
