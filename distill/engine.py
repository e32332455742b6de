"""How a run is executed, apart from what it learns; free of torch, so that commands can show defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from minipuzzle.errors import MinipuzzleError
from minipuzzle.option import option

OFFLOADS = ("none", "cpu")
QUANTIZATIONS = ("none", "fp8")
_ENGINE = "Memory, speed and safety"
SPIKE_WINDOW = 32  # losses that a spike is measured against


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Memory and safety of a run.

    Steps whose loss or gradient is not finite are skipped whatever the spike factor.

    Raises: MinipuzzleError for a value out of range.
    """

    fp8: bool = option(
        False,
        "Multiply in FP8 on GPUs that can (with torchao); elsewhere this says why not and changes nothing.",
        section=_ENGINE,
    )
    qat: str = option(
        "none",
        "Train through the rounding of an FP8 export; best for a short run at a low rate after a plain one.",
        choices=QUANTIZATIONS,
        section=_ENGINE,
    )
    compile_layers: bool = option(
        False, "Run the student's layers as torch.compile makes them.", name="compile", section=_ENGINE
    )
    activation_checkpointing: bool = option(
        False,
        "Keep only the inputs of layers and compute the rest twice: less memory, a third more work.",
        section=_ENGINE,
    )
    teacher_offload: str = option(
        "none",
        "Keep the teacher in host memory and copy it to the device layer by layer.",
        choices=OFFLOADS,
        section=_ENGINE,
    )
    keep_last: int = option(1, "Saved states to keep while the run lasts.", section="Saving and evaluating")
    spike_factor: float = option(
        5.0, "Skip a step whose loss is so many times the median of recent ones.", section=_ENGINE
    )
    max_skipped_steps: int = option(
        20, "Stop a run that has skipped more steps than this.", at_least=0, section=_ENGINE
    )

    def __post_init__(self) -> None:
        if self.teacher_offload not in OFFLOADS:
            raise MinipuzzleError(f"teacher offload is {self.teacher_offload!r}", f"give {' or '.join(OFFLOADS)}")
        if self.qat not in QUANTIZATIONS:
            raise MinipuzzleError(f"qat is {self.qat!r}", f"give {' or '.join(QUANTIZATIONS)}")
        if self.fp8 and self.qat != "none":
            raise MinipuzzleError(
                "FP8 compute and training through an export's rounding are both asked for",
                "leave out ‹fp8›: under ‹qat› what is computed is already rounded to FP8",
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
