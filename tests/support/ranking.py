"""Candidates for comparing, and the windows they are compared on."""

from __future__ import annotations

from dataclasses import replace

import torch

from minipuzzle.architecture.memory import Deployment
from minipuzzle.cut.figures import Figures
from minipuzzle.cut.plan import Plan, keep_everything
from minipuzzle.data.windows import IGNORE, EvaluationWindows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.record import ERRORS, Quality
from tests.support.cuts import plan_with
from tests.support.tiny_models import VOCABULARY

TOKENS = 19


def padded_windows() -> EvaluationWindows:
    """Windows of random tokens, one of them with padding."""
    ids = torch.randint(VOCABULARY, (5, TOKENS + 1), generator=torch.Generator().manual_seed(3))
    labels = ids[:, 1:].clone()
    labels[2, 7:] = IGNORE
    return EvaluationWindows(token_ids=ids[:, :-1], labels=labels, num_bytes=1)


def candidates(checkpoint: Checkpoint) -> list[Plan]:
    """Plans that share prefixes, whole and narrowed layers, the hidden axis cut in two ways, and one that is twice."""
    whole = keep_everything(checkpoint.architecture)
    narrow = plan_with(checkpoint, ffn=20)
    hidden, other_hidden = plan_with(checkpoint, hidden=24), plan_with(checkpoint, hidden=24, ffn=30, kv_group=1)
    return [
        replace(whole, kept_layers=(0, 1, 2, 3, 5, 6)),
        replace(whole, kept_layers=(0, 1, 2, 4, 5, 6)),
        replace(whole, kept_layers=(0, 2, 3, 5, 6)),
        narrow,
        replace(narrow, kept_layers=(0, 1, 2, 3, 6)),
        replace(plan_with(checkpoint, ffn=30, kv_group=1), kept_layers=(0, 1, 2, 3, 6)),
        plan_with(checkpoint, ssm_head=2, ssm_head_channel=5),
        hidden,
        replace(hidden, kept_layers=(0, 1, 2, 3)),
        other_hidden,
        replace(whole, kept_layers=(0, 1, 2, 3, 5, 6)),
    ]


def quality_of(kl: float, loss: float, accuracy: float, agreement: float) -> Quality:
    return Quality(kl=kl, loss=loss, accuracy=accuracy, agreement=agreement, num_tokens=1)


def figures_with(pattern: str, predicted_loss: float) -> Figures:
    """Figures of a plan of which only its name and its prediction matter."""
    return Figures(
        pattern=pattern,
        num_parameters=1,
        num_active_parameters=1,
        memory_bytes=1,
        memory_terms=(),
        deployment=Deployment(),
        layout="uniform",
        limits={},
        predicted_loss=predicted_loss,
        metric="mse",
    )


def measured_figures(quality: Quality) -> dict[str, float | int]:
    """What was measured, by name, of what rankings measure too: no differences of losses and no intervals."""
    found = {name: value for name, value in quality.to_json().items() if value is not None}
    return {name: value for name, value in found.items() if name not in ("loss_rise", *ERRORS.values())}
