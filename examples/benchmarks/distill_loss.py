"""Distillation loss: peak memory and time of the chunked KL against log_softmax and kl_div on whole logits.

Each way runs in a process of its own, because the peak of a process never falls.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from distill.losses import chunked_kl

TOKENS, VOCABULARY, HIDDEN = 2048, 32768, 256
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """Extra peak memory beyond the inputs, in bytes, and the best seconds of a forward and backward pass."""

    plain_bytes: int
    chunked_bytes: int
    plain_seconds: float
    chunked_seconds: float

    @property
    def memory_ratio(self) -> float:
        """How many times less memory the chunked loss takes."""
        return self.plain_bytes / self.chunked_bytes


def _peak_bytes(field: str = "VmHWM") -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError("no memory figures here")


def measure_in_this_process(way: str) -> None:
    """Print extra peak bytes and best seconds of one way."""
    torch.manual_seed(0)
    hidden_NH = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    head_VH = (torch.randn(VOCABULARY, HIDDEN) / 8).requires_grad_()
    teacher_NH, teacher_VH = hidden_NH.detach() + 0.1, head_VH.detach() * 1.01
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()  # start the thread pool before counting
    before_bytes = _peak_bytes("VmRSS")
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        if way == "plain":
            student, teacher = F.linear(hidden_NH, head_VH), F.linear(teacher_NH, teacher_VH)
            loss = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
            loss = loss / TOKENS
        else:
            loss = chunked_kl(hidden_NH, head_VH, teacher_NH, teacher_VH, denominator=TOKENS).loss
        torch.autograd.backward([loss])
        hidden_NH.grad = head_VH.grad = None
        seconds.append(time.perf_counter() - start)
    print(_peak_bytes() - before_bytes, min(seconds))


def run() -> LossResult:
    """Measure both ways, each in its own process."""
    found = {}
    for way in ("plain", "chunked"):
        command = [sys.executable, __file__, way]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found[way] = int(output[0]), float(output[1])
    return LossResult(
        plain_bytes=found["plain"][0],
        chunked_bytes=found["chunked"][0],
        plain_seconds=found["plain"][1],
        chunked_seconds=found["chunked"][1],
    )


if __name__ == "__main__":
    measure_in_this_process(sys.argv[1]) if len(sys.argv) > 1 else print(run())
