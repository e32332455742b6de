"""What the device at hand can do, and what a run really took of it."""

from __future__ import annotations

import time

import torch

from distill.scale.gpus import GPUS, Hardware
from minipuzzle.devices import Device
from minipuzzle.runtime.compute import Compute

_PROBE_SIZE = 1024
_PROBE_SECONDS = 0.1
# What a small hybrid reached of the measured matrix rate in transformers' plain torch path on two cores.
_CPU_FRACTION = 0.35


def hardware_of(compute: Compute) -> Hardware:
    """The device at hand: a GPU from the table of data sheets, anything else by a short measurement."""
    device = compute.own_device
    properties = device.properties
    if properties is None:
        rate = matmul_flops_per_second(compute)
        return Hardware(name=device.kind, bf16_flops=rate, expected_fraction=_CPU_FRACTION)
    for known in GPUS.values():
        if known.name in properties.name.lower():
            return known
    rate = matmul_flops_per_second(compute)
    return Hardware(name=properties.name, bf16_flops=rate, memory_bytes=properties.total_memory)


def matmul_flops_per_second(compute: Compute, size: int = _PROBE_SIZE) -> float:
    """The rate of square matrix products that a device reaches, FLOP/s."""
    device = compute.own_device
    operand = torch.ones(size, size, device=device.name, dtype=compute.torch_dtype)
    result = operand @ operand
    num_products = 0
    device.synchronise()
    start = time.perf_counter()
    while time.perf_counter() - start < _PROBE_SECONDS:
        torch.mm(operand, operand, out=result)
        num_products += 1
        device.synchronise()
    return 2.0 * size**3 * num_products / (time.perf_counter() - start)


class PeakMemory:
    """The most memory held since this was made, beyond what was held then.

    On a GPU what torch allocated there; on a CPU resident memory.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        device.reset_peak()
        self._bytes_before = device.peak_bytes

    def extra_bytes(self) -> int:
        """The peak until now."""
        return self._device.peak_bytes - self._bytes_before
