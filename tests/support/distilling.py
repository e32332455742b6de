"""A short distillation of tiny models, which tests of training run whole, in parts, in other processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from distill.engine import EngineSettings
from distill.run import DistillRequest, distill_checkpoint
from distill.scale.parallel import make_pair
from distill.settings import DistillSettings, OnNote, StepRecord, ignore_note
from distill.states.records import METRICS_FILE
from distill.states.stored import Progress
from distill.training.data import PackedWindows
from distill.training.loop import distill_pair
from minipuzzle.architecture.families import FAMILIES
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.models import load_model, parts_of
from tests.support.cli import run_cli

FAMILY = FAMILIES["nemotron_h"]


VOCABULARY, LENGTH = 272, 24


SETTINGS = DistillSettings(
    tokens=8 * 4 * LENGTH,  # 8 steps
    sequence_length=LENGTH,
    batch_sequences=4,
    micro_batch_sequences=2,
    learning_rate=3e-3,
    save_every=3,
)


def documents(num_documents: int, seed: int) -> list[list[int]]:
    """Random token documents with some order in them: each is a walk of small steps."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 4, (num_documents, 61), generator=generator)
    return ((steps.cumsum(1) * 7) % VOCABULARY).tolist()


def windows(seed: int = 0) -> PackedWindows:
    return PackedWindows(documents(6, seed=1), sequence_length=LENGTH, seed=seed)


def held_out() -> EvaluationWindows:
    token_ids, labels = PackedWindows(documents(8, seed=2), sequence_length=LENGTH).batch(0, 12)
    return EvaluationWindows(token_ids=token_ids, labels=labels, num_bytes=1)


def run(
    models: Path,
    folder: Path,
    settings: DistillSettings = SETTINGS,
    stop_after: int | None = None,
    engine: EngineSettings | None = None,
    spoil_after: int | None = None,
    on_note: OnNote = ignore_note,
) -> tuple[nn.Module, Progress]:
    """Distil into ``folder``; fail as a crash would after ``stop_after`` steps, and harm the student after others."""
    student_model = load_model(Checkpoint.open(models / "student"))

    def on_step(record: StepRecord) -> None:
        if record.step == stop_after:
            raise RuntimeError("crash")
        if record.step == spoil_after:
            with torch.no_grad():
                parts_of(student_model, FAMILY).head.weight.mul_(-3)

    folder.mkdir(exist_ok=True)
    progress = distill_pair(
        pair=make_pair(load_model(Checkpoint.open(models / "teacher")), student_model, FAMILY),
        data=windows(),
        settings=settings,
        folder=folder,
        validation=held_out(),
        engine=engine,
        on_step=on_step,
        on_note=on_note,
    )
    return student_model, progress


def metrics(folder: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    for record in records:
        assert record.pop("tokens_per_second") > 0  # the only figure that depends on the clock
    return records


def saved_tensors(state_folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved state, read by PyTorch's own reader."""
    reader = FileSystemReader(state_folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries.items()}  # type: ignore[union-attr]
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


COMMAND_OPTIONS = [
    "--tokens",
    "384",
    "--sequence-length",
    "32",
    "--batch",
    "2",
    "--learning-rate",
    "3e-3",
    "--device",
    "cpu",
]


def distill_arguments(student: Path, text_file: Path, out: Path, *more: str) -> list[str]:
    return ["distill", str(student), "--data", str(text_file), "-o", str(out), *COMMAND_OPTIONS, *more]


def run_distill(student: Path, text_file: Path, out: Path, *more: str) -> Result:
    return run_cli(*distill_arguments(student, text_file, out, *more))


def distil_in_python(student: Path, teacher: Path, text_file: Path, out: Path, stop_after: int | None = None) -> None:
    def crash(record: StepRecord) -> None:
        if record.step == stop_after:
            raise RuntimeError("crash")

    settings = DistillSettings(tokens=384, sequence_length=32, batch_sequences=2, learning_rate=3e-3)
    request = DistillRequest(
        student=Checkpoint.open(student),
        teacher=Checkpoint.open(teacher),
        data=(text_file,),
        settings=replace(settings, save_every=2),
        out=out,
    )
    distill_checkpoint(request, on_step=crash)


def crash_after_three_steps(student: Path, teacher: Path, text_file: Path, out: Path) -> None:
    with pytest.raises(RuntimeError, match="crash"):
        distil_in_python(student, teacher, text_file, out, stop_after=3)
    assert not out.exists() and out.with_name("out.partial").is_dir()
