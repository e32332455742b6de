"""The one record of what a model does on some text, and how its figures are called for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a model does on some text, and beside another model where there is one; None: not measured.

    Units: ``loss`` nats per predicted token; ``kl`` nats per token, forward: sum of other * (log other - log model);
    ``agreement`` (both find the same token most likely) and ``accuracy`` (of the next token) shares of 1; ``num_bytes``
    UTF-8 bytes of the predicted text; ``seconds`` of the model's own time. ``loss_rise``: the loss above the teacher's
    on the same tokens. ``..._error``: the standard error of that mean, by how windows of text differ.
    """

    loss: float
    kl: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    num_tokens: int | None = None
    num_bytes: int | None = None
    seconds: float | None = None
    loss_rise: float | None = None
    loss_error: float | None = None
    kl_error: float | None = None
    loss_rise_error: float | None = None

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits, by UTF-8 bytes of the predicted text."""
        assert self.num_tokens is not None and self.num_bytes is not None, "of text whose length is known"
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second of the model's own time, measured."""
        assert self.num_tokens is not None and self.seconds is not None, "of a measurement that was timed"
        return self.num_tokens / self.seconds

    def to_json(self) -> dict[str, float | int | None]:
        """All figures, under the names that ``evaluate --json`` prints."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": None if self.num_bytes is None else self.bits_per_byte,
            "next_token_accuracy": self.accuracy,
            "kl": self.kl,
            "top1_agreement": self.agreement,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "tokens_per_second": None if self.seconds is None else self.tokens_per_second,
            "loss_rise": self.loss_rise,
            "loss_error": self.loss_error,
            "kl_error": self.kl_error,
            "loss_rise_error": self.loss_rise_error,
        }


ERRORS: Mapping[str, str] = {"loss": "loss_error", "kl": "kl_error", "loss_rise": "loss_rise_error"}
INTERVAL = 1.96  # standard errors on each side hold 95 % where many windows were measured


def with_interval(record: Mapping[str, float | int | None], figure: str, form: str) -> str:
    """A figure of a record for people, with its 95 % interval where that is known; empty if it was not measured."""
    value, error = record.get(figure), record.get(ERRORS.get(figure, ""))
    return "" if value is None else form.format(value) + ("" if error is None else f" ± {INTERVAL * error:.2g}")


# By their names in JSON: how figures are called for people, and how they are written in full.
LABELS: Mapping[str, tuple[str, str]] = {
    "num_tokens": ("tokens", "{:,}"),
    "loss": ("loss (nats/token)", "{:.4f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "next_token_accuracy": ("next-token accuracy", "{:.2%}"),
    "loss_rise": ("loss above teacher's (nats/token)", "{:+.4f}"),
    "kl": ("KL from teacher (nats/token)", "{:.4g}"),
    "top1_agreement": ("agreement with teacher", "{:.2%}"),
    "tokens_per_second": ("tokens per second", "{:,.0f}"),
}
