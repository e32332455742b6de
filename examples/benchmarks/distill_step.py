"""Whole distillation steps: speed and memory of ``distill_pair`` against a loop like that of modelopt's KDTrainer.

Both train the same student from the same teacher on the same batches with the same optimiser. The other loop runs
both models to their logits and hands them to modelopt's LogitsDistillationLoss, as KDTrainer does. For speed the two
take turns, step by step in one process, so that whatever else the machine does hits both; for memory each has a
process of its own, because the peak of a process never falls.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import nn

from distill.scale.hardware import PeakMemory
from distill.scale.parallel import make_pair
from distill.settings import DistillSettings, OnStep, StepRecord
from distill.training.data import PackedWindows
from distill.training.loop import distill_pair
from distill.training.optimizers import make_optimizer
from minipuzzle.architecture.families import FAMILIES, read_architecture
from minipuzzle.devices import Device
from minipuzzle.runtime.models import build_on_meta

MIB = 2**20
VOCABULARY, HIDDEN = 49152, 256
PATTERNS = {"teacher": "M-M*M-M*", "student": "M-M*M-"}
SPEED_STEPS, MEMORY_STEPS = 10, 3  # not timed: the first, which warms up, and the last, which is followed by a save
SETTINGS = DistillSettings(
    tokens=SPEED_STEPS * 2 * 512, sequence_length=512, batch_sequences=2, micro_batch_sequences=2, save_every=10**6
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """CPU seconds of all threads, and seconds on the clock, of each timed step."""

    ours_cpu: tuple[float, ...]
    other_cpu: tuple[float, ...]
    ours_clock: tuple[float, ...]
    other_clock: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Extra peak memory of training in bytes, the same with a save at the end, and the losses of the steps."""

    peak_bytes: int
    peak_with_save_bytes: int
    losses: tuple[float, ...]


def models() -> tuple[nn.Module, nn.Module, int]:
    """Random teacher and student, the same in every process, and their parameters together."""
    torch.manual_seed(0)
    built, num_parameters = [], 0
    for pattern in PATTERNS.values():
        config = {
            **FAMILIES["nemotron_h"].tiny_config,
            "hybrid_override_pattern": pattern,
            "num_hidden_layers": len(pattern),
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 4 * HIDDEN,
            "num_attention_heads": 8,
            "head_dim": 32,
            "mamba_num_heads": 16,
            "mamba_head_dim": 32,
            "ssm_state_size": 64,
            "chunk_size": 128,
        }
        model = build_on_meta(config, torch.float32).to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, std=0.05)
            if parameter.ndim == 1 and "norm" in name:
                nn.init.ones_(parameter)
        built.append(model)
        num_parameters += read_architecture(config).num_parameters
    return built[0], built[1], num_parameters


def windows() -> PackedWindows:
    """Random text, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (SETTINGS.tokens + 1,), generator=generator)
    return PackedWindows([tokens.tolist()], sequence_length=SETTINGS.sequence_length)


def run_ours(teacher: nn.Module, student: nn.Module, num_steps: int, on_step: OnStep) -> None:
    """Our loop, whole. Its last step is followed by a save, which copies weights and optimiser."""
    pair = make_pair(teacher, student, FAMILIES["nemotron_h"])
    settings = replace(SETTINGS, tokens=num_steps * SETTINGS.tokens_per_step)
    with tempfile.TemporaryDirectory() as folder:
        distill_pair(pair=pair, data=windows(), settings=settings, folder=Path(folder), on_step=on_step)


def kd_trainer_step(teacher: nn.Module, student: nn.Module) -> Callable[[int], float]:
    """A step as a function of its number: both models to their logits, modelopt's loss, backward, clip, update.

    The loss is taken without reduction and averaged over tokens; modelopt's own mean divides by the vocabulary too.
    """
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    criterion = LogitsDistillationLoss(temperature=SETTINGS.temperature, reduction="none")
    teacher.requires_grad_(False).eval()
    student.train()
    optimizer = make_optimizer(student, SETTINGS)
    data = windows()

    def step(step_idx: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.learning_rate_at(step_idx)
        token_ids_BT, _ = data.batch(step_idx * SETTINGS.batch_sequences, SETTINGS.batch_sequences)
        student_logits_BTV = student(input_ids=token_ids_BT, use_cache=False).logits
        with torch.no_grad():
            teacher_logits_BTV = teacher(input_ids=token_ids_BT, use_cache=False).logits
        loss = criterion(student_logits_BTV, teacher_logits_BTV).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), SETTINGS.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure_speed() -> Speed:
    """Steps of both in turn: the other loop takes one whenever ours has reported one."""
    (teacher, student, _), (other_teacher, other_student, _) = models(), models()
    other_step = kd_trainer_step(other_teacher, other_student)
    seconds: dict[str, list[float]] = {"ours_cpu": [], "other_cpu": [], "ours_clock": [], "other_clock": []}
    started = [time.process_time(), time.perf_counter()]

    def note(way: str) -> None:
        now = [time.process_time(), time.perf_counter()]
        for kind, end, start in zip(("cpu", "clock"), now, started, strict=True):
            seconds[f"{way}_{kind}"].append(end - start)
        started[:] = [time.process_time(), time.perf_counter()]

    def take_turns(record: StepRecord) -> None:
        note("ours")
        other_step(record.step - 1)
        note("other")

    run_ours(teacher, student, SPEED_STEPS, take_turns)
    return Speed(**{name: tuple(times[1:-1]) for name, times in seconds.items()})


def measure_memory(way: str) -> Memory:
    """Some steps of one way."""
    teacher, student, _ = models()
    memory, peaks, losses = PeakMemory(Device("cpu")), list[int](), list[float]()

    def note(record: StepRecord) -> None:
        losses.append(record.loss)
        peaks.append(memory.extra_bytes())

    if way == "ours":
        run_ours(teacher, student, MEMORY_STEPS, note)
        training_peak = peaks[-2]  # a save was begun before the last report
    else:
        step = kd_trainer_step(teacher, student)
        losses = [step(step_idx) for step_idx in range(MEMORY_STEPS)]
        training_peak = memory.extra_bytes()
    return Memory(peak_bytes=training_peak, peak_with_save_bytes=memory.extra_bytes(), losses=tuple(losses))


def in_own_process(part: str, folder: Path) -> dict[str, object]:
    """What this file prints when it is called for this part; kept in ``folder`` until all parts are there."""
    kept = folder / f"{part}.json"
    if not kept.exists():
        command = [sys.executable, __file__, part]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kept.write_text(output.splitlines()[-1], encoding="utf-8")
    found: dict[str, object] = json.loads(kept.read_text(encoding="utf-8"))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def render(speed: Speed, memory: dict[str, Memory], num_parameters: int) -> str:
    """The result page."""
    tokens = SETTINGS.tokens_per_step
    rows = []
    kinds = {"CPU second": (speed.ours_cpu, speed.other_cpu), "second": (speed.ours_clock, speed.other_clock)}
    for kind, (ours, other) in kinds.items():
        ratios = [theirs / mine for mine, theirs in zip(ours, other, strict=True)]
        rows.append(
            f"| tokens a {kind} | {tokens / min(ours):,.0f} | {tokens / min(other):,.0f} "
            f"| {min(other) / min(ours):.2f} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    ours_memory, other_memory = memory["ours"], memory["other"]
    peaks = ours_memory.peak_bytes, other_memory.peak_bytes
    weight_bytes = 4 * num_parameters
    whole = [peak + weight_bytes for peak in peaks]
    losses = zip(ours_memory.losses, other_memory.losses, strict=True)
    difference = max(abs(mine - theirs) for mine, theirs in losses)
    table = "\n".join(rows)
    return f"""# Whole distillation steps against a KDTrainer-style loop

Written by `make bench-distill` on {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}
with {torch.get_num_threads()} thread(s).

Teacher `{PATTERNS["teacher"]}` and student `{PATTERNS["student"]}` (Mamba-2, attention, MLP), hidden size {HIDDEN},
vocabulary {VOCABULARY:,}, {num_parameters / 1e6:.0f} M parameters together, random weights, float32; AdamW; one
micro-batch of {SETTINGS.micro_batch_sequences} x {SETTINGS.sequence_length} tokens a step. The other loop is what
modelopt's `KDTrainer` does: both models to their logits, `LogitsDistillationLoss`, mean over tokens.

The two took turns, step by step in one process; {SPEED_STEPS - 2} steps of each after one that was not timed. Ours is
everything between two reports of the loop, data and metrics included.

| | ours, best step | KDTrainer-style, best step | ratio | step by step: median (range) |
|---|---:|---:|---:|---:|
{table}

Memory, each in a process of its own, {MEMORY_STEPS} steps:

| peak, MiB | ours | KDTrainer-style | ratio |
|---|---:|---:|---:|
| beyond both models' weights | {peaks[0] / MIB:,.0f} | {peaks[1] / MIB:,.0f} | {peaks[0] / peaks[1]:.2f} |
| with them | {whole[0] / MIB:,.0f} | {whole[1] / MIB:,.0f} | {whole[0] / whole[1]:.2f} |

Our saves copy weights and optimiser so that training can go on: with one, our peak beyond the weights is
{ours_memory.peak_with_save_bytes / MIB:,.0f} MiB; the other loop saved nothing. Largest difference between the losses
of the two in {MEMORY_STEPS} steps: {difference:.1e}.
"""


def main() -> None:
    """Measure one part, or all of them and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "part", nargs="?", choices=("speed", "ours", "other"), help="measure this one alone and print it"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("recovery_output/distill_step"),
        help="where parts are kept until all are there",
    )
    options = parser.parse_args()
    if options.part:
        result = measure_speed() if options.part == "speed" else measure_memory(options.part)
        print(json.dumps(asdict(result)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    speed = Speed(**in_own_process("speed", options.folder))  # type: ignore[arg-type]
    memory = {
        way: Memory(**in_own_process(way, options.folder))  # type: ignore[arg-type]
        for way in ("ours", "other")
    }
    page = render(speed, memory, models()[2])
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    for part in ("speed", "ours", "other"):
        (options.folder / f"{part}.json").unlink()
    print(page)


if __name__ == "__main__":
    main()
