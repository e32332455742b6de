"""Where and how to compute: one value for device, precision, memory, processes and progress."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minipuzzle.architecture.quantities import GIB, format_gib
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import Progress, silent
from minipuzzle.runtime.processes import Processes
from minipuzzle.table import Table

if TYPE_CHECKING:
    import torch

DTYPES: Table[torch.dtype] = Table("dtype", "dtypes", lazy={"float32": "torch:float32", "bfloat16": "torch:bfloat16"})
_OTHER_DTYPES = ("float16", "float64")  # that no command offers: values overflow, or everything takes very long
MEMORY_SHARE = 0.8  # of the free memory, where no limit was given: working sets are estimates
FALLBACK_MEMORY_BYTES = 4 * GIB  # where the system does not say what is free


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
    def torch_device(self) -> torch.device:
        """The device of this process as torch has it."""
        import torch

        return torch.device(self.device_of_process)

    @property
    def device_of_process(self) -> str:
        """The device of this process where all were given the same name: each takes a GPU of its own."""
        return self.processes.device(self.device)

    @property
    def is_on_cpu(self) -> bool:
        """Whether the device is the CPU, whose caches are small and whose memory is the system's."""
        return self.torch_device.type == "cpu"

    def among(self, processes: Processes) -> Compute:
        """The same in one of several processes, of which the first alone shows progress."""
        return replace(self, processes=processes, progress=self.progress if processes.is_first else silent)

    def with_limit(self) -> Compute:
        """The same with a number of bytes: the limit given, or most of what is free now."""
        return self if self.memory_bytes else replace(self, memory_bytes=free_memory_bytes(self.device_of_process))

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
                f"raise --device-memory, or {hint}",
            )


def free_memory_bytes(device: str) -> int:
    """Most of the memory that is free on a device: MemAvailable, within the control group, for the CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(MEMORY_SHARE * min(_available_bytes(), _control_group_bytes()))


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: what torch allocated on a GPU, else what was resident."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return FALLBACK_MEMORY_BYTES


def _control_group_bytes() -> float:
    """What a container may still use; without a limit, infinity."""
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no version-2 control group, or the word "max"
        return float("inf")


def checked_device(device: str | None) -> str:
    """The device asked for, or the best one there is.

    Raises: MinipuzzleError for a device that torch cannot use.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MinipuzzleError(f"device {device!r} cannot be used: {error}", "try --device cpu") from None
    return device
