"""Distillation brings a cut model back towards its teacher, and a run stopped anywhere ends as if it had not been.

On a CPU "as if" means bit for bit: same batches, same optimiser states, same weights.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import torch

from distill.engine import EngineSettings
from distill.scale.estimate import estimate_memory
from distill.scale.parallel import make_pair
from distill.settings import DistillSettings, StepRecord
from distill.states.records import METRICS_FILE
from distill.states.stored import STATE_FOLDER
from distill.training.loop import distill_pair
from distill.training.optimizers import make_optimizer
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.evaluate import evaluate
from minipuzzle.runtime.models import load_model, parts_of
from tests.support.distilling import (
    FAMILY,
    LENGTH,
    SETTINGS,
    assert_same_tensors,
    held_out,
    metrics,
    run,
    saved_tensors,
    windows,
)
from tests.support.kills import start, stop_when


@pytest.mark.parametrize("stop_after", [2, 3, 5, 7])
def test_a_crashed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    models: Path, tmp_path: Path, stop_after: int
) -> None:
    wanted_model, wanted = run(models, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        run(models, tmp_path / "crashed", stop_after=stop_after)
    found_model, found = run(models, tmp_path / "crashed")
    assert_same_tensors(found_model.state_dict(), wanted_model.state_dict())
    states = [saved_tensors(tmp_path / side / STATE_FOLDER / "step-00000008") for side in ("crashed", "whole")]
    assert {name.partition("/")[0] for name in states[0]} == {"model", "optimizer", "generator"}
    assert_same_tensors(*states)
    assert metrics(tmp_path / "crashed") == metrics(tmp_path / "whole")
    assert replace(found, train_seconds=0) == replace(wanted, train_seconds=0)


def test_only_the_last_state_is_kept_and_half_written_ones_are_ignored(models: Path, tmp_path: Path) -> None:
    wanted_model, _ = run(models, tmp_path / "whole")
    folder = tmp_path / "crashed"
    with pytest.raises(RuntimeError, match="crash"):
        run(models, folder, stop_after=7)
    assert [path.name for path in (folder / STATE_FOLDER).iterdir()] == ["step-00000006"]
    half_written = folder / STATE_FOLDER / "step-00000007.unfinished"
    half_written.mkdir()
    (half_written / "__0_0.distcp").write_bytes(b"half")
    with (folder / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "lo')
    found_model, _ = run(models, folder)
    assert_same_tensors(found_model.state_dict(), wanted_model.state_dict())
    assert [path.name for path in (folder / STATE_FOLDER).iterdir()] == ["step-00000008"]


def test_a_run_killed_from_outside_ends_bit_for_bit_like_an_uninterrupted_one(models: Path, tmp_path: Path) -> None:
    wanted_model, _ = run(models, tmp_path / "whole")
    state = tmp_path / "killed" / STATE_FOLDER
    process = start(run, models, tmp_path / "killed")
    stop_when(process, lambda: bool(list(state.glob("step-0000000?"))))
    found_model, progress = run(models, tmp_path / "killed")
    assert progress.step == 8
    assert_same_tensors(found_model.state_dict(), wanted_model.state_dict())


def test_ctrl_c_saves_the_step_in_progress(models: Path, tmp_path: Path) -> None:
    folder, settings = tmp_path / "stopped", replace(SETTINGS, save_every=1000)

    def press_ctrl_c(record: StepRecord) -> None:
        if record.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        distill_pair(
            pair=make_pair(
                load_model(Checkpoint.open(models / "teacher")), load_model(Checkpoint.open(models / "student")), FAMILY
            ),
            data=windows(),
            settings=settings,
            folder=folder,
            validation=held_out(),
            on_step=press_ctrl_c,
        )
    assert [path.name for path in (folder / STATE_FOLDER).iterdir()] == ["step-00000005"]
    wanted_model, _ = run(models, tmp_path / "whole")
    found_model, _ = run(models, folder)
    assert_same_tensors(found_model.state_dict(), wanted_model.state_dict())


def test_distillation_lowers_the_distance_to_the_teacher_on_held_out_text(models: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, tokens=60 * 4 * LENGTH, eval_every=30)
    _, progress = run(models, tmp_path / "run", settings)
    assert progress.validation_kl_before is not None and progress.validation_kl_after is not None
    assert progress.validation_kl_after < 0.6 * progress.validation_kl_before
    evaluated = {r["step"]: r["validation_kl"] for r in metrics(tmp_path / "run") if "validation_kl" in r}
    assert list(evaluated) == [30, 60]
    assert evaluated[60] == progress.validation_kl_after


def test_the_weights_of_the_best_evaluation_are_kept(models: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, tokens=12 * SETTINGS.tokens_per_step, eval_every=2, save_every=100)
    with pytest.raises(RuntimeError, match="crash"):
        run(models, tmp_path / "run", settings, stop_after=11, spoil_after=5)
    student_model, progress = run(models, tmp_path / "run", settings, spoil_after=5)
    evaluated = {r["step"]: r["validation_kl"] for r in metrics(tmp_path / "run") if "validation_kl" in r}
    assert list(evaluated) == [2, 4, 6, 8, 10, 12]
    assert progress.best_step == 4 == min(evaluated, key=evaluated.__getitem__)
    assert min(kl for step, kl in evaluated.items() if step > 5) > 1.5 * evaluated[4]  # what must not be kept
    teacher_model = load_model(Checkpoint.open(models / "teacher"))
    found = evaluate(student_model.eval(), FAMILY, held_out(), against=teacher_model)
    assert found.kl == pytest.approx(progress.validation_kl_after, rel=1e-4)
    assert found.kl == pytest.approx(min(evaluated.values()), rel=1e-4)
    assert found.loss == pytest.approx(progress.validation_loss_after, rel=1e-4)


def test_a_student_equal_to_its_teacher_is_at_distance_zero(models: Path, tmp_path: Path) -> None:
    progress = distill_pair(
        pair=make_pair(
            load_model(Checkpoint.open(models / "teacher")), load_model(Checkpoint.open(models / "teacher")), FAMILY
        ),
        data=windows(),
        settings=replace(SETTINGS, tokens=1, weight_decay=0.0),
        folder=tmp_path,
        validation=held_out(),
    )
    assert abs(progress.validation_kl_before or 0) < 1e-6


def test_the_teacher_stays_as_it_was(models: Path, tmp_path: Path) -> None:
    teacher_model = load_model(Checkpoint.open(models / "teacher"))
    before = {name: tensor.clone() for name, tensor in teacher_model.state_dict().items()}
    distill_pair(
        pair=make_pair(teacher_model, load_model(Checkpoint.open(models / "student")), FAMILY),
        data=windows(),
        settings=replace(SETTINGS, tokens=1),
        folder=tmp_path,
    )
    assert_same_tensors(teacher_model.state_dict(), before)
    assert all(parameter.grad is None for parameter in teacher_model.parameters())


def test_micro_batches_do_not_change_the_step(models: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, tokens=1)
    whole, _ = run(models, tmp_path / "whole", replace(settings, micro_batch_sequences=4))
    parts, _ = run(models, tmp_path / "parts", replace(settings, micro_batch_sequences=3))  # 3 and 1
    loss = [metrics(tmp_path / name)[0] for name in ("whole", "parts")]
    assert loss[0]["loss"] == pytest.approx(loss[1]["loss"], rel=1e-6)
    assert loss[0]["grad_norm"] == pytest.approx(loss[1]["grad_norm"], rel=1e-4)
    assert whole.state_dict().keys() == parts.state_dict().keys()


def test_steps_that_are_not_finite_are_skipped_and_too_many_stop_the_run(models: Path, tmp_path: Path) -> None:
    student_model = load_model(Checkpoint.open(models / "student"))
    with torch.no_grad():
        next(student_model.parameters()).fill_(float("inf"))
    before = {name: tensor.clone() for name, tensor in student_model.state_dict().items()}
    with pytest.raises(MinipuzzleError, match="in 21 of 21 steps"):
        distill_pair(
            pair=make_pair(load_model(Checkpoint.open(models / "teacher")), student_model, FAMILY),
            data=windows(),
            settings=replace(SETTINGS, tokens=30 * SETTINGS.tokens_per_step, save_every=100),
            folder=tmp_path,
        )
    assert_same_tensors(student_model.state_dict(), before)
    assert [record["skipped"] for record in metrics(tmp_path)] == [True] * 20
    assert metrics(tmp_path)[0]["loss"] is None


def test_steps_whose_loss_rises_suddenly_are_skipped_and_do_not_count_as_usual(models: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, tokens=44 * SETTINGS.tokens_per_step, learning_rate=1e-9, save_every=100)
    _, progress = run(models, tmp_path / "run", settings, engine=EngineSettings(spike_factor=1.02))
    records = metrics(tmp_path / "run")
    usual: list[float] = []
    for record in records:
        is_spike = len(usual) >= 32 and record["loss"] > 1.02 * median(usual[-32:])
        assert record["skipped"] == is_spike, record["step"]
        if not is_spike:
            usual.append(record["loss"])
    assert progress.skipped_steps == sum(record["skipped"] for record in records) > 0


def test_the_learning_rate_warms_up_and_falls_to_its_minimum() -> None:
    settings = DistillSettings(tokens=100, sequence_length=1, batch_sequences=1, warmup_fraction=0.1, learning_rate=2.0)
    rates = [settings.learning_rate_at(step_idx) for step_idx in range(settings.total_steps)]
    assert len(rates) == 100
    assert rates[:11] == sorted(rates[:11]) and rates[0] > 0
    assert rates[10] == max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
def test_other_schedules_end_at_the_same_minimum(schedule: str) -> None:
    settings = DistillSettings(
        tokens=100,
        sequence_length=1,
        batch_sequences=1,
        warmup_fraction=0.1,
        learning_rate=2.0,
        schedule=schedule,
        decay_fraction=0.25,
    )
    rates = [settings.learning_rate_at(step_idx) for step_idx in range(100)]
    falls = [before - after for before, after in pairwise(rates[10:])]
    falling = [fall for fall in falls if fall > 0]
    assert max(rates) == rates[10] == 2.0 and rates[-1] == pytest.approx(0.2)
    assert max(falling) == pytest.approx(min(falling))  # along a line
    assert len(falling) == (89 if schedule == "linear" else 25)
    assert schedule == "linear" or max(falls[:64]) == 0  # first not at all


def test_vectors_and_embeddings_do_not_decay(models: Path) -> None:
    model = load_model(Checkpoint.open(models / "student"))
    decayed, kept = make_optimizer(model, SETTINGS).param_groups
    assert decayed["weight_decay"] == SETTINGS.weight_decay and kept["weight_decay"] == 0
    assert {name.split(".")[-2] for name in decayed["param_names"]} == {
        *("in_proj", "out_proj", "conv1d", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj", "lm_head")
    }
    assert {"embeddings", "norm_f"} <= {name.split(".")[1] for name in kept["param_names"]}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_the_memory_estimate_is_near_what_autograd_keeps(models: Path) -> None:
    checkpoint = Checkpoint.open(models / "teacher")
    model = load_model(checkpoint).requires_grad_(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that its address stays taken
        return tensor

    token_ids, _ = windows().batch(0, 2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        parts_of(model, FAMILY).logits_input(token_ids)
    estimate = estimate_memory(checkpoint.architecture, checkpoint.architecture, SETTINGS, on_cpu=True)
    assert 0.5 < estimate.activation_bytes / sum(num_bytes for num_bytes, _ in kept.values()) < 2
