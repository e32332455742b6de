"""Trained students as Hugging Face checkpoints: the last step of a run, or any step whose state is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.objective.pair import DistillPair
from distill.scale.parallel import whole
from distill.states.stored import STATE_FOLDER, weight_reader
from minipuzzle.errors import InputChangedError, MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint, save_config
from minipuzzle.files.companions import copy_companions
from minipuzzle.files.fused_experts import as_stored
from minipuzzle.files.json_files import read_json
from minipuzzle.files.outputs import PROVENANCE_FILE, output_folder
from minipuzzle.files.records import PLACES_FILE, write_places
from minipuzzle.files.safetensors_files import ShardWriter, torch_dtype
from minipuzzle.runtime.processes import Processes

ReadWeight = Callable[[str, tuple[int, ...]], Tensor]  # by name in memory and shape


@contextmanager
def shared_output_folder(
    target: Path, provenance: Mapping[str, Any], processes: Processes, *, overwrite: bool
) -> Iterator[Path]:
    """An ``output_folder`` that the first process opens and completes, and that all of them write into."""
    with ExitStack() as stack:
        folder: Path | None = None
        if processes.is_first:
            folder = stack.enter_context(output_folder(target, provenance, overwrite=overwrite))
        shared: Path = processes.broadcast(folder)
        yield shared
        processes.wait()  # nobody still writes when the folder gets its name


def write_result(pair: DistillPair, student: Checkpoint, folder: Path, processes: Processes) -> None:
    """Write a trained student as a Hugging Face checkpoint in the precision in which it was stored before.

    A split student is gathered tensor by tensor, so that no process ever holds all of it.
    """
    weights = pair.student.model.state_dict()

    def gathered(name: str, _shape: tuple[int, ...]) -> Tensor:
        return whole(weights[name].detach())

    if processes.is_first:
        _write_student(gathered, student, folder)
        return
    for tensor in student.architecture.deployed.tensors():
        gathered(student.family.modules.module_name(tensor.name), tensor.shape)


def convert_state(*, student: Checkpoint, out: Path, step: int, overwrite: bool = False) -> Path:
    """Write the student of a run towards ``out`` as it was after ``step`` steps; the run may still be going on.

    Returns the folder, ``<out>.step-<step>``. Weights are read from the saved state one by one.

    Raises: MinipuzzleError if no state of this step is kept, InputChangedError if the run has another student.
    """
    run = out.with_name(out.name + ".partial")
    if not (run / PROVENANCE_FILE).is_file():
        raise MinipuzzleError(f"{run} holds no run", "give ‹out› as in the command that is running or was interrupted")
    record = read_json(run / PROVENANCE_FILE)
    if record.get("student_fingerprint") != student.fingerprint:
        raise InputChangedError(f"the run in {run} began with another student", "give the one it began with")
    read = weight_reader(run / STATE_FOLDER, step)
    target = out.with_name(f"{out.name}.step-{step}")
    with output_folder(target, {**record, "step": step}, overwrite=overwrite) as folder:
        _write_student(read, student, folder)
        if (run / PLACES_FILE).is_file():
            write_places(folder, read_json(run / PLACES_FILE))
    return target


def _write_student(read: ReadWeight, student: Checkpoint, folder: Path) -> None:
    architecture = student.architecture.deployed
    save_config(folder, student.family.write(student.config, architecture))
    copy_companions(student.folder, folder)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for tensor in architecture.tensors():
            stored = student.entries.get(tensor.name) or student.entries[architecture.names.embeddings]
            weight = read(student.family.modules.module_name(tensor.name), tensor.shape)
            yield tensor.name, weight.to("cpu", torch_dtype(stored.dtype))
        yield from ((placed.name, student.tensor(placed.name)) for placed in architecture.carried)

    writer = ShardWriter(folder)
    for name, tensor in as_stored(architecture, tensors(), is_fused=student.is_fused):
        writer.add(name, tensor)
    writer.finish()
