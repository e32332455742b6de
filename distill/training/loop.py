"""The training loop: a student learns the next-token distribution of a frozen teacher.

The same loop runs in one process and in many. A batch is a pure function of the step, of which each process takes its
own sequences; the loss is divided by the number of valid tokens in the batches of all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from distill.engine import SPIKE_WINDOW, EngineSettings
from distill.objective.losses import LossSettings
from distill.objective.pair import DistillPair
from distill.scale.parallel import rows_of_process, whole
from distill.settings import LARGEST_KL, DistillSettings, OnNote, OnStep, StepRecord, ignore_note, ignore_step
from distill.states.checkpointing import StateStore, TrainingState
from distill.states.records import append_metrics, forget_metrics_after
from distill.states.stored import DamagedStateError, Progress
from distill.training.data import BlendedWindows, PackedWindows
from distill.training.interrupts import deferred_interrupts
from distill.training.optimizers import make_optimizer
from minipuzzle.data.windows import IGNORE, EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.processes import Processes

SAVE_SECONDS = 300.0
EVALUATED_MICRO_BATCHES = 8  # at once, because an evaluation keeps no activations of earlier layers

Windows = PackedWindows | BlendedWindows


def distill_pair(
    *,
    pair: DistillPair,
    data: Windows,
    settings: DistillSettings,
    folder: Path,
    validation: EvaluationWindows | None = None,
    engine: EngineSettings | None = None,
    on_step: OnStep = ignore_step,
    on_note: OnNote = ignore_note,
) -> Progress:
    """Train the student of a pair, from the last state saved in ``folder`` if there is one, and report.

    State is kept in ``folder/state/``, and ``folder/metrics.jsonl`` gets a line a step. All processes of a job call
    this together; ``on_step`` and ``on_note`` are called in the first alone.

    Raises: DamagedStateError if no saved state is good; MinipuzzleError if too many steps had to be skipped, or a
    batch cannot be divided among the processes.
    KeyboardInterrupt in all processes after Ctrl-C or a termination signal in one, with the state saved.
    """
    engine, processes = engine or EngineSettings(), pair.compute.processes
    optimizer = make_optimizer(pair.student.model, settings)
    state = TrainingState(model=pair.student.model, optimizer=optimizer, device=pair.compute.own_device)
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
        on_note=on_note,
    )
    return run.finish()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What stays the same during a run; what changes is the state's tensors and the Progress handed along."""

    pair: DistillPair
    state: TrainingState
    store: StateStore
    data: Windows
    settings: DistillSettings
    engine: EngineSettings
    processes: Processes
    folder: Path
    validation: EvaluationWindows | None
    on_step: OnStep
    on_note: OnNote

    def finish(self) -> Progress:
        """Run all steps that are left."""
        progress, notes = self.store.load_last()
        for note in notes if self.processes.is_first else ():
            self.on_note(note)
        if progress is None:
            torch.manual_seed(self.settings.seed)
            before = self._validation_distance()
            progress = (
                Progress()
                if before is None
                else Progress(validation_kl_before=before.kl, validation_loss_before=before.loss)
            )
        if self.processes.is_first:
            forget_metrics_after(self.folder, progress.step)
        with deferred_interrupts() as is_interrupted:
            try:
                while progress.step < self.settings.total_steps:
                    progress, must_stop = self._step_and_save(progress, is_interrupted)
                    if must_stop:
                        raise KeyboardInterrupt
            finally:
                self.store.finish()  # a step that fails takes no state with it
        return self._back_to_best(progress)

    def _back_to_best(self, progress: Progress) -> Progress:
        """The run's end, with the weights of the best evaluation."""
        if progress.best_step in (0, progress.step):
            return progress
        try:
            best = self.store.load(progress.best_step)
        except DamagedStateError as error:
            if self.processes.is_first:
                self.on_note(f"{error.problem}; the weights of the last step are taken instead")
            return replace(progress, best_step=progress.step)
        return replace(
            progress, validation_kl_after=best.validation_kl_after, validation_loss_after=best.validation_loss_after
        )

    def _step_and_save(self, progress: Progress, is_interrupted: Callable[[], bool]) -> tuple[Progress, bool]:
        """One step and what follows it; also says whether to stop."""
        record = self._step_and_evaluate(progress)
        progress = self._advance(progress, record)
        is_best = bool(self.settings.eval_every) and progress.best_step == progress.step
        must_stop, is_save_due = self._agreed(is_interrupted(), is_best or self._is_time_to_save(progress.step))
        self.store.poll()
        if must_stop or is_save_due:
            self.store.save(progress, protected_steps=(progress.best_step,))
        if self.processes.is_first:
            self.on_step(record)
        return progress, must_stop

    def _agreed(self, *wishes: bool) -> tuple[bool, ...]:
        """Which wishes any process has: clocks and signals differ, and a save is one of all processes."""
        counts = self.processes.sum_(torch.tensor(wishes, dtype=torch.float32, device=self.pair.device))
        return tuple(count > 0 for count in counts.tolist())

    def _advance(self, progress: Progress, record: StepRecord) -> Progress:
        skipped_steps = progress.skipped_steps + record.skipped
        if skipped_steps > self.engine.max_skipped_steps:
            raise MinipuzzleError(
                f"losses or gradients were not finite, or rose suddenly, in {skipped_steps} of {record.step} steps",
                "lower ‹learning_rate›, use ‹dtype› float32, or raise ‹spike_factor› if the text changed that much",
            )
        if self.processes.is_first:
            append_metrics(self.folder, record)
        recent_losses = progress.recent_losses if record.skipped else (*progress.recent_losses, record.loss)
        best = progress.best_step, progress.best_validation_kl
        if record.validation_kl is not None and record.validation_kl < progress.best_validation_kl:
            best = record.step, record.validation_kl
        return replace(
            progress,
            step=record.step,
            best_step=best[0],
            best_validation_kl=best[1],
            skipped_steps=skipped_steps,
            train_seconds=progress.train_seconds + self.settings.tokens_per_step / record.tokens_per_second,
            validation_kl_after=record.validation_kl,
            validation_loss_after=record.validation_loss,
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
            distance = self._validation_distance()
            if distance is not None:
                return replace(record, validation_kl=distance.kl, validation_loss=distance.loss)
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
        sums, loss_settings = torch.zeros(2, device=self.pair.device), _loss_settings(settings)
        for start in range(0, num_rows, settings.micro_batch_sequences):
            micro_batch = slice(start, start + settings.micro_batch_sequences)
            terms = self.pair.loss(
                token_ids_BT[micro_batch],
                labels_BT[micro_batch],
                denominator=denominator,
                settings=loss_settings,
            )
            terms.loss.backward()
            sums += torch.stack([terms.loss.detach(), terms.kl])
        loss, kl = self.processes.sum_(sums).tolist()
        return loss, kl

    def _validation_distance(self) -> Quality | None:
        if self.validation is None:
            return None
        model = self.state.model
        was_training = model.training
        model.eval()
        batch_sequences = EVALUATED_MICRO_BATCHES * self.settings.micro_batch_sequences
        distance = self.pair.distance(self.validation, batch_sequences=batch_sequences)
        model.train(was_training)
        # What is no number is further away than all that are; JSON has no name for it.
        kl, loss = (value if math.isfinite(value) else LARGEST_KL for value in (distance.kl or 0.0, distance.loss))
        return replace(distance, kl=kl, loss=loss)


def _loss_settings(settings: DistillSettings) -> LossSettings:
    return LossSettings(
        form=settings.form,
        mixture_share=settings.mixture_share,
        temperature=settings.temperature,
        ce_weight=settings.ce_weight,
        hidden_weight=settings.hidden_weight,
        top_k=settings.top_k or None,
    )
