"""What the device at hand can do, and what a run really took of it."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from distill.scale.gpus import GPUS, Hardware
from minipuzzle.runtime.compute import Compute, peak_memory_bytes

_PROBE_SIZE = 1024
_PROBE_SECONDS = 0.1
# What a small hybrid reached of the measured matrix rate in transformers' plain torch path on two cores.
_CPU_FRACTION = 0.35
_OWN_RESET = Path("/proc/self/clear_refs")


def hardware_of(compute: Compute) -> Hardware:
    """The device at hand: a GPU from the table of data sheets, anything else by a short measurement."""
    device = compute.torch_device
    if device.type != "cuda":
        rate = matmul_flops_per_second(compute)
        return Hardware(name=device.type, bf16_flops=rate, expected_fraction=_CPU_FRACTION)
    properties = torch.cuda.get_device_properties(device)
    for known in GPUS.values():
        if known.name in properties.name.lower():
            return known
    rate = matmul_flops_per_second(compute)
    return Hardware(name=properties.name, bf16_flops=rate, memory_bytes=properties.total_memory)


def matmul_flops_per_second(compute: Compute, size: int = _PROBE_SIZE) -> float:
    """The rate of square matrix products that a device reaches, FLOP/s."""
    device = compute.torch_device
    operand = torch.ones(size, size, device=device, dtype=compute.torch_dtype)
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

    On a GPU what torch allocated there; on a CPU resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif _OWN_RESET.exists():
            _OWN_RESET.write_text("5", encoding="ascii")  # Linux: the peak starts anew at what is resident now
        self._bytes_before = peak_memory_bytes(device)

    def extra_bytes(self) -> int:
        """The peak until now."""
        return peak_memory_bytes(self._device) - self._bytes_before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
