"""Distillation loss: peak memory and time of the chunked loss against log_softmax and kl_div on whole logits.

Each measurement runs in a process of its own, because the peak of a process never falls. ``python distill_loss.py``
writes distill_loss.md beside this file; it takes some minutes and, with --whole, about 18 GiB.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.objective.losses import CPU_CHUNK_ROWS, LossSettings, chunked_kl
from distill.settings import FORMS

MIB = 2**20
TOKENS, VOCABULARY, HIDDEN = 2048, 32768, 256  # for the time, and for memory where whole logits are cheap
LARGE_TOKENS, LARGE_VOCABULARY, LARGE_HIDDEN = 4096, 131072, 512
FEW_TOKENS = 512  # for the other forms: tokens only add their hidden gradient, 2 KiB each
CHUNK_BYTES = CPU_CHUNK_ROWS * 4 * 4 * LARGE_VOCABULARY  # what the default is at the large size
TOP_K = 64
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """Extra peak memory beyond the inputs, in bytes, and the best CPU seconds of a forward and backward pass."""

    plain_bytes: int
    chunked_bytes: int
    plain_seconds: float
    chunked_seconds: float

    @property
    def memory_ratio(self) -> float:
        """How many times less memory the chunked loss takes."""
        return self.plain_bytes / self.chunked_bytes


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError("no memory figures here")


def head_is_large(head_VH: Tensor) -> bool:
    """Whether this is the large size, where chunks have fixed bytes."""
    return head_VH.shape[1] == LARGE_HIDDEN


def _backward(way: str, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> None:
    tokens = len(student[0])
    if way == "plain":
        logits, teacher_logits = F.linear(*student), F.linear(*teacher)
        log_p = teacher_logits.log_softmax(-1)
        loss = F.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="sum") / tokens
    else:
        form, top_k = ("forward", TOP_K) if way == "top-k" else (way, None)
        chunk_bytes = CHUNK_BYTES if head_is_large(student[1]) else None
        settings = LossSettings(form=form, top_k=top_k, chunk_bytes=chunk_bytes)
        loss = chunked_kl(*student, *teacher, denominator=tokens, settings=settings).loss
    torch.autograd.backward([loss])


def measure_in_this_process(way: str, tokens: int, vocabulary: int, hidden: int, repeats: int) -> None:
    """Print extra peak bytes and best CPU seconds of one way."""
    torch.manual_seed(0)
    hidden_NH = torch.randn(tokens, hidden, requires_grad=True)
    head_VH = torch.randn(vocabulary, hidden).div_(8).requires_grad_()
    teacher_NH, teacher_VH = hidden_NH.detach() + 0.1, head_VH.detach() * 1.01
    # Start the thread pool and load the kernels before counting.
    _backward(way, (hidden_NH[:64], head_VH[:64]), (teacher_NH[:64], teacher_VH[:64]))
    hidden_NH.grad = head_VH.grad = None
    before_bytes = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of making the inputs
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        _backward(way, (hidden_NH, head_VH), (teacher_NH, teacher_VH))
        hidden_NH.grad = head_VH.grad = None
        seconds.append(time.process_time() - start)
    print(_status_bytes("VmHWM") - before_bytes, min(seconds))


def measure(way: str, tokens: int, vocabulary: int, hidden: int, repeats: int = 1) -> tuple[int, float]:
    """Extra peak bytes and best CPU seconds of one way, in a process of its own."""
    sizes = (str(size) for size in (tokens, vocabulary, hidden, repeats))
    output = subprocess.run([sys.executable, __file__, way, *sizes], capture_output=True, text=True, check=True).stdout
    peak_bytes, seconds = output.split()
    return int(peak_bytes), float(seconds)


def run() -> LossResult:
    """Both ways at the small size."""
    sizes = TOKENS, VOCABULARY, HIDDEN, REPEATS
    (plain_bytes, plain_seconds), (chunked_bytes, chunked_seconds) = (
        measure("plain", *sizes),
        measure("forward", *sizes),
    )
    return LossResult(
        plain_bytes=plain_bytes,
        chunked_bytes=chunked_bytes,
        plain_seconds=plain_seconds,
        chunked_seconds=chunked_seconds,
    )


def large_plain_bytes(whole: bool) -> tuple[int, str]:
    """Peak of whole logits at the large size, measured or from the line through two smaller token counts."""
    if whole:
        return measure("plain", LARGE_TOKENS, LARGE_VOCABULARY, LARGE_HIDDEN)[0], "measured"
    counts = (512, 1024)
    low, high = (measure("plain", tokens, LARGE_VOCABULARY, LARGE_HIDDEN)[0] for tokens in counts)
    per_token = (high - low) / (counts[1] - counts[0])
    how = (
        f"from {low / MIB:,.0f} MiB at {counts[0]} and {high / MIB:,.0f} MiB at {counts[1]:,} tokens, linear in tokens"
    )
    return round(low + per_token * (LARGE_TOKENS - counts[0])), how


def render(small: LossResult, *, whole: bool) -> str:
    """The result page."""
    plain_bytes, how = large_plain_bytes(whole)
    rows = []
    for way in (*FORMS, "top-k"):
        by_vocabulary = []
        for vocabulary in (LARGE_VOCABULARY // 2, LARGE_VOCABULARY):
            is_whole = way == "forward" and vocabulary == LARGE_VOCABULARY
            tokens = LARGE_TOKENS if is_whole else FEW_TOKENS
            peak_bytes = measure(way, tokens, vocabulary, LARGE_HIDDEN)[0] + 4 * (LARGE_TOKENS - tokens) * LARGE_HIDDEN
            by_vocabulary.append((peak_bytes, peak_bytes - 4 * vocabulary * LARGE_HIDDEN))
        (_, half_rest_bytes), (peak_bytes, rest_bytes) = by_vocabulary
        rows.append(
            f"| {way} | {peak_bytes / MIB:.0f} | 1/{plain_bytes / peak_bytes:.0f} "
            f"| {half_rest_bytes / MIB:.0f} | {rest_bytes / MIB:.0f} |"
        )
    table = "\n".join(rows)
    return f"""# Distillation loss: chunked against whole logits

Written by `make bench-loss` on {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}. Peaks are
resident memory beyond the inputs over a forward and a backward pass, float32, each in a process of its own.

## {LARGE_TOKENS:,} tokens, vocabulary {LARGE_VOCABULARY:,}, hidden {LARGE_HIDDEN}

`log_softmax` and `kl_div` on whole logits take {plain_bytes / MIB:,.0f} MiB ({how}). The chunked loss, with chunks of
{CHUNK_BYTES / MIB:.0f} MiB; the gradient of the head is {4 * LARGE_VOCABULARY * LARGE_HIDDEN / MIB:.0f} MiB of it:

| form | extra peak, MiB | of whole logits | without head gradient, vocabulary {LARGE_VOCABULARY // 2:,} \
| without head gradient, vocabulary {LARGE_VOCABULARY:,} |
|---|---:|---:|---:|---:|
{table}

`top-k`: forward KL over the teacher's {TOP_K} likeliest tokens and one outcome for all others. `forward` at
the larger vocabulary ran on all tokens, the rest on {FEW_TOKENS}; the hidden gradients of the other tokens were added.

## {TOKENS:,} tokens, vocabulary {VOCABULARY:,}, hidden {HIDDEN}

| | chunked | whole logits | ratio |
|---|---:|---:|---:|
| extra peak memory, MiB | {small.chunked_bytes / MIB:.0f} | {small.plain_bytes / MIB:.0f} | {small.memory_ratio:.1f} |
| CPU seconds, best of {REPEATS} | {small.chunked_seconds:.2f} | {small.plain_seconds:.2f} \
| {small.plain_seconds / small.chunked_seconds:.2f} |
"""


def main(arguments: list[str]) -> None:
    """Write the page, or measure one way where called for that."""
    if arguments and arguments[0] != "--whole":
        way, *sizes = arguments
        measure_in_this_process(way, *(int(size) for size in sizes))
        return
    page = render(run(), whole=arguments == ["--whole"])
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
