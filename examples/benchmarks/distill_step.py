"""Whole distillation steps: speed and memory of ``distill_pair`` against a loop like that of modelopt's KDTrainer.

Both train the same student from the same teacher on the same batches with the same optimiser. The other loop runs
both models to their logits and hands them to modelopt's LogitsDistillationLoss, as KDTrainer does. Each way runs in
processes of its own, because the peak of a process never falls; ways alternate, and the best step of all counts.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from distill.data import PackedWindows
from distill.hardware import PeakMemory
from distill.loop import distill_pair
from distill.optimizers import make_optimizer
from distill.parallel import make_pair
from distill.settings import DistillSettings, StepRecord
from minipuzzle.families import FAMILIES, read_architecture
from minipuzzle.models import build_on_meta

MIB = 2**20
VOCABULARY, HIDDEN = 49152, 256
PATTERNS = {"teacher": "M-M*M-M*", "student": "M-M*M-"}
STEPS, ROUNDS = 3, 2
SETTINGS = DistillSettings(
    tokens=STEPS * 2 * 512, sequence_length=512, batch_sequences=2, micro_batch_sequences=2, save_every=10**6
)


@dataclass(frozen=True, kw_only=True)
class WayResult:
    """Best tokens/s of a step, extra peak memory of training in bytes, and the losses of the steps."""

    tokens_per_second: float
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
        FAMILIES["nemotron_h"].prepare(model)
        built.append(model)
        num_parameters += read_architecture(config).num_parameters
    return built[0], built[1], num_parameters


def windows() -> PackedWindows:
    """Random text, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (SETTINGS.tokens + 1,), generator=generator)
    return PackedWindows([tokens.tolist()], sequence_length=SETTINGS.sequence_length)


def run_ours(teacher: nn.Module, student: nn.Module) -> WayResult:
    """Our loop, whole. Its last step is followed by a save, which copies weights and optimiser."""
    device, records, peaks = torch.device("cpu"), list[StepRecord](), list[int]()
    pair = make_pair(teacher, student, FAMILIES["nemotron_h"], device=device)
    memory = PeakMemory(device)

    def note(record: StepRecord) -> None:
        records.append(record)
        peaks.append(memory.extra_bytes())

    with tempfile.TemporaryDirectory() as folder:
        distill_pair(pair=pair, data=windows(), settings=SETTINGS, folder=Path(folder), on_step=note)
        peaks.append(memory.extra_bytes())
    return WayResult(
        tokens_per_second=max(record.tokens_per_second for record in records),
        peak_bytes=peaks[-3],
        peak_with_save_bytes=peaks[-1],
        losses=tuple(record.loss for record in records),
    )


def run_kd_trainer_style(teacher: nn.Module, student: nn.Module) -> WayResult:
    """Both models to their logits, modelopt's loss without reduction, a mean over tokens, backward, clip, step.

    modelopt's own mean would divide by the vocabulary too.
    """
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    criterion = LogitsDistillationLoss(temperature=SETTINGS.temperature, reduction="none")
    teacher.requires_grad_(False).eval()
    student.train()
    optimizer = make_optimizer(student, SETTINGS)
    data, memory = windows(), PeakMemory(torch.device("cpu"))
    speeds, losses = [], []
    for step_idx in range(STEPS):
        start = time.monotonic()
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
        losses.append(float(loss.detach()))
        del student_logits_BTV, teacher_logits_BTV, loss
        speeds.append(SETTINGS.tokens_per_step / (time.monotonic() - start))
    return WayResult(
        tokens_per_second=max(speeds),
        peak_bytes=memory.extra_bytes(),
        peak_with_save_bytes=memory.extra_bytes(),
        losses=tuple(losses),
    )


WAYS = {"ours": run_ours, "kd_trainer_style": run_kd_trainer_style}


def measure(way: str) -> WayResult:
    """One way in a process of its own."""
    command = [sys.executable, __file__, way]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = json.loads(output.splitlines()[-1])
    return WayResult(**{**fields, "losses": tuple(fields["losses"])})


def render(results: dict[str, list[WayResult]], num_parameters: int) -> str:
    """The result page."""
    speed = {way: max(result.tokens_per_second for result in found) for way, found in results.items()}
    peak = {way: max(result.peak_bytes for result in found) for way, found in results.items()}
    with_save = max(result.peak_with_save_bytes for result in results["ours"])
    pairs = zip(results["ours"][0].losses, results["kd_trainer_style"][0].losses, strict=True)
    difference = max(abs(ours - theirs) for ours, theirs in pairs)
    weight_bytes = 4 * num_parameters
    whole = {way: extra + weight_bytes for way, extra in peak.items()}
    ratio, share = speed["ours"] / speed["kd_trainer_style"], peak["ours"] / peak["kd_trainer_style"]
    rounds = "; ".join(
        f"{ours.tokens_per_second:.0f} / {theirs.tokens_per_second:.0f}"
        for ours, theirs in zip(results["ours"], results["kd_trainer_style"], strict=True)
    )
    return f"""# Whole distillation steps against a KDTrainer-style loop

Written by `make bench-distill` on {os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads,
torch {torch.__version__}.

Teacher `{PATTERNS["teacher"]}` and student `{PATTERNS["student"]}` (Mamba-2, attention, MLP), hidden size {HIDDEN},
vocabulary {VOCABULARY:,}, {num_parameters / 1e6:.0f} M parameters together, random weights, float32; AdamW; one
micro-batch of {SETTINGS.micro_batch_sequences} x {SETTINGS.sequence_length} tokens a step. The other loop is what
modelopt's `KDTrainer` does: both models to their logits, `LogitsDistillationLoss`, mean over tokens. Each way ran
{ROUNDS} times in a process of its own, alternating, {STEPS} steps each; the best step counts.

| | ours | KDTrainer-style | ratio |
|---|---:|---:|---:|
| tokens/s | {speed["ours"]:,.0f} | {speed["kd_trainer_style"]:,.0f} | {ratio:.2f} |
| extra peak memory of training, MiB | {peak["ours"] / MIB:,.0f} | {peak["kd_trainer_style"] / MIB:,.0f} | {share:.2f} |
| the same with both models' weights, MiB | {whole["ours"] / MIB:,.0f} | {whole["kd_trainer_style"] / MIB:,.0f} | \
{whole["ours"] / whole["kd_trainer_style"]:.2f} |

Tokens/s of the best step, round by round, ours / other: {rounds}. Extra memory is what the process held beyond both
models' weights, which it has loaded before. Our saves copy weights and optimiser so that training can go on: with one,
the peak is {with_save / MIB:,.0f} MiB; the other loop saved nothing. Largest difference between the losses of the two
in {STEPS} steps: {difference:.1e}.
"""


def main() -> None:
    """Measure one way, or all of them and write the page."""
    if len(sys.argv) > 1:
        teacher, student, _ = models()
        print(json.dumps(asdict(WAYS[sys.argv[1]](teacher, student))))
        return
    results: dict[str, list[WayResult]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, found in results.items():
            found.append(measure(way))
    page = render(results, models()[2])
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
