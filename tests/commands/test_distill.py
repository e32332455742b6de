"""``minipuzzle distill`` turns checkpoint folders into a checkpoint folder, and refuses what does not fit together.

The output is a complete model for transformers, and an interrupted command continues only on the same inputs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.run import find_teacher
from distill.states.stored import step_folder
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.files.outputs import ADDED_FIELDS, PROVENANCE_FILE
from tests.support.cli import run_cli
from tests.support.distilling import (
    crash_after_three_steps,
    distil_in_python,
    distill_arguments,
    run_distill,
    saved_tensors,
)
from tests.support.jobs import losses, torchrun
from tests.support.kills import stop_command_when
from tests.support.tiny_models import write_tiny_checkpoint


@pytest.fixture
def held_out(text_file: Path, tmp_path: Path) -> Path:
    """A few documents to evaluate on."""
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(text_file.read_text().splitlines(keepends=True)[:3]))
    return path


def test_the_result_is_a_complete_model_for_transformers(
    student: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    result = run_distill(student, text_file, out, "--validation", str(held_out))
    assert result.exit_code == 0, result.output
    assert "KL to the teacher" in result.output
    assert not (out / "state").exists() and not out.with_name("out.partial").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6
    Checkpoint.open(out).require_plain_weights()
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(model.parameters()).dtype == torch.bfloat16
    prompt = AutoTokenizer.from_pretrained(out)("the quick brown fox jumps", return_tensors="pt")["input_ids"]
    model = model.float().eval()
    generated = [
        model.generate(prompt, max_new_tokens=40, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    ]
    assert torch.equal(*generated)


def test_the_result_moved_towards_the_teacher_and_remembers_everything(
    student: Path, text_file: Path, held_out: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    out = tmp_path / "out"
    result = run_distill(student, text_file, out, "--validation", str(held_out), "--json", "--seed", "3")
    figures = json.loads(result.stdout)
    assert figures["validation_kl_after"] < 0.95 * figures["validation_kl_before"]
    assert figures["steps"] == 6 and figures["tokens"] == 384
    record = read_json(out / PROVENANCE_FILE)
    assert record["command"] == "distill"
    assert record["settings"]["seed"] == 3 and record["settings"]["tokens"] == 384
    assert record["teacher_fingerprint"] == Checkpoint.open(tiny_folder).fingerprint
    assert record["student_fingerprint"] == Checkpoint.open(student).fingerprint
    assert find_teacher(out) == tiny_folder  # so that the result can be distilled further
    before, after = (load_file(folder / "model.safetensors") for folder in (student, out))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    # Each part learns; a one-dimensional weight may stay within bfloat16's rounding.
    assert all(not torch.equal(before[name], after[name]) for name in before if before[name].ndim > 1)


def test_the_same_command_continues_a_crashed_run_bit_for_bit(
    student: Path, text_file: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    distil_in_python(student, tiny_folder, text_file, whole)
    crash_after_three_steps(student, tiny_folder, text_file, out)
    result = run_distill(student, text_file, out)
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    record = read_json(out / PROVENANCE_FILE)
    added = {name: record.pop(name) for name in ADDED_FIELDS}  # by the command, of what came out
    assert record == read_json(whole / PROVENANCE_FILE), added


def test_a_terminated_command_leaves_a_partial_folder_that_the_same_command_finishes(
    student: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = distill_arguments(student, text_file, out, "--tokens", "64k")  # the later --tokens wins
    metrics = tmp_path / "out.partial" / "metrics.jsonl"

    def has_three_steps() -> bool:
        return metrics.exists() and metrics.read_text().count("\n") > 2

    assert stop_command_when(arguments, has_three_steps, by=signal.SIGTERM) == 130
    saved = [path.name for path in (tmp_path / "out.partial" / "state").iterdir()]
    assert len(saved) == 1 and int(saved[0].removeprefix("step-")) > 2
    assert os.path.lexists(out) is False


def test_a_kept_state_becomes_a_model_while_the_run_is_unfinished(
    student: Path, text_file: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    out = tmp_path / "out"
    crash_after_three_steps(student, tiny_folder, text_file, out)
    result = run_cli("distill", student, "-o", out, "--to-hf", "2")
    assert result.exit_code == 0, result.output
    converted = tmp_path / "out.step-2"
    Checkpoint.open(converted).require_plain_weights()
    assert find_teacher(converted) == tiny_folder
    saved = saved_tensors(step_folder(tmp_path / "out.partial/state", 2))
    written = load_file(converted / "model.safetensors")
    name_in_memory = Checkpoint.open(student).family.modules.module_name
    for name, weight in written.items():
        assert torch.equal(weight, saved["model/" + name_in_memory(name)].bfloat16()), name
    missing = run_cli("distill", student, "-o", out, "--to-hf", "1")
    assert missing.exit_code == 1
    assert "no state of step 1" in missing.stderr and "these steps: 2" in missing.stderr
    other = run_cli("distill", tiny_folder, "-o", out, "--to-hf", "2")
    assert other.exit_code == 4 and "another student" in other.stderr
    assert run_distill(student, text_file, out).exit_code == 0  # the run itself goes on as before


def test_the_result_says_what_was_estimated_and_what_was_measured(
    student: Path, text_file: Path, tmp_path: Path
) -> None:
    result = run_distill(student, text_file, tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = {line[:22].strip(): line[22:].split() for line in result.output.splitlines()}
    assert lines["tokens/s"] and all(float(figure.replace(",", "")) > 0 for figure in lines["tokens/s"])
    assert lines["memory, each process"][1::2] == ["GiB", "GiB"]


@pytest.mark.parametrize("missing", ["--tokens", "--data", "--out"])
def test_an_option_that_a_run_needs_is_asked_for(student: Path, text_file: Path, tmp_path: Path, missing: str) -> None:
    given = {"--tokens": "64", "--data": str(text_file), "--out": str(tmp_path / "out"), "--device": "cpu"}
    del given[missing]
    arguments = [part for option in given.items() for part in option]
    result = run_cli("distill", student, *arguments)
    assert result.exit_code == 2
    assert f"Missing option '{missing}'" in result.stderr


@pytest.mark.parametrize("changed", ["data", "settings", "student", "teacher"])
def test_a_crashed_run_does_not_continue_on_other_inputs(
    student: Path, text_file: Path, tmp_path: Path, tiny_folder: Path, changed: str
) -> None:
    out, text, more = tmp_path / "out", tmp_path / "text.jsonl", []
    shutil.copyfile(text_file, text)
    crash_after_three_steps(student, tiny_folder, text, out)
    if changed == "data":
        text.write_text(text.read_text() + '{"text": "one more line"}\n')
    elif changed == "settings":
        more = ["--temperature", "2"]
    elif changed == "student":
        write_tiny_checkpoint(student, pattern="M-M*-", seed=9, dtype="bfloat16")
    else:
        other = write_tiny_checkpoint(tmp_path / "other", seed=9)
        more = ["--teacher", str(other)]
    result = run_distill(student, text, out, *more)
    assert result.exit_code == 4, result.output
    assert changed in result.stderr


@pytest.mark.parametrize("broken", ["no record", "moved", "changed"])
def test_a_teacher_that_cannot_be_found_is_asked_for(
    student: Path, text_file: Path, tmp_path: Path, tiny_folder: Path, broken: str
) -> None:
    record: dict[str, Any] = read_json(student / PROVENANCE_FILE)
    if broken == "no record":
        (student / PROVENANCE_FILE).unlink()
    elif broken == "moved":
        write_json(student / PROVENANCE_FILE, {**record, "teacher": str(tmp_path / "gone")})
    else:
        write_json(student / PROVENANCE_FILE, {**record, "teacher_fingerprint": "0" * 16})
    result = run_distill(student, text_file, tmp_path / "out")
    assert result.exit_code == 1
    assert "--teacher" in result.stderr
    assert not list(tmp_path.glob("out*"))
    assert run_distill(student, text_file, tmp_path / "out", "--teacher", str(tiny_folder)).exit_code == 0


def test_a_blend_is_planned_aloud_and_its_sources_belong_to_the_run(
    student: Path, text_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    shutil.copyfile(text_file, text)
    blend = tmp_path / "blend.toml"
    blend.write_text(
        'held_out = 0.3\n[sources.web]\npath = "text.jsonl"\n[[phases]]\nname = "broad"\nweights = {web = 1}\n'
    )
    facts = json.loads(run_distill(student, blend, tmp_path / "out", "--dry-run", "--json").stdout)
    assert [(share["phase"], share["source"], share["num_tokens"]) for share in facts["plan"]] == [
        ("broad", "web", 384)
    ]
    assert any("packed" in note and "Mamba state" in note for note in facts["notes"])
    assert facts["validation_tokens"] > 0
    result = run_distill(student, blend, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "broad" in result.stderr and "epochs in all" in result.stderr
    fingerprint = read_json(tmp_path / "out" / PROVENANCE_FILE)["data_fingerprint"]
    text.write_text(text.read_text() + '{"text": "one more line"}\n')
    assert run_distill(student, blend, tmp_path / "again").exit_code == 0
    assert read_json(tmp_path / "again" / PROVENANCE_FILE)["data_fingerprint"] != fingerprint
    over = run_distill(student, blend, tmp_path / "over", "--tokens", "64k")  # the later --tokens wins
    assert over.exit_code == 1 and "above its max_epochs of 4" in " ".join(over.stderr.split())
    assert not list(tmp_path.glob("over*"))


def test_a_second_student_learns_from_the_cache_of_the_first_as_if_it_had_made_it(
    student: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ("--teacher-cache", str(tmp_path / "cache"), "--top-k", "16")
    assert run_distill(student, text_file, tmp_path / "first", *options).exit_code == 0
    written = sorted((tmp_path / "cache").iterdir())
    assert [path.suffix for path in written] == [".json", ".keys", ".targets"]
    assert written[1].stat().st_size == 12 * 32  # six steps of two windows
    assert run_distill(student, text_file, tmp_path / "second", *options).exit_code == 0
    assert sorted((tmp_path / "cache").iterdir()) == written
    first, second = (load_file(tmp_path / side / "model.safetensors") for side in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = run_distill(student, text_file, tmp_path / "third", *options, "--temperature", "2")
    assert other.exit_code == 1 and "temperature" in other.stderr


def test_tensorboard_gets_the_figures_of_every_step(
    student: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    options = ("--tensorboard", str(tmp_path / "events"), "--validation", str(held_out), "--eval-every", "3")
    assert run_distill(student, text_file, tmp_path / "out", *options).exit_code == 0
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "kl", "learning_rate", "grad_norm", "tokens_per_second", "validation_kl", "validation_loss"):
        wanted = {line["step"]: line[name] for line in lines if name in line}
        assert len(wanted) == (2 if name.startswith("validation") else 6)
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_processes_share_a_teacher_cache_and_run_the_teacher_once(
    student: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ("--teacher-cache", str(tmp_path / "cache"), "--top-k", "16")
    for out in ("first", "second"):
        torchrun(2, "-m", "minipuzzle", *distill_arguments(student, text_file, tmp_path / out, *options))
        if out == "first":
            written = {path: path.stat().st_size for path in (tmp_path / "cache").iterdir()}
    keys = [size for path, size in written.items() if path.suffix == ".keys"]
    assert keys == [6 * 32, 6 * 32]  # each process one window of each of the six steps
    assert {path: path.stat().st_size for path in (tmp_path / "cache").iterdir()} == written
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert run_distill(student, text_file, tmp_path / "alone", *options[2:]).exit_code == 0
    alone = json.loads((tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses(tmp_path / "first")[0] == pytest.approx(alone, rel=1e-2)  # the cache rounds to 1/2048 nat


def test_the_best_of_several_evaluations_is_written(
    student: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--validation", str(held_out), "--eval-every", "1", "--learning-rate", "0.05", "--warmup-fraction", "0")
    figures = json.loads(run_distill(student, text_file, out, *options, "--json").stdout)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    by_kl = {line["validation_kl"]: line["step"] for line in lines}
    assert figures["best_step"] == by_kl[min(by_kl)]
    assert figures["validation_kl_after"] == min(by_kl)
    assert (out / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(student: Path, text_file: Path, tmp_path: Path) -> None:
    result = run_distill(student, text_file, tmp_path / "out", "--dry-run", "--json")
    facts = json.loads(result.stdout)
    assert facts["steps"] == 6 and facts["tokens"] == 384
    assert facts["epochs"] == pytest.approx(384 / (32 * ((facts["data_tokens"] - 1) // 32)))
    assert facts["student_bytes"] == 16 * Checkpoint.open(student).architecture.num_parameters
    assert "dry run" in run_distill(student, text_file, tmp_path / "out", "--dry-run").output
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("option", "value"), [("--learning-rate", "-1"), ("--temperature", "0"), ("--ce-weight", "2"), ("--batch", "0")]
)
def test_a_value_out_of_range_is_named(student: Path, text_file: Path, tmp_path: Path, option: str, value: str) -> None:
    result = run_distill(student, text_file, tmp_path / "out", option, value)
    assert result.exit_code == 1
    assert option.strip("-").replace("-", " ") in result.stderr


def test_a_missing_folder_is_an_error_of_the_user(text_file: Path, tmp_path: Path) -> None:
    result = run_distill(tmp_path / "nowhere", text_file, tmp_path / "out")
    assert result.exit_code == 1
    with pytest.raises(MinipuzzleError, match="nowhere"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize(("rate", "is_held_out"), [("10", False), ("10", True), ("1e10", False), ("1e10", True)])
def test_a_run_that_diverged_ends_with_its_own_code_and_no_next_step(
    student: Path, text_file: Path, held_out: Path, tmp_path: Path, rate: str, is_held_out: bool
) -> None:
    validation = ("--validation", str(held_out)) if is_held_out else ()
    options = ("--learning-rate", rate, "--tokens", "1280", *validation)  # 20 steps
    result = run_distill(student, text_file, tmp_path / "out", *options)
    assert result.exit_code == 6, result.output
    assert "error:" in result.stderr and "next:" not in result.output and "nan nan" not in result.output
    found = run_distill(student, text_file, tmp_path / "json", *options, "--json")
    assert found.exit_code == 6
    assert json.loads(found.stdout, parse_constant=pytest.fail)["problem"]
