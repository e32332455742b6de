"""Progress of a distillation run on standard error: steps, loss, speed and time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distill.settings import OnStep, StepRecord
from minipuzzle.progress import progress_figures


@contextmanager
def distill_progress(total_steps: int, *, quiet: bool = False) -> Iterator[OnStep]:
    """Yield an OnStep that draws; nothing is drawn where ``quiet``. A continued run starts where it stopped."""
    with progress_figures("distilling", total_steps, quiet=quiet) as show:

        def on_step(record: StepRecord) -> None:
            show(record.step, f"KL {record.kl:.4f}  {record.tokens_per_second:,.0f} tok/s")

        yield on_step
