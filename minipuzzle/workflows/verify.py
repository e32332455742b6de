"""Verifying a folder as a whole: its layout, its scales, and what it computes beside the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minipuzzle.export.calibration import ActivationAmax
from minipuzzle.export.digests import changed_tensors, has_digests
from minipuzzle.export.reader import QuantizedCheckpoint, open_any
from minipuzzle.export.verify import Verification, compare_folders, scale_figures, unlike_source
from minipuzzle.export.write import ExportTensors
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json
from minipuzzle.files.outputs import PROVENANCE_FILE
from minipuzzle.formats.choices import CLOSEST
from minipuzzle.formats.layout import ExportLayout, with_closest_scales
from minipuzzle.quality.vocabulary import check_same_vocabulary
from minipuzzle.workflows.settings import VERIFY_SAMPLES, VerifySettings, paths_of
from minipuzzle.workflows.verbs import Model, open_model, sample_text, verb

_RANDOM_WINDOWS, _RANDOM_TOKENS = 4, 256  # where there is no text


@dataclass(frozen=True, kw_only=True)
class VerifiedFolder:
    """What a folder for deployment holds, and what it computes (None where only headers were read).

    ``differing``: tensors that are not what was written, or not the source's rounded alike; ``checked``: by what means.
    """

    checkpoint: Checkpoint
    checked: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    has_text: bool = False
    computed: Verification | None = None

    @property
    def is_ok(self) -> bool:
        """Whether every tensor is what it should be."""
        return not self.differing

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
                "scales_apart": list(self.checkpoint.apart),
            }
        if self.computed is not None:
            after, before = self.computed.after, self.computed.before
            facts |= {"text": "text" if self.has_text else "random tokens"}
            facts |= {"loss": after.loss, "num_tokens": after.num_tokens}
            if before is not None:
                facts |= {"kl": after.kl, "agreement": after.agreement, "against_loss": before.loss}
            facts |= {"checked": list(self.checked), "differing": list(self.differing)}
            facts |= {"verdict": "ok" if self.is_ok else "not ok"}
        return facts


def run_verify(model: Model, settings: VerifySettings) -> VerifiedFolder:
    """Read a folder with our own reader: its layout, its scales, every weight, and what it computes.

    Raises: MinipuzzleError naming the tensor that is missing, unknown, misshapen or senseless.
    """
    checkpoint, other = _opened(model, settings)
    if isinstance(checkpoint, QuantizedCheckpoint):
        checkpoint.say_what_is_apart()
    checked, differing = _compared(Checkpoint.open(checkpoint.folder), checkpoint, other, settings)
    data = paths_of(settings.data)
    computed = compare_folders(
        checkpoint,
        other,
        sample_text(
            checkpoint,
            data,
            samples=settings.samples,
            default_samples=VERIFY_SAMPLES,
            sequence_length=settings.sequence_length,
        )
        if data
        else random_tokens(checkpoint),
        settings.compute,
    )
    return VerifiedFolder(
        checkpoint=checkpoint, has_text=bool(data), computed=computed, checked=checked, differing=differing
    )


verify = verb(VerifySettings, run_verify)


def plan_verify(model: Model, settings: VerifySettings) -> VerifiedFolder:
    """The checks of names, shapes and configuration; no weights are read.

    Raises: as ``run_verify``.
    """
    return VerifiedFolder(checkpoint=_opened(model, settings)[0])


def _compared(
    stored: Checkpoint, readable: Checkpoint, other: Checkpoint | None, settings: VerifySettings
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How tensors were checked, and those that differ."""
    if (stored.folder / PROVENANCE_FILE).is_file():
        read_json(stored.folder / PROVENANCE_FILE)  # damage there says that the folder is not what was written
    is_ours = has_digests(stored)
    if is_ours:
        with settings.compute.progress("checking", len(stored.entries)) as advance:
            checked, differing = ["recorded digests"], changed_tensors(stored, advance)
    else:
        checked, differing = ["no digests recorded"], []
    if isinstance(other, QuantizedCheckpoint):
        checked.append(f"not with the tensors of {other.folder}, which is quantised")
    elif other is not None:
        layout = readable.layout if isinstance(readable, QuantizedCheckpoint) else ExportLayout()
        if is_ours and _says_closest(stored):
            layout = with_closest_scales(layout)
        tensors = ExportTensors(other, layout, ActivationAmax())
        checked.append("the source rounded alike" if is_ours else "the source, as near as our rounding")
        differing += [name for name in unlike_source(tensors, stored, is_ours=is_ours) if name not in differing]
    return tuple(checked), tuple(differing)


def _says_closest(stored: Checkpoint) -> bool:
    path = stored.folder / PROVENANCE_FILE
    return path.is_file() and read_json(path).get("block_scales") == CLOSEST


def _opened(model: Model, settings: VerifySettings) -> tuple[Checkpoint, Checkpoint | None]:
    checkpoint = open_any(open_model(model), is_export=True)
    other = None if settings.against is None else open_any(open_model(settings.against))
    if other is not None:
        check_same_vocabulary(checkpoint, other)
    return checkpoint, other


def random_tokens(checkpoint: Checkpoint) -> torch.Tensor:
    """Seeded random token ids, ``[windows, tokens]``, for a check without text."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(checkpoint.architecture.vocabulary, (_RANDOM_WINDOWS, _RANDOM_TOKENS), generator=generator)
