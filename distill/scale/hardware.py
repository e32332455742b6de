"""What the device at hand can do, and what a run really took of it."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from distill.scale.gpus import GPUS, Hardware

_PROBE_SIZE = 1024
_PROBE_SECONDS = 0.1
# What a small hybrid reached of the measured matrix rate in transformers' plain torch path on two cores.
_CPU_FRACTION = 0.35
_OWN_STATUS, _OWN_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def hardware_of(device: torch.device, dtype: torch.dtype) -> Hardware:
    """The device at hand: a GPU from the table of data sheets, anything else by a short measurement."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name.lower()
        for known in GPUS.values():
            if known.name in name:
                return known
        rate = matmul_flops_per_second(device, dtype)
        return Hardware(name=properties.name, bf16_flops=rate, memory_bytes=properties.total_memory)
    rate = matmul_flops_per_second(device, dtype)
    return Hardware(name=device.type, bf16_flops=rate, expected_fraction=_CPU_FRACTION)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, size: int = _PROBE_SIZE) -> float:
    """The rate of square matrix products that a device reaches, FLOP/s."""
    operand = torch.ones(size, size, device=device, dtype=dtype)
    result = operand @ operand
    num_products = 0
    _synchronize(device)
    start = time.perf_counter()
    while time.perf_counter() - start < _PROBE_SECONDS:
        torch.mm(operand, operand, out=result)
        num_products += 1
        _synchronize(device)
    return 2.0 * size**3 * num_products / (time.perf_counter() - start)


class PeakMemory:
    """The most memory held since this was made, beyond what was held then.

    On a GPU what torch allocated there; on a CPU resident memory, 0 where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif _OWN_RESET.exists():
            _OWN_RESET.write_text("5", encoding="ascii")  # Linux: the peak starts anew at what is resident now
        self._bytes_before = self._peak_bytes()

    def extra_bytes(self) -> int:
        """The peak until now."""
        return self._peak_bytes() - self._bytes_before

    def _peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not _OWN_STATUS.exists():
            return 0
        lines = _OWN_STATUS.read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
