"""The training loop: a student learns the next-token distribution of a frozen teacher.

One process on one device. Nothing here is global, the loss takes its denominator from outside, and a batch is a pure
function of the step, so that several processes can share a step later.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from distill.checkpointing import Progress, TrainingState, load_training_state, save_training_state
from distill.data import PackedWindows
from distill.interrupts import deferred_interrupts
from distill.optimizers import make_optimizer
from distill.pair import DistillPair
from distill.settings import DistillSettings, OnStep, StepRecord, ignore_step
from minipuzzle.corpus import EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.families import Family
from minipuzzle.models import parts_of

MAX_SKIPPED_STEPS = 20
SAVE_SECONDS = 300.0
EVALUATED_MICRO_BATCHES = 8  # at once, because an evaluation keeps no activations of earlier layers
METRICS_FILE = "metrics.jsonl"


def distill(
    *,
    teacher_model: nn.Module,
    student_model: nn.Module,
    family: Family,
    data: PackedWindows,
    settings: DistillSettings,
    folder: Path,
    validation: EvaluationWindows | None = None,
    device: str = "cpu",
    on_step: OnStep = ignore_step,
) -> Progress:
    """Train ``student_model`` in place, from the last state saved in ``folder`` if there is one, and report.

    The student's weights are float32, the teacher's any; both are on ``device``. State is kept in ``folder/state/``,
    and ``folder/metrics.jsonl`` gets a line a step.

    Raises: MinipuzzleError if losses or gradients are not finite in more than MAX_SKIPPED_STEPS steps.
    KeyboardInterrupt after Ctrl-C or a termination signal, with the state saved.
    """
    teacher_model.requires_grad_(False).eval()
    student_model.requires_grad_(True).train()
    compute_dtype = getattr(torch, settings.dtype)
    pair = DistillPair(
        teacher=parts_of(teacher_model, family),
        student=parts_of(student_model, family),
        device=torch.device(device),
        compute_dtype=compute_dtype,
    )
    optimizer = make_optimizer(student_model, settings)
    state = TrainingState(model=student_model, optimizer=optimizer, device=pair.device)
    run = _Run(
        pair=pair,
        state=state,
        data=data,
        settings=settings,
        folder=folder,
        validation=validation,
        on_step=on_step,
    )
    return run.finish()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What stays the same during a run; what changes is the state's tensors and the Progress handed along."""

    pair: DistillPair
    state: TrainingState
    data: PackedWindows
    settings: DistillSettings
    folder: Path
    validation: EvaluationWindows | None
    on_step: OnStep

    def finish(self) -> Progress:
        """Run all steps that are left."""
        progress = load_training_state(self.folder, self.state)
        if progress is None:
            torch.manual_seed(self.settings.seed)
            progress = Progress(validation_kl_before=self._validation_kl())
        _forget_metrics_after(self.folder / METRICS_FILE, progress.step)
        saved_at_seconds = time.monotonic()
        with deferred_interrupts() as is_interrupted:
            while progress.step < self.settings.total_steps:
                record = self._step_and_evaluate(progress.step)
                progress = self._advance(progress, record)
                must_stop = is_interrupted()
                if must_stop or self._is_time_to_save(progress.step, saved_at_seconds):
                    save_training_state(self.folder, self.state, progress)
                    saved_at_seconds = time.monotonic()
                self.on_step(record)
                if must_stop:
                    raise KeyboardInterrupt
        return progress

    def _advance(self, progress: Progress, record: StepRecord) -> Progress:
        next_window = self.data.position(record.step * self.settings.batch_sequences)
        skipped_steps = progress.skipped_steps + record.skipped
        if skipped_steps > MAX_SKIPPED_STEPS:
            raise MinipuzzleError(
                f"losses or gradients were not finite in {skipped_steps} of {record.step} steps",
                "lower --learning-rate, or use --dtype float32",
            )
        _append_metrics(self.folder / METRICS_FILE, record)
        return replace(
            progress,
            step=record.step,
            epoch=next_window.epoch,
            index=next_window.index,
            skipped_steps=skipped_steps,
            train_seconds=progress.train_seconds + self.settings.tokens_per_step / record.tokens_per_second,
            validation_kl_after=record.validation_kl,
        )

    def _is_time_to_save(self, step: int, saved_at_seconds: float) -> bool:
        if step == self.settings.total_steps:
            return True  # writing the result may fail, on a full disk for one
        if self.settings.save_every:
            return step % self.settings.save_every == 0
        return time.monotonic() - saved_at_seconds >= SAVE_SECONDS

    def _step_and_evaluate(self, step_idx: int) -> StepRecord:
        record = self._train_step(step_idx)
        is_last = record.step == self.settings.total_steps
        if is_last or (self.settings.eval_every and record.step % self.settings.eval_every == 0):
            return replace(record, validation_kl=self._validation_kl())
        return record

    def _train_step(self, step_idx: int) -> StepRecord:
        settings, started_seconds = self.settings, time.monotonic()
        learning_rate = settings.learning_rate_at(step_idx)
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate
        loss, kl = self._accumulate_gradients(step_idx)
        grad_norm = float(nn.utils.clip_grad_norm_(self.state.model.parameters(), settings.clip_norm))
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite:
            self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        return StepRecord(
            step=step_idx + 1,
            tokens=(step_idx + 1) * settings.tokens_per_step,
            loss=loss,
            kl=kl,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_second=settings.tokens_per_step / (time.monotonic() - started_seconds),
            skipped=not is_finite,
        )

    def _accumulate_gradients(self, step_idx: int) -> tuple[float, float]:
        """Loss and KL of a step's batch, whose gradients are added up micro-batch by micro-batch."""
        settings = self.settings
        token_ids_BT, labels_BT = self.data.batch(step_idx * settings.batch_sequences, settings.batch_sequences)
        loss = kl = torch.zeros((), device=self.pair.device)
        for start in range(0, settings.batch_sequences, settings.micro_batch_sequences):
            micro_batch = slice(start, start + settings.micro_batch_sequences)
            terms = self.pair.loss(
                token_ids_BT[micro_batch],
                labels_BT[micro_batch],
                denominator=settings.tokens_per_step,
                temperature=settings.temperature,
                ce_weight=settings.ce_weight,
            )
            terms.loss.backward()
            loss, kl = loss + terms.loss.detach(), kl + terms.kl
        return float(loss), float(kl)

    def _validation_kl(self) -> float | None:
        if self.validation is None:
            return None
        self.state.model.eval()
        batch_sequences = EVALUATED_MICRO_BATCHES * self.settings.micro_batch_sequences
        validation_kl = self.pair.mean_kl(self.validation, batch_sequences=batch_sequences)
        self.state.model.train()
        return validation_kl


def _append_metrics(path: Path, record: StepRecord) -> None:
    values = {name: value for name, value in asdict(record).items() if value is not None}
    # JSON has no NaN: the loss of a skipped step is null.
    finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite, allow_nan=False) + "\n")


def _forget_metrics_after(path: Path, step: int) -> None:
    """Remove the lines of steps that will be run again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A killed run may leave half a line at the end.
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")
