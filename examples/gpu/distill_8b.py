"""Distillation speed on one GPU: an 8B-shaped teacher, a 6B-shaped student, sequences of 8,192 tokens.

Random weights in the widths of the public Nemotron-H-8B config (arXiv 2504.03624); the depth of both is cut alike until
they fit the GPU. Measured: tokens/s, the share of the GPU's own bfloat16 matrix rate, and memory, in bfloat16 and with
FP8 products, each with and without torch.compile. The goal is 40 % of the bfloat16 rate. For comparison: NVIDIA's
tutorial runs 9B -> 7B at about 2,900 tokens/s on each H100.

    python examples/gpu/distill_8b.py              # on a GPU; writes distill_8b.md beside itself
    python examples/gpu/distill_8b.py --rehearse   # the same path with tiny sizes on a CPU; writes nothing
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill.engine import EngineSettings
from distill.scale.estimate import estimate_memory, flops_per_token
from distill.scale.hardware import PeakMemory, matmul_flops_per_second
from distill.scale.low_precision import float8_obstacle
from distill.scale.parallel import joined_placement, open_pair
from distill.settings import DistillSettings, StepRecord
from distill.training.data import PackedWindows
from distill.training.loop import distill_pair
from minipuzzle.architecture.families import FAMILIES, read_architecture
from minipuzzle.architecture.model import Architecture
from minipuzzle.architecture.quantities import GIB
from minipuzzle.devices import Device
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.files.safetensors_files import ShardWriter
from minipuzzle.runtime.compute import Compute

FAMILY = FAMILIES["nemotron_h"]
TEACHER_PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
STUDENT_PATTERN = "M-M-M-*-M-M-M-*-M-M-M-*-M-M-M-*-M-M-M-M-"
WIDTHS = {
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "chunk_size": 128,
    "vocab_size": 131072,
}
WARM_UP_STEPS, TIMED_STEPS = 3, 5
GOAL_FRACTION = 0.4
SPARE_FRACTION = 0.1  # of the GPU's memory, for what the estimate does not know


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two architectures, how long the sequences are, and where it runs."""

    teacher: dict[str, Any]
    student: dict[str, Any]
    settings: DistillSettings
    device: str

    @property
    def architectures(self) -> tuple[Architecture, Architecture]:
        """Of student and teacher."""
        return read_architecture(self.student), read_architecture(self.teacher)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way of running a case."""

    tokens_per_second: float
    achieved_flops: float
    peak_bytes: int


def config_of(pattern: str, widths: dict[str, int]) -> dict[str, Any]:
    """A config.json with a layer pattern."""
    layers = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    return {**FAMILY.tiny_config, **widths, **layers}


def full_case(device: str, memory_bytes: int) -> Case:
    """The deepest pair, cut alike in both models, whose estimate leaves some of the memory free."""
    settings = DistillSettings(
        tokens=(WARM_UP_STEPS + TIMED_STEPS) * 8192,
        sequence_length=8192,
        batch_sequences=1,
        dtype="bfloat16",
        save_every=10**6,
    )
    engine = EngineSettings(activation_checkpointing=True)
    for kept_fraction in (step / 20 for step in range(20, 0, -1)):
        patterns = (p[: math.ceil(len(p) * kept_fraction)] for p in (TEACHER_PATTERN, STUDENT_PATTERN))
        teacher, student = (config_of(pattern, WIDTHS) for pattern in patterns)
        case = Case(teacher=teacher, student=student, settings=settings, device=device)
        needed = estimate_memory(*case.architectures, settings, on_cpu=device == "cpu", engine=engine).total_bytes
        if needed < (1 - SPARE_FRACTION) * memory_bytes:
            return case
    raise SystemExit("this GPU is too small for two layers of the public widths")


def rehearsal_case() -> Case:
    """The same path in seconds on a CPU."""
    settings = DistillSettings(
        tokens=(WARM_UP_STEPS + TIMED_STEPS) * 64, sequence_length=64, batch_sequences=1, save_every=10**6
    )
    teacher, student = (config_of(pattern, {}) for pattern in ("M-M*-M-", "M-M*-"))
    return Case(teacher=teacher, student=student, settings=settings, device="cpu")


def write_random_checkpoint(folder: Path, config: dict[str, Any], device: str) -> Checkpoint:
    """A checkpoint of small random matrices, and of ones elsewhere, in bfloat16."""
    folder.mkdir()
    architecture = read_architecture(config)
    write_json(folder / "config.json", FAMILY.write(config, architecture))
    writer = ShardWriter(folder)
    torch.manual_seed(0)
    for tensor in architecture.tensors():
        values = torch.ones(tensor.shape, dtype=torch.bfloat16, device=device)
        if len(tensor.shape) > 1:
            values.normal_(std=0.02)
        writer.add(tensor.name, values.cpu())
    writer.finish()
    return Checkpoint.open(folder)


def measure(case: Case, student: Checkpoint, teacher: Checkpoint, engine: EngineSettings) -> Measured:
    """Some steps of the real loop; the best after the warm-up counts."""
    records: list[StepRecord] = []
    settings = case.settings
    tokens = torch.randint(3, student.architecture.vocabulary, (settings.tokens + 1,))
    data = PackedWindows([tokens.tolist()], sequence_length=settings.sequence_length)
    compute = Compute(device=case.device, dtype=settings.dtype)
    with joined_placement(compute, engine) as placement, tempfile.TemporaryDirectory() as folder:
        memory = PeakMemory(placement.compute.own_device)
        pair = open_pair(
            student=student,
            teacher=teacher,
            placement=placement,
            engine=engine,
        )
        distill_pair(
            pair=pair,
            data=data,
            settings=settings,
            folder=Path(folder),
            engine=engine,
            on_step=records.append,
        )
        peak_bytes = memory.extra_bytes()
    best = max(record.tokens_per_second for record in records[WARM_UP_STEPS:])
    # What is computed twice to save memory is no progress: the share counts each product once.
    useful = flops_per_token(student.architecture, teacher.architecture, settings, EngineSettings())
    return Measured(tokens_per_second=best, achieved_flops=best * useful, peak_bytes=peak_bytes)


def ways_of(device: str) -> dict[str, EngineSettings]:
    """What is compared on a device, by name."""
    base = EngineSettings(activation_checkpointing=True)
    ways = {"bf16": base, "bf16, compiled": replace(base, compile_layers=True)}
    obstacle = float8_obstacle(Device(device))
    if obstacle is not None:
        print(f"FP8 is left out: {obstacle}")
        return {"bf16": base} if device == "cpu" else ways
    return ways | {name.replace("bf16", "FP8"): replace(engine, fp8=True) for name, engine in ways.items()}


def render(case: Case, results: dict[str, Measured], matmul_flops: float, device_name: str) -> str:
    """The result page."""
    student, teacher = case.architectures
    rows = "\n".join(
        f"| {name} | {found.tokens_per_second:,.0f} | {found.achieved_flops / matmul_flops:.1%} | "
        f"{found.peak_bytes / GIB:.1f} |"
        for name, found in results.items()
    )
    return f"""# Distillation on one GPU

Written by `examples/gpu/distill_8b.py` on {device_name}, torch {torch.__version__}.

Teacher {teacher.num_parameters / 1e9:.2f} B parameters `{teacher.pattern}`,
student {student.num_parameters / 1e9:.2f} B `{student.pattern}`.
Random weights, one sequence of {case.settings.sequence_length:,} tokens a step, activation checkpointing. The GPU
multiplies 8192 x 8192 matrices at {matmul_flops / 1e12:.0f} TFLOP/s in bfloat16; the goal is {GOAL_FRACTION:.0%} of
that. What is computed twice to save memory is not counted as work done.

| | tokens/s | share of the bfloat16 matrix rate | peak memory, GiB |
|---|---:|---:|---:|
{rows}
"""


def main() -> None:
    """Measure and write the page, or rehearse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU; writes nothing")
    is_rehearsal = parser.parse_args().rehearse
    if not is_rehearsal and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --rehearse runs the same path with tiny sizes on a CPU")
    device = torch.device("cpu" if is_rehearsal else "cuda")
    if is_rehearsal:
        case, device_name, size = rehearsal_case(), "a CPU", 256
    else:
        properties = torch.cuda.get_device_properties(device)
        case, device_name, size = full_case("cuda", properties.total_memory), properties.name, 8192
    matmul_flops = matmul_flops_per_second(Compute(device=device.type, dtype=case.settings.dtype), size)
    results: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        student = write_random_checkpoint(Path(folder) / "student", case.student, case.device)
        teacher = write_random_checkpoint(Path(folder) / "teacher", case.teacher, case.device)
        for name, engine in ways_of(case.device).items():
            results[name] = measure(case, student, teacher, engine)
            print(name, results[name], flush=True)
            gc.collect()
    page = render(case, results, matmul_flops, device_name)
    if not is_rehearsal:
        Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
