"""What a distillation run is asked to do, and what it reports; free of torch, so that commands can show defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.schedules import SCHEDULES
from minipuzzle.errors import MinipuzzleError
from minipuzzle.option import option
from minipuzzle.runtime.compute import DTYPES
from minipuzzle.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from distill.objective.divergences import Form

LARGEST_KL = 1e30  # above any, and a number for JSON

# How the distributions of teacher and student are compared.
FORMS: Table[Form] = Table(
    "loss form",
    "losses",
    lazy={
        "forward": "distill.objective.divergences:FORWARD",
        "reverse": "distill.objective.divergences:REVERSE",
        "jsd": "distill.objective.divergences:JSD",
        "skewed": "distill.objective.divergences:SKEWED",
        "reverse-skewed": "distill.objective.divergences:REVERSE_SKEWED",
    },
)


class DocumentLayout(NamedTuple):
    """From documents and the length of a window to inputs and labels; and what a user should know about it."""

    cut: Callable[[list[Tensor], int], tuple[Tensor, Tensor]]
    note: str


# How documents are laid out in windows.
DOCUMENTS: Table[DocumentLayout] = Table(
    "layout of documents",
    "document_layouts",
    lazy={
        "packed": "distill.training.data:PACKED",
        "separate": "distill.training.data:SEPARATE",
    },
)


_OPTIMISER, _LOSS, _TEXT, _SAVING = "Optimiser", "Loss", "Text", "Saving and evaluating"


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """Everything besides models and data that shapes the result, and how often to save and to evaluate.

    ``tokens`` is rounded up to whole steps of ``batch_sequences`` x ``sequence_length``. A step is computed
    ``micro_batch_sequences`` at a time, which bounds activation memory and does not change the mean that is minimised.
    ``dtype``: precision of the computation; weights, gradients and optimiser states are float32 always. ``save_every``
    and ``eval_every``: 0 saves every 5 minutes and evaluates before and after. ``top_k``: 0 takes all tokens.

    Raises: MinipuzzleError for a value out of range.
    Source of the defaults: NVIDIA's recipe for pruned Nemotron models (forward KL at temperature 1, rate 1e-4 falling
    to a tenth along a cosine, betas 0.9 and 0.95). Models of a few million parameters want about ten times that rate.
    """

    tokens: int = option(help="Tokens to train on, e.g. 2M; may exceed the data.", takes="count", is_needed=False)
    sequence_length: int = option(2048, "Tokens of a sequence.")
    batch_sequences: int = option(16, "Sequences of an optimiser step.", name="batch", section=_OPTIMISER)
    micro_batch_sequences: int = option(
        1,
        "Sequences computed at once; more is faster on a GPU and takes more memory.",
        name="micro-batch",
        section=_OPTIMISER,
    )
    learning_rate: float = option(
        1e-4, "Peak rate; a model of a few million parameters wants about 1e-3.", section=_OPTIMISER
    )
    min_learning_rate_fraction: float = 0.1
    warmup_fraction: float = option(0.03, "Part of the run.", section=_OPTIMISER)
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    temperature: float = option(1.0, "Softens both distributions.", section=_LOSS)
    ce_weight: float = option(
        0.0, "Share of the loss that comes from the text's own next tokens instead of the teacher.", section=_LOSS
    )
    form: str = option(
        "forward",
        "How the distributions are compared: KL from teacher to student, the reverse, or with a mixture of both.",
        choices=FORMS,
        section=_LOSS,
    )
    mixture_share: float | None = option(
        None,
        "Share of the first distribution in that mixture; default: 0.5 for jsd, 0.1 for skewed forms.",
        takes="number",
        section=_LOSS,
    )
    top_k: int = option(
        0,
        "Of the teacher, this many likeliest tokens and one outcome for all others; default: all, 64 with a cache.",
        section=_LOSS,
    )
    hidden_weight: float = option(
        0.0, "Weight of the cosine distance between what the two LM heads see.", section=_LOSS
    )
    schedule: str = option(
        "cosine",
        "How the learning rate falls after the warm-up; wsd stays high and falls at the end.",
        choices=SCHEDULES,
        section=_OPTIMISER,
    )
    decay_fraction: float = option(0.2, "Part of the run in which wsd lets the rate fall.", section=_OPTIMISER)
    documents: str = option(
        "packed",
        "packed: without gaps or resets, as in pre-training; separate: a sequence holds one document, padded.",
        choices=DOCUMENTS,
        section=_TEXT,
    )
    held_out: float = option(
        0.0,
        "Share of the documents in --data to keep for validation; a blend file says so itself.",
        section=_TEXT,
    )
    seed: int = option(0, "Order of the text.", takes="integer", section=_TEXT)
    dtype: str = "float32"
    eval_every: int = option(
        0, "Evaluate every N steps and write the best; default: before and after.", section=_SAVING
    )
    save_every: int = option(0, "Save the state every N steps; default: every 5 minutes.", section=_SAVING)

    def __post_init__(self) -> None:
        positive = ("tokens", "sequence_length", "batch_sequences", "micro_batch_sequences", "learning_rate")
        for name in (*positive, "clip_norm", "temperature"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a positive number")
        for name in ("ce_weight", "warmup_fraction", "min_learning_rate_fraction", "decay_fraction", "held_out"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number from 0 to 1")
        for name in ("weight_decay", "eval_every", "save_every", "top_k", "hidden_weight"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        share = self.mixture_share
        _require(share is None or 0 < share < 1, "mixture_share", share, "a number between 0 and 1")
        DTYPES.check(self.dtype)
        FORMS.check(self.form)
        SCHEDULES.check(self.schedule)
        DOCUMENTS.check(self.documents)

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in one optimiser step."""
        return self.batch_sequences * self.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return math.ceil(self.tokens / self.tokens_per_step)

    def learning_rate_at(self, step_idx: int) -> float:
        """Learning rate of a step from 0: linear warm-up, then down to the minimum in the last step by the schedule.

        A pure function of the step, so that a resumed run needs no scheduler state.
        """
        warmup_steps = math.ceil(self.warmup_fraction * self.total_steps)
        if step_idx < warmup_steps:
            return self.learning_rate * (step_idx + 1) / (warmup_steps + 1)
        last_step_idx, decay_steps = self.total_steps - 1, math.ceil(self.decay_fraction * self.total_steps)
        left = SCHEDULES[self.schedule](step_idx - warmup_steps, last_step_idx - warmup_steps, decay_steps)
        floor = self.min_learning_rate_fraction
        return self.learning_rate * (floor + (1 - floor) * left)

    def shaping(self) -> dict[str, Any]:
        """The settings that an interrupted run must share with its continuation."""
        return {name: value for name, value in asdict(self).items() if name not in ("save_every", "eval_every")}


def _require(is_valid: bool, name: str, value: object, wanted: str) -> None:
    if not is_valid:
        raise MinipuzzleError(f"{name.replace('_', ' ')} is {value!r}", f"give {wanted}")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of metrics.jsonl.

    Units: ``kl`` (the divergence of the run's form) nats per token at the training temperature, ``validation_kl``
    (forward) nats per token at temperature 1 and ``validation_loss`` nats per token of the text itself (both there
    only after a step that was followed by an evaluation); ``tokens`` counts from the start of the run.
    """

    step: int
    tokens: int
    loss: float
    kl: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    skipped: bool = False
    validation_kl: float | None = None
    validation_loss: float | None = None


OnStep = Callable[[StepRecord], None]
OnNote = Callable[[str], None]  # what a user should know of a run at once, in a sentence


def ignore_step(_record: StepRecord) -> None:
    """The OnStep of callers that show nothing."""


def ignore_note(_note: str) -> None:
    """The OnNote of callers that show nothing."""
