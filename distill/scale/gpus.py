"""What devices can do, and the table of GPUs that runs are estimated for."""

from __future__ import annotations

from dataclasses import dataclass

from minipuzzle.architecture.quantities import GIB
from minipuzzle.table import Table


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device: its dense matrix rate in FLOP/s, the share of it that runs reach, and its memory (None: unknown)."""

    name: str
    bf16_flops: float
    fp8_flops: float | None = None
    memory_bytes: int | None = None
    # Distillation with NVIDIA's own tools reached 15 to 25 % on H100, pre-training 33 to 39 %.
    expected_fraction: float = 0.3


# Dense rates from the makers' data sheets, without sparsity.
_GPUS = (
    Hardware(name="a100", bf16_flops=312e12, memory_bytes=79 * GIB),
    Hardware(name="h100", bf16_flops=989e12, fp8_flops=1979e12, memory_bytes=79 * GIB),
    Hardware(name="h200", bf16_flops=989e12, fp8_flops=1979e12, memory_bytes=139 * GIB),
    Hardware(name="b200", bf16_flops=2250e12, fp8_flops=4500e12, memory_bytes=178 * GIB),
)
GPUS = Table("GPU", "gpus", entries={gpu.name: gpu for gpu in _GPUS})
