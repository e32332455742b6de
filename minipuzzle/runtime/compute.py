"""Where and how to compute: one value for device, precision, memory, processes and progress."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import Progress, silent
from minipuzzle.runtime.processes import Processes
from minipuzzle.table import Table

if TYPE_CHECKING:
    import torch

DTYPES: Table[torch.dtype] = Table("dtype", "dtypes", lazy={"float32": "torch:float32", "bfloat16": "torch:bfloat16"})


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a measurement or a training run is carried out; nothing of it shapes a result beyond rounding.

    ``device``: as torch names it. ``dtype``: precision of the computation. ``memory_bytes``: for weights and working
    memory together; None: most of what is free. ``processes``: those of a torchrun job. ``progress``: opens a bar.

    Raises: MinipuzzleError for a precision that is not in DTYPES, or memory that is not positive.
    """

    device: str = "cpu"
    dtype: str = "float32"
    memory_bytes: int | None = None
    processes: Processes = field(default_factory=Processes)
    progress: Progress = field(default=silent, repr=False, compare=False)

    def __post_init__(self) -> None:
        DTYPES.check(self.dtype)
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise MinipuzzleError(f"device memory is {self.memory_bytes} bytes", "give a positive amount")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision as torch has it."""
        return DTYPES[self.dtype]

    @property
    def device_of_process(self) -> str:
        """The device of this process where all were given the same name: each takes a GPU of its own."""
        return self.processes.device(self.device)

    def on_cpu(self) -> Compute:
        """The same on the CPU."""
        return replace(self, device="cpu")


def best_device() -> str:
    """The device to use where none was asked for."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def checked_device(device: str | None) -> str:
    """The device asked for, or the best one there is.

    Raises: MinipuzzleError for a device that torch cannot use.
    """
    import torch

    if device is None:
        return best_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MinipuzzleError(f"device {device!r} cannot be used: {error}", "try --device cpu") from None
    return device
