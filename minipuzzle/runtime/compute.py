"""Where and how to compute: one value for device, precision, memory, processes and progress."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from minipuzzle.architecture.quantities import format_gib
from minipuzzle.devices import Device
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import Progress, silent
from minipuzzle.runtime.processes import Processes
from minipuzzle.table import Table

if TYPE_CHECKING:
    import torch

DTYPES: Table[torch.dtype] = Table("dtype", "dtypes", lazy={"float32": "torch:float32", "bfloat16": "torch:bfloat16"})
_OTHER_DTYPES = ("float16", "float64")  # that no command offers: values overflow, or everything takes very long
MEMORY_SHARE = 0.8  # of the free memory, where no limit was given: working sets are estimates


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a measurement or a training run is carried out; nothing of it shapes a result beyond rounding.

    ``device``: as torch names it. ``dtype``: precision of the computation. ``memory_bytes``: for weights and working
    memory together; None: most of what is free. ``processes``: those of a torchrun job. ``progress``: opens a bar.

    Raises: MinipuzzleError for a precision that is unknown, or memory that is not positive.
    """

    device: str = "cpu"
    dtype: str = "float32"
    memory_bytes: int | None = None
    processes: Processes = field(default_factory=Processes)
    progress: Progress = field(default=silent, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in _OTHER_DTYPES:
            DTYPES.check(self.dtype)
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise MinipuzzleError(f"device memory is {self.memory_bytes} bytes", "give a positive amount")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision as torch has it."""
        import torch

        return getattr(torch, self.dtype) if self.dtype in _OTHER_DTYPES else DTYPES[self.dtype]

    @property
    def own_device(self) -> Device:
        """The device of this process where all were given the same name, and what it offers."""
        return Device(Device(self.device).of_process(self.processes.local_rank, self.processes.world_size))

    @property
    def torch_device(self) -> torch.device:
        """The device of this process as torch has it."""
        import torch

        return torch.device(self.own_device.name)

    def among(self, processes: Processes) -> Compute:
        """The same in one of several processes, of which the first alone shows progress."""
        return replace(self, processes=processes, progress=self.progress if processes.is_first else silent)

    def with_limit(self) -> Compute:
        """The same with a number of bytes: the limit given, or most of what is free now."""
        return self if self.memory_bytes else replace(self, memory_bytes=int(MEMORY_SHARE * self.own_device.free_bytes))

    @property
    def limit_bytes(self) -> int:
        """The limit given, or most of what is free now."""
        limit_bytes = self.with_limit().memory_bytes
        assert limit_bytes is not None
        return limit_bytes

    def require_room(self, needed_bytes: int, terms: str, hint: str) -> None:
        """Refuse work that takes more than the memory; ``terms`` says what it is for.

        Raises: MinipuzzleError with both amounts.
        """
        if needed_bytes > (limit_bytes := self.limit_bytes):
            raise MinipuzzleError(
                f"the work needs {format_gib(needed_bytes)} ({terms}), but {format_gib(limit_bytes)} may be used",
                f"raise ‹device_memory›, or {hint}",
            )
