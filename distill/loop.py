"""The training loop: a student learns the next-token distribution of a frozen teacher.

The same loop runs in one process and in many. A batch is a pure function of the step, of which each process takes its
own sequences; the loss is divided by the number of valid tokens in the batches of all of them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from distill.checkpointing import Progress, StateStore, TrainingState
from distill.data import PackedWindows
from distill.engine import SPIKE_WINDOW, EngineSettings
from distill.interrupts import deferred_interrupts
from distill.optimizers import make_optimizer
from distill.pair import DistillPair
from distill.parallel import make_pair, rows_of_process, whole
from distill.settings import DistillSettings, OnStep, StepRecord, ignore_step
from minipuzzle.corpus import IGNORE, EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.families import Family
from minipuzzle.processes import Processes

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
    engine: EngineSettings | None = None,
    on_step: OnStep = ignore_step,
) -> Progress:
    """Train ``student_model`` in place in this process alone; otherwise as ``distill_pair``.

    The student's weights are float32, the teacher's any; both are whole on ``device``.
    """
    pair = make_pair(
        teacher_model,
        student_model,
        family,
        device=torch.device(device),
        compute_dtype=getattr(torch, settings.dtype),
    )
    return distill_pair(
        pair=pair,
        data=data,
        settings=settings,
        folder=folder,
        validation=validation,
        engine=engine,
        on_step=on_step,
    )


def distill_pair(
    *,
    pair: DistillPair,
    data: PackedWindows,
    settings: DistillSettings,
    folder: Path,
    validation: EvaluationWindows | None = None,
    engine: EngineSettings | None = None,
    processes: Processes | None = None,
    on_step: OnStep = ignore_step,
) -> Progress:
    """Train the student of a pair, from the last state saved in ``folder`` if there is one, and report.

    State is kept in ``folder/state/``, and ``folder/metrics.jsonl`` gets a line a step. All processes of a job call
    this together; ``on_step`` is called in the first alone.

    Raises: MinipuzzleError if too many steps had to be skipped, or a batch cannot be divided among the processes.
    KeyboardInterrupt in all processes after Ctrl-C or a termination signal in one, with the state saved.
    """
    engine, processes = engine or EngineSettings(), processes or Processes()
    optimizer = make_optimizer(pair.student.model, settings)
    state = TrainingState(model=pair.student.model, optimizer=optimizer, device=pair.device)
    run = _Run(
        pair=pair,
        state=state,
        store=StateStore(folder, state, processes=processes, keep_last=engine.keep_last),
        data=data,
        settings=settings,
        engine=engine,
        processes=processes,
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
    store: StateStore
    data: PackedWindows
    settings: DistillSettings
    engine: EngineSettings
    processes: Processes
    folder: Path
    validation: EvaluationWindows | None
    on_step: OnStep

    def finish(self) -> Progress:
        """Run all steps that are left."""
        progress = self.store.load_last()
        if progress is None:
            torch.manual_seed(self.settings.seed)
            progress = Progress(validation_kl_before=self._validation_kl())
        if self.processes.is_first:
            _forget_metrics_after(self.folder / METRICS_FILE, progress.step)
        with deferred_interrupts() as is_interrupted:
            try:
                while progress.step < self.settings.total_steps:
                    progress, must_stop = self._step_and_save(progress, is_interrupted)
                    if must_stop:
                        raise KeyboardInterrupt
            finally:
                self.store.finish()  # a step that fails takes no state with it
        return progress

    def _step_and_save(self, progress: Progress, is_interrupted: Callable[[], bool]) -> tuple[Progress, bool]:
        """One step and what follows it; also says whether to stop."""
        record = self._step_and_evaluate(progress)
        progress = self._advance(progress, record)
        must_stop, is_save_due = self._agreed(is_interrupted(), self._is_time_to_save(progress.step))
        self.store.poll()
        if must_stop or is_save_due:
            self.store.save(progress)
        if self.processes.is_first:
            self.on_step(record)
        return progress, must_stop

    def _agreed(self, *wishes: bool) -> tuple[bool, ...]:
        """Which wishes any process has: clocks and signals differ, and a save is one of all processes."""
        counts = self.processes.sum_(torch.tensor(wishes, dtype=torch.float32, device=self.pair.device))
        return tuple(count > 0 for count in counts.tolist())

    def _advance(self, progress: Progress, record: StepRecord) -> Progress:
        next_window = self.data.position(record.step * self.settings.batch_sequences)
        skipped_steps = progress.skipped_steps + record.skipped
        if skipped_steps > self.engine.max_skipped_steps:
            raise MinipuzzleError(
                f"losses or gradients were not finite, or rose suddenly, in {skipped_steps} of {record.step} steps",
                "lower --learning-rate, use --dtype float32, or raise --spike-factor if the text changed that much",
            )
        if self.processes.is_first:
            _append_metrics(self.folder / METRICS_FILE, record)
        recent_losses = progress.recent_losses if record.skipped else (*progress.recent_losses, record.loss)
        return replace(
            progress,
            step=record.step,
            epoch=next_window.epoch,
            index=next_window.index,
            skipped_steps=skipped_steps,
            train_seconds=progress.train_seconds + self.settings.tokens_per_step / record.tokens_per_second,
            validation_kl_after=record.validation_kl,
            recent_losses=recent_losses[-SPIKE_WINDOW:],
        )

    def _is_time_to_save(self, step: int) -> bool:
        if step == self.settings.total_steps:
            return True  # writing the result may fail, on a full disk for one
        if self.settings.save_every:
            return step % self.settings.save_every == 0
        return self.store.seconds_since_save >= SAVE_SECONDS

    def _step_and_evaluate(self, progress: Progress) -> StepRecord:
        record = self._train_step(progress)
        is_last = record.step == self.settings.total_steps
        if is_last or (self.settings.eval_every and record.step % self.settings.eval_every == 0):
            return replace(record, validation_kl=self._validation_kl())
        return record

    def _train_step(self, progress: Progress) -> StepRecord:
        settings, step_idx, started_seconds = self.settings, progress.step, time.monotonic()
        learning_rate = settings.learning_rate_at(step_idx)
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate
        loss, kl = self._accumulate_gradients(step_idx)
        norm = nn.utils.clip_grad_norm_(self.state.model.parameters(), settings.clip_norm)
        grad_norm = float(whole(norm))
        # Loss and norm are those of all processes, so that all of them decide alike.
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        is_taken = is_finite and not self.engine.is_spike(loss, progress.recent_losses)
        if is_taken:
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
            skipped=not is_taken,
        )

    def _accumulate_gradients(self, step_idx: int) -> tuple[float, float]:
        """Loss and KL of a step's batch, whose gradients are added up over micro-batches and processes."""
        settings = self.settings
        first_row, num_rows = rows_of_process(settings.batch_sequences, self.processes)
        first_window = step_idx * settings.batch_sequences + first_row
        token_ids_BT, labels_BT = self.data.batch(first_window, num_rows)
        num_valid = (labels_BT != IGNORE).sum().to(self.pair.device, torch.float64)
        denominator = max(1.0, float(self.processes.sum_(num_valid)))
        sums = torch.zeros(2, device=self.pair.device)
        for start in range(0, num_rows, settings.micro_batch_sequences):
            micro_batch = slice(start, start + settings.micro_batch_sequences)
            terms = self.pair.loss(
                token_ids_BT[micro_batch],
                labels_BT[micro_batch],
                denominator=denominator,
                temperature=settings.temperature,
                ce_weight=settings.ce_weight,
            )
            terms.loss.backward()
            sums += torch.stack([terms.loss.detach(), terms.kl])
        loss, kl = self.processes.sum_(sums).tolist()
        return loss, kl

    def _validation_kl(self) -> float | None:
        if self.validation is None:
            return None
        model = self.state.model
        was_training = model.training
        model.eval()
        batch_sequences = EVALUATED_MICRO_BATCHES * self.settings.micro_batch_sequences
        validation_kl = self.pair.mean_kl(self.validation, batch_sequences=batch_sequences, processes=self.processes)
        model.train(was_training)
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
