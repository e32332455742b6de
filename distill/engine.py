"""How a run is executed, apart from what it learns; free of torch, so that commands can show defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from minipuzzle.errors import MinipuzzleError

OFFLOADS = ("none", "cpu")
QUANTIZATIONS = ("none", "fp8")
SPIKE_WINDOW = 32  # losses that a spike is measured against


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Memory and safety of a run.

    ``teacher_offload``: "cpu" keeps the teacher's weights in host memory and copies a layer at a time to the device.
    ``activation_checkpointing``: layers keep their inputs only and are computed again in the backward pass.
    ``compile_layers``: each layer of the student runs as code that torch.compile makes of it.
    ``fp8``: linear layers of the student multiply in FP8 on GPUs that do. ``qat``: "fp8" trains through the rounding of
    an FP8 export. ``keep_last``: how many saved states are kept.
    ``spike_factor``: a step whose loss exceeds so many times the median of recent ones is skipped, and a run that
    skips more than ``max_skipped_steps`` stops; steps whose loss or gradient is not finite are always skipped.

    Raises: MinipuzzleError for a value out of range.
    """

    teacher_offload: str = "none"
    activation_checkpointing: bool = False
    compile_layers: bool = False
    fp8: bool = False
    qat: str = "none"
    keep_last: int = 1
    spike_factor: float = 5.0
    max_skipped_steps: int = 20

    def __post_init__(self) -> None:
        if self.teacher_offload not in OFFLOADS:
            raise MinipuzzleError(f"teacher offload is {self.teacher_offload!r}", f"give {' or '.join(OFFLOADS)}")
        if self.qat not in QUANTIZATIONS:
            raise MinipuzzleError(f"qat is {self.qat!r}", f"give {' or '.join(QUANTIZATIONS)}")
        if self.fp8 and self.qat != "none":
            raise MinipuzzleError(
                "FP8 compute and training through an export's rounding are both asked for",
                "leave out --fp8: under --qat what is computed is already rounded to FP8",
            )
        for name, least in (("keep_last", 1), ("max_skipped_steps", 0)):
            if getattr(self, name) < least:
                found = getattr(self, name)
                raise MinipuzzleError(f"{name.replace('_', ' ')} is {found!r}", f"give {least} or more")
        if self.spike_factor <= 1:
            raise MinipuzzleError(f"spike factor is {self.spike_factor!r}", "give a number above 1")

    def is_spike(self, loss: float, recent_losses: Sequence[float]) -> bool:
        """Whether a loss is far above those of recent steps; never before there are SPIKE_WINDOW of them."""
        return len(recent_losses) >= SPIKE_WINDOW and loss > self.spike_factor * median(recent_losses)

    def shaping(self) -> dict[str, Any]:
        """What an interrupted run must share with its continuation, because it shapes the result."""
        return {"fp8_compute": self.fp8, "qat": self.qat}
