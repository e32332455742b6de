"""Layer scores: shared prefixes against replace-one-block (load, drop one layer, run the whole model; for each layer).

Replace-one-block is written as block-wise tools are: transformers' ``from_pretrained`` for each removed layer, its own
forward pass, metrics from whole logits with torch's functions (the full model's log-probabilities are kept). Same
model, tokens and metrics, one process and one thread, runs alternating; CPU seconds, so that other work on the machine
counts as little as it can. Writes layer_scores.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from importance import layers
from importance.metrics import HeadInputMetrics
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import sample_windows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import load_tokenizer

EXAMPLE = Path(__file__).parents[1] / "tiny_hybrid"
SETTINGS = ((4, 64, 5), (8, 64, 5), (8, 128, 4), (8, 512, 2))  # samples, tokens a sample, repeats
Seconds = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ScoringResult:
    """Best CPU seconds of both ways and their parts, the work they did, and their largest relative difference."""

    num_layers: int
    num_tokens: int
    shared_seconds: float
    replace_one_block_seconds: float
    shared_parts: Seconds
    replace_one_block_parts: Seconds
    shared_applications: int
    shared_bytes_read: int
    replace_one_block_applications: int
    replace_one_block_bytes_read: int
    largest_relative_difference: float

    @property
    def ratio(self) -> float:
        """How many times faster shared prefixes are."""
        return self.replace_one_block_seconds / self.shared_seconds


@contextmanager
def timed(parts: Seconds, name: str) -> Iterator[None]:
    """Add the CPU seconds of a block to a part."""
    start = time.process_time()
    yield
    parts[name] = parts.get(name, 0.0) + time.process_time() - start


@torch.no_grad()
def replace_one_block(folder: Path, token_ids_BT: torch.Tensor, parts: Seconds) -> dict[str, np.ndarray]:
    """Scores of all layers by loading the checkpoint anew for each, as block-wise tools do."""
    num_layers = len(Checkpoint.open(folder).architecture.layers)
    full_BTH, full_logits_BTV = _run(folder, token_ids_BT, None, parts)
    with timed(parts, "metrics"):
        full_log_probabilities_BTV = full_logits_BTV.log_softmax(-1)
    scores: dict[str, list[float]] = {}
    for layer_idx in range(num_layers):
        altered_BTH, logits_BTV = _run(folder, token_ids_BT, layer_idx, parts)
        with timed(parts, "metrics"):
            found = _plain_metrics(full_BTH, full_log_probabilities_BTV, altered_BTH, logits_BTV, token_ids_BT)
            for metric, value in found.items():
                scores.setdefault(metric, []).append(value)
    return {metric: np.array(values) for metric, values in scores.items()}


def _run(
    folder: Path, token_ids_BT: torch.Tensor, skipped: int | None, parts: Seconds
) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    with timed(parts, "loading"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))  # as in the scores that it is compared with
        if skipped is not None:
            model.model.layers[skipped] = _PassBy(model.model.layers[skipped].block_type)
    states, logits = [], []
    head_inputs: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _module, args: head_inputs.append(args[0]))
    with timed(parts, "layers and head"):
        for tokens_BT in token_ids_BT.split(8):
            logits.append(model(tokens_BT, use_cache=False).logits)
            states.append(head_inputs.pop())
        return torch.cat(states), torch.cat(logits)


class _PassBy(nn.Module):
    def __init__(self, block_type: str) -> None:
        super().__init__()
        self.block_type = block_type  # by which transformers chooses the mask

    def forward(self, hidden_states: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        return hidden_states


def _plain_metrics(
    full_BTH: torch.Tensor,
    full_log_probabilities_BTV: torch.Tensor,
    altered_BTH: torch.Tensor,
    logits_BTV: torch.Tensor,
    token_ids_BT: torch.Tensor,
) -> dict[str, float]:
    log_q_BTV = logits_BTV.log_softmax(-1)

    def loss(log_probabilities_BTV: torch.Tensor) -> torch.Tensor:
        return F.nll_loss(log_probabilities_BTV[:, :-1].flatten(0, 1), token_ids_BT[:, 1:].flatten())

    kl_BTV = F.kl_div(log_q_BTV, full_log_probabilities_BTV, log_target=True, reduction="none")
    return {
        "mse": F.mse_loss(altered_BTH, full_BTH).item(),
        "nmse": ((altered_BTH - full_BTH).square().sum() / full_BTH.square().sum()).item(),
        "cosine": (1 - F.cosine_similarity(altered_BTH, full_BTH, dim=-1)).mean().item(),
        "kl": kl_BTV.sum(-1).mean().item(),
        "delta_loss": (loss(log_q_BTV) - loss(full_log_probabilities_BTV)).item(),
    }


def shared_prefixes(
    checkpoint: Checkpoint, token_ids_BT: torch.Tensor, parts: Seconds
) -> tuple[LayerStack, dict[str, np.ndarray]]:
    """Our way, with the seconds of its parts."""
    with timed(parts, "all"):
        stack = LayerStack(checkpoint)
        apply, add = stack.apply, HeadInputMetrics.add

        def timed_apply(layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
            with timed(parts, f"layers: {stack.architecture.layers[layer_idx].kind}"):
                return apply(layer_idx, *args, **kwargs)

        def timed_add(*args: Any) -> torch.Tensor:
            with timed(parts, "head and metrics"):
                return add(*args)

        stack.apply = timed_apply  # type: ignore[method-assign]
        HeadInputMetrics.add = timed_add  # type: ignore[assignment,method-assign]
        try:
            scores = layers.score_plans(
                stack, layers.removal_plans(stack.architecture, range(stack.num_layers)), token_ids_BT
            )
        finally:
            HeadInputMetrics.add = add  # type: ignore[method-assign]
    return stack, scores


def run(*, num_samples: int = 8, sequence_length: int = 128, repeats: int = 1) -> ScoringResult:
    """Measure both ways on the embedded model."""
    torch.set_num_threads(1)
    folder = EXAMPLE / "model"
    checkpoint = Checkpoint.open(folder)
    token_ids_BT = sample_windows(
        load_tokenizer(folder),
        read_documents([EXAMPLE / "text" / "calibration.jsonl"]),
        num_samples=num_samples,
        sequence_length=sequence_length,
    )
    num_layers = len(checkpoint.architecture.layers)
    # What is done once, such as imports.
    layers.score_plans(
        LayerStack(checkpoint), layers.removal_plans(checkpoint.architecture, [0]), token_ids_BT[:1, :16]
    )
    ours, theirs = [], []
    for _ in range(repeats):
        our_parts, their_parts = Seconds(), Seconds()
        stack, shared = shared_prefixes(checkpoint, token_ids_BT, our_parts)
        naive = replace_one_block(folder, token_ids_BT, their_parts)
        ours.append((our_parts.pop("all"), our_parts))
        theirs.append((sum(their_parts.values()), their_parts))
    best_of_ours, best_of_theirs = min(ours, key=lambda t: t[0]), min(theirs, key=lambda t: t[0])
    return ScoringResult(
        num_layers=num_layers,
        num_tokens=token_ids_BT.numel(),
        shared_seconds=best_of_ours[0],
        replace_one_block_seconds=best_of_theirs[0],
        shared_parts=best_of_ours[1],
        replace_one_block_parts=best_of_theirs[1],
        shared_applications=stack.counters.layer_applications,
        shared_bytes_read=stack.counters.weight_bytes_read,
        replace_one_block_applications=num_layers * num_layers,
        replace_one_block_bytes_read=(num_layers + 1) * checkpoint.weight_bytes,
        largest_relative_difference=max(
            float(np.max(np.abs(shared[m] - naive[m])) / np.abs(naive[m]).max()) for m in naive
        ),
    )


def render(results: list[ScoringResult]) -> str:
    """The result page."""
    rows = "\n".join(
        f"| {r.num_tokens:,} | {r.shared_seconds:.2f} | {r.replace_one_block_seconds:.2f} | **{r.ratio:.2f}** | "
        f"{r.largest_relative_difference:.0e} |"
        for r in results
    )
    parts = "\n".join(
        f"- {r.num_tokens:,} tokens. Shared prefixes: {_in_words(r.shared_parts)}. "
        f"Replace-one-block: {_in_words(r.replace_one_block_parts)}."
        for r in results
    )
    first = results[0]
    reached = [f"{r.num_tokens:,}" for r in results if r.ratio >= 5]
    verdict = f"at {' and '.join(reached)} tokens" if reached else "at none of these settings"
    return f"""# Layer scores: shared prefixes against replace-one-block

The embedded hybrid, {first.num_layers} layers, all five metrics; CPU seconds of one thread, best of several alternating
runs; torch {torch.__version__}.

| tokens | shared prefixes | replace-one-block | ratio | largest relative difference |
|---:|---:|---:|---:|---:|
{rows}

Five times as fast is reached {verdict}. The work that is saved exactly: {first.shared_applications:,} layer
applications against {first.replace_one_block_applications:,}, and {first.shared_bytes_read:,} bytes of weights read
against {first.replace_one_block_bytes_read:,}. The more tokens, the less loading counts and the nearer the ratio comes
to that of arithmetic: half the applications, each in fewer passes over memory. What remains on both sides is mostly
matrix products in float32. Where arithmetic is fast beside reading, as on a GPU, loading weighs more.

Where the time goes:

{parts}
"""


def _in_words(parts: Seconds) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in sorted(parts.items(), key=lambda p: -p[1]))


if __name__ == "__main__":
    chosen = SETTINGS[: int(sys.argv[1])] if len(sys.argv) > 1 else SETTINGS
    page = render([run(num_samples=n, sequence_length=length, repeats=repeats) for n, length, repeats in chosen])
    (Path(__file__).parent / "layer_scores.md").write_text(page, encoding="utf-8")
    print(page)
