"""Run all benchmarks and write results.md beside this file."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import distill_loss
import layer_scores
import torch
import transformers

MIB = 2**20


def render(scoring: layer_scores.ScoringResult, loss: distill_loss.LossResult) -> str:
    """The result page."""
    tokens = f"{distill_loss.TOKENS} tokens x {distill_loss.VOCABULARY} vocabulary x {distill_loss.HIDDEN} hidden"
    return f"""# Benchmark results

Written by `make bench` on {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__},
transformers {transformers.__version__}. Both ways of a comparison did the same work in the same run, alternating where
they share a process; the best of three counts.

## Layer scores: shared prefixes against replace-one-block

The embedded hybrid, {scoring.num_layers} layers, {scoring.num_tokens:,} tokens, all five metrics.

| | shared prefixes | replace-one-block | ratio |
|---|---:|---:|---:|
| seconds | {scoring.shared_seconds:.2f} | {scoring.replace_one_block_seconds:.2f} | {scoring.ratio:.2f} |
| layer applications | {scoring.shared_applications:,} | {scoring.replace_one_block_applications:,} | \
{scoring.replace_one_block_applications / scoring.shared_applications:.2f} |
| weight bytes read | {scoring.shared_bytes_read:,} | {scoring.replace_one_block_bytes_read:,} | \
{scoring.replace_one_block_bytes_read / scoring.shared_bytes_read:.1f} |

Largest difference between the two, relative to each metric's largest score: {scoring.largest_relative_difference:.1e}.

## Distillation loss: chunked against whole logits

{tokens}, float32, forward and backward.

| | chunked | whole logits | ratio |
|---|---:|---:|---:|
| extra peak memory, MiB | {loss.chunked_bytes / MIB:.0f} | {loss.plain_bytes / MIB:.0f} | {loss.memory_ratio:.1f} |
| seconds | {loss.chunked_seconds:.2f} | {loss.plain_seconds:.2f} | \
{loss.plain_seconds / loss.chunked_seconds:.2f} |

The gradient of the head itself is {distill_loss.VOCABULARY * distill_loss.HIDDEN * 4 / MIB:.0f} MiB of that.
"""


if __name__ == "__main__":
    page = render(layer_scores.run(), distill_loss.run())
    (Path(__file__).parent / "results.md").write_text(page, encoding="utf-8")
    print(page)
