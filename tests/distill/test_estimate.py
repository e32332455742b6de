"""What a run will need is told from config.json files alone: exact for weights and optimiser, a labelled guess else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.engine import EngineSettings
from distill.run import DistillRequest, prepare_run
from distill.scale.estimate import estimate_memory, estimate_run, flops_per_token
from distill.scale.gpus import GPUS
from distill.settings import DistillSettings
from minipuzzle.architecture.families import read_architecture
from minipuzzle.cut.plan import Plan
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.runtime.compute import Compute
from tests.support.cli import run_cli
from tests.support.tiny_models import published_config, tiny_config

RECIPE = DistillSettings(tokens=63 * 10**9, sequence_length=8192, batch_sequences=768, dtype="bfloat16")
ENGINE = EngineSettings(activation_checkpointing=True)


@pytest.fixture
def teacher_config() -> dict[str, Any]:
    return published_config()


@pytest.fixture
def student_config() -> dict[str, Any]:
    """45 Mamba, 48 MLP and 5 attention layers; which of them stay does not change any sum."""
    pattern = "M-" * 45 + "-" * 3 + "*" * 5
    cut = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern), "intermediate_size": 30720}
    return published_config() | cut


def test_the_published_case_on_8_64_and_512_gpus(teacher_config: Any, student_config: Any, tmp_path: Path) -> None:
    for name, config in (("teacher", teacher_config), ("student", student_config)):
        write_json(tmp_path / f"{name}.json", config)
    options = ["--tokens", "63B", "--sequence-length", "8192", "--batch", "1024", "--activation-checkpointing"]
    arguments = [str(tmp_path / "student.json"), "--teacher", str(tmp_path / "teacher.json"), *options]
    estimate = ["--estimate", "--gpus", "8,64,512"]
    result = run_cli("distill", *arguments, *estimate, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["teacher_parameters"] == pytest.approx(56e9, rel=0.02)
    assert facts["student_parameters"] == pytest.approx(47e9, rel=0.02)
    for run, number in zip(facts["runs"], (8, 64, 512), strict=True):
        # float32 weight, gradient and two moments of the student; a bfloat16 teacher.
        assert run["memory"]["student_bytes"] == 16 * facts["student_parameters"] // number
        assert run["memory"]["teacher_bytes"] == 2 * facts["teacher_parameters"] // number
    assert "needs" in facts["runs"][0]["problems"][0]  # 8 GPUs of 80 GB are too few
    assert facts["runs"][1]["problems"] == facts["runs"][2]["problems"] == []
    assert facts["runs"][1]["hours"] > facts["runs"][2]["hours"]
    text = run_cli("distill", *arguments, *estimate).output
    assert "an estimate" in text and "512 x h100" in text


def test_operations_are_those_of_the_published_arithmetic(teacher_config: Any, student_config: Any) -> None:
    teacher, student = read_architecture(teacher_config), read_architecture(student_config)
    # Two for each teacher parameter and six for each student parameter: 394 GFLOP a token; embeddings do not multiply.
    plain = flops_per_token(student, teacher, RECIPE, EngineSettings())
    assert plain == pytest.approx(394e9, rel=0.02)
    again = flops_per_token(student, teacher, RECIPE, ENGINE)
    assert again - plain == pytest.approx(2 * 47e9, rel=0.03)


def test_speed_is_limited_by_compute_or_by_the_network(teacher_config: Any, student_config: Any) -> None:
    teacher, student = read_architecture(teacher_config), read_architecture(student_config)
    runs = [
        estimate_run(student, teacher, settings, ENGINE, hardware=GPUS[gpu], num_processes=64)
        for gpu, settings in (("h100", RECIPE), ("b200", RECIPE))
    ]
    assert [run.bound_by for run in runs] == ["compute", "network"]
    seconds = RECIPE.sequence_length * flops_per_token(student, teacher, RECIPE, ENGINE) / (0.3 * 989e12)
    assert runs[0].tokens_per_second == pytest.approx(64 * 8192 / seconds)
    assert runs[0].hours == pytest.approx(63e9 / runs[0].tokens_per_second / 3600, rel=1e-3)
    assert (
        "768 cannot be divided"
        in (estimate_run(student, teacher, RECIPE, ENGINE, hardware=GPUS["h100"], num_processes=512).problems[-1])
    )


def test_checkpointing_and_offloading_are_accounted_for(teacher_config: Any, student_config: Any) -> None:
    teacher, student = read_architecture(teacher_config), read_architecture(student_config)
    plain = estimate_memory(student, teacher, RECIPE, on_cpu=False, num_processes=64)
    recomputed = estimate_memory(student, teacher, RECIPE, on_cpu=False, engine=ENGINE, num_processes=64)
    assert recomputed.activation_bytes < 0.1 * plain.activation_bytes
    offload = EngineSettings(teacher_offload="cpu")
    assert estimate_memory(student, teacher, RECIPE, on_cpu=False, engine=offload, num_processes=64).teacher_bytes == 0


def test_a_plan_stands_for_the_student_that_it_leaves(tmp_path: Path) -> None:
    config = tiny_config("M-M*-")
    architecture = read_architecture(config)
    write_json(tmp_path / "teacher.json", config)
    plan = Plan(source_fingerprint=architecture.fingerprint(), kept_layers=(0, 1, 3))
    (tmp_path / "plan.json").write_text(plan.to_json())
    arguments = [str(tmp_path / "plan.json"), "--teacher", str(tmp_path / "teacher.json"), "--tokens", "1M"]
    result = run_cli("distill", *arguments, "--estimate", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["student_parameters"] == plan.apply(architecture).num_parameters
    assert facts["runs"][0]["hardware"] == "cpu" and facts["runs"][0]["tokens_per_second"] > 0


def test_a_number_of_gpus_that_is_none_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "model.json", tiny_config())
    model = str(tmp_path / "model.json")
    result = run_cli("distill", model, "--teacher", model, "--tokens", "1M", "--estimate", "--gpus", "8,many")
    assert result.exit_code == 1 and "--gpus" in result.stderr


def small_request(checkpoint: Checkpoint, text: Path, folder: Path) -> DistillRequest:
    """A model that is distilled from itself."""
    settings = DistillSettings(tokens=64, sequence_length=16, batch_sequences=2)
    return DistillRequest(student=checkpoint, teacher=checkpoint, data=(text,), settings=settings, out=folder / "out")


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_share_shown_while_training_is_the_one_that_the_estimate_expects(
    tiny_checkpoint: Checkpoint, text_file: Path, tmp_path: Path, recomputes: bool
) -> None:
    """The same operations over the same rate of the device: at the estimated speed both are one number."""
    engine = EngineSettings(activation_checkpointing=recomputes)
    prepared = prepare_run(replace(small_request(tiny_checkpoint, text_file, tmp_path), engine=engine))
    assert prepared.estimate.bound_by == "compute"
    share = prepared.used_fraction(prepared.estimate.tokens_per_second)
    assert share == pytest.approx(prepared.hardware.expected_fraction)


def test_a_limit_that_training_exceeds_by_the_estimate_is_refused_before_weights_are_read(
    tiny_checkpoint: Checkpoint, text_file: Path, tmp_path: Path
) -> None:
    request = small_request(tiny_checkpoint, text_file, tmp_path)
    needed = prepare_run(request).estimate.memory.total_bytes
    prepare_run(request, Compute(memory_bytes=needed))
    with pytest.raises(MinipuzzleError, match=r"needs .* by an estimate\), but .* may be used"):
        prepare_run(request, Compute(memory_bytes=needed - 1))
