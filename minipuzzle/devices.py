"""What each kind of device offers: memory figures, generators, products. No other module asks which kind one is.

CUDA (and ROCm under its name), XPU, MPS and any other backend that torch knows are reached through torch's own module
for the kind, as far as it has what is asked for; the CPU is the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipuzzle.errors import MinipuzzleError

if TYPE_CHECKING:
    import torch

FALLBACK_MEMORY_BYTES = 4 * 2**30  # where the system does not say what is free
_OWN_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Device:
    """A device by the name that torch has for it."""

    name: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Device:
        """The one that a tensor lies on."""
        return cls(str(tensor.device))

    @property
    def kind(self) -> str:
        """The name without a number."""
        return self.name.partition(":")[0]

    @property
    def is_cpu(self) -> bool:
        """Whether this is the CPU, whose caches are small and whose memory is the system's."""
        return self.kind == "cpu"

    @property
    def speaks_cuda(self) -> bool:
        """Whether kernels written for CUDA run here: Triton's, and FP8 products."""
        return self.kind == "cuda"

    @property
    def has_float64(self) -> bool:
        """Whether there is arithmetic in float64: sums are finished on the host where not."""
        return self.kind != "mps" and bool(getattr(self.properties, "has_fp64", True))

    @property
    def widens_products(self) -> bool:
        """Whether products of low-precision matrices can come out in float32 (``torch.mm`` with ``out_dtype``)."""
        return self.speaks_cuda

    @property
    def pins_memory(self) -> bool:
        """Whether host memory is pinned for copies to this device."""
        return self.kind not in ("cpu", "mps")  # which have no memory of their own

    @property
    def backend(self) -> str | None:
        """What torch.distributed sends tensors by, those of the CPU by gloo always; None where it sends none."""
        import torch.distributed as dist

        own = dist.Backend.default_device_backend_map.get(self.kind)
        if self.is_cpu:
            return "gloo"
        return None if own in (None, "gloo") else f"cpu:gloo,{self.kind}:{own}"

    @property
    def best_dtype(self) -> str:
        """What to train in where nothing was asked for."""
        return "float32" if self.is_cpu else "bfloat16"

    def of_process(self, local_rank: int, world_size: int) -> str:
        """The name for one of several processes that were given the same: each takes a device of its own."""
        is_alone = world_size == 1 or self.is_cpu or ":" in self.name
        return self.name if is_alone else f"{self.kind}:{local_rank}"

    def claim(self) -> None:
        """Make this the device that the process uses unless told otherwise."""
        if set_device := getattr(self._module, "set_device", None):
            set_device(self.name)

    def synchronise(self) -> None:
        """Wait until everything that was asked of the device is done."""
        if not self.is_cpu:
            self._module.synchronize(*self._numbered)

    @property
    def properties(self) -> Any:
        """What torch knows of the hardware, such as its ``name`` and ``total_memory``; None for kinds without such."""
        found = getattr(self._module, "get_device_properties", None)
        return None if found is None or self.is_cpu else found(*self._numbered)

    @property
    def free_bytes(self) -> int:
        """What is free: MemAvailable, within the control group, where memory is the system's."""
        if found := getattr(self._module, "mem_get_info", None):
            return int(found(*self._numbered)[0])
        if self.kind == "mps":
            return int(self._module.recommended_max_memory() - self._module.driver_allocated_memory())
        return int(min(_available_bytes(), _control_group_bytes()))

    @property
    def peak_bytes(self) -> int:
        """The most this process has held so far: what torch allocated there, else what was resident."""
        if found := getattr(self._module, "max_memory_allocated", None):
            return int(found(*self._numbered))
        status = Path("/proc/self/status")
        if status.exists():
            return int(status.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes

    def reset_peak(self) -> None:
        """Count the peak from what is held now, where that can be."""
        if found := getattr(self._module, "reset_peak_memory_stats", None):
            found(*self._numbered)
        elif _OWN_RESET.exists():
            _OWN_RESET.write_text("5", encoding="ascii")  # Linux: the peak starts anew at what is resident now

    def generator_states(self) -> dict[str, torch.Tensor]:
        """The state of each random generator that work here may draw from, by its kind."""
        import torch

        own = {} if self.is_cpu else {self.kind: self._module.get_rng_state(*self._numbered)}
        return {"cpu": torch.get_rng_state(), **own}

    def restore_generators(self, states: dict[str, torch.Tensor]) -> None:
        """Put the generators back in states as ``generator_states`` gives them; others are left alone."""
        import torch

        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if not self.is_cpu and self.kind in states:
            self._module.set_rng_state(states[self.kind], *self._numbered)

    @property
    def _module(self) -> Any:
        import torch

        return torch.get_device_module(self.kind)

    @property
    def _numbered(self) -> tuple[str, ...]:
        """What torch's functions of this kind take to mean this device: there is one MPS, and its take nothing."""
        return () if self.kind == "mps" else (self.name,)


def best_device() -> Device:
    """The accelerator that torch finds, if it has float64; else the CPU."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    device = Device("cpu" if found is None else found.type)
    return device if device.has_float64 else Device("cpu")


def checked_device(device: str | None) -> str:
    """The device asked for, or the best one there is.

    Raises: MinipuzzleError for a device that torch cannot use.
    """
    import torch

    if device is None:
        return best_device().name
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MinipuzzleError(f"device {device!r} cannot be used: {error}", "try ‹device› cpu") from None
    return device


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
