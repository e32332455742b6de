"""Verifying a folder as a whole: its layout, its scales, and what it computes beside the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minipuzzle.export.reader import QuantizedCheckpoint
from minipuzzle.export.verify import Verification, compare_folders, open_any, scale_figures
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.vocabulary import check_same_vocabulary
from minipuzzle.workflows.settings import VerifySettings, paths_of
from minipuzzle.workflows.verbs import Model, open_model, sample_text, verb

_RANDOM_WINDOWS, _RANDOM_TOKENS = 4, 256  # where there is no text


@dataclass(frozen=True, kw_only=True)
class VerifiedFolder:
    """What a folder for deployment holds, and what it computes (None where only headers were read)."""

    checkpoint: Checkpoint
    has_text: bool = False
    computed: Verification | None = None

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        facts: dict[str, Any] = {"folder": str(self.checkpoint.folder), "flavour": "plain", "format": "bf16"}
        if isinstance(self.checkpoint, QuantizedCheckpoint):
            layout = self.checkpoint.layout
            assert layout.flavour is not None and layout.scheme is not None
            facts |= {
                "flavour": layout.flavour.name,
                "format": layout.scheme.name,
                "fp8_kv_cache": layout.fp8_kv_cache,
                "quantized_modules": list(layout.quantized),
                "ignored_modules": list(layout.ignored),
                **scale_figures(self.checkpoint),
            }
        if self.computed is not None:
            after, before = self.computed.after, self.computed.before
            facts |= {"text": "text" if self.has_text else "random tokens"}
            facts |= {"loss": after.loss, "num_tokens": after.num_tokens}
            if before is not None:
                facts |= {"kl": after.kl, "agreement": after.agreement, "against_loss": before.loss}
        return facts


def run_verify(model: Model, settings: VerifySettings) -> VerifiedFolder:
    """Read a folder with our own reader: its layout, its scales, every weight, and what it computes.

    Raises: MinipuzzleError naming the tensor that is missing, unknown, misshapen or senseless.
    """
    checkpoint, other = _opened(model, settings)
    data = paths_of(settings.data)
    computed = compare_folders(
        checkpoint,
        other,
        sample_text(checkpoint, data, samples=settings.samples, sequence_length=settings.sequence_length)
        if data
        else random_tokens(checkpoint),
        settings.compute,
    )
    return VerifiedFolder(checkpoint=checkpoint, has_text=bool(data), computed=computed)


verify = verb(VerifySettings, run_verify)


def plan_verify(model: Model, settings: VerifySettings) -> VerifiedFolder:
    """The checks of names, shapes and configuration; no weights are read.

    Raises: as ``run_verify``.
    """
    return VerifiedFolder(checkpoint=_opened(model, settings)[0])


def _opened(model: Model, settings: VerifySettings) -> tuple[Checkpoint, Checkpoint | None]:
    checkpoint = open_any(open_model(model))
    other = None if settings.against is None else open_any(open_model(settings.against))
    if other is not None:
        check_same_vocabulary(checkpoint, other)
    return checkpoint, other


def random_tokens(checkpoint: Checkpoint) -> torch.Tensor:
    """Seeded random token ids, ``[windows, tokens]``, for a check without text."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(checkpoint.architecture.vocabulary, (_RANDOM_WINDOWS, _RANDOM_TOKENS), generator=generator)
