"""Recovery against tokens: the embedded hybrid, pruned to 75 % of its memory and distilled with several seeds.

Distance from the teacher is measured on held-out text that neither training nor pruning saw, in two ways: KL from the
teacher, and loss on the text itself. The gap that pruning opened is what a pruned model loses against its teacher. The
run leaves its folder behind and continues there where it was stopped; recovery_curve.md and .png lie beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from distill.run import DistillRequest, distill_checkpoint
from distill.states.records import read_metrics
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import evaluation_windows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.evaluate import documents_within, evaluate
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_model, load_tokenizer
from minipuzzle.show.bars import drawn_bar
from minipuzzle.workflows.demo import EXAMPLE, DemoSettings, DemoTexts, demo_distillation, prune_demo

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
TOKENS = 200_000
MEMORY, SAMPLES = "75%", 64  # as the demo prunes
EVALUATIONS = 7
HELD_OUT_TOKENS = 8_000  # of each domain


@dataclass(frozen=True, kw_only=True)
class Point:
    """Tokens trained on, and nats per token on held-out text: KL from the teacher, and loss."""

    tokens: int
    kl: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The teacher's loss on the held-out text, and a curve by seed; all start at the pruned model."""

    teacher_loss: float
    curves: dict[int, list[Point]]

    def closed_loss(self, point: Point) -> float:
        """Share of the loss that pruning added and that is gone again."""
        pruned = next(iter(self.curves.values()))[0]
        return (pruned.loss - point.loss) / (pruned.loss - self.teacher_loss)

    def closed_kl(self, point: Point) -> float:
        """Share of the KL that is gone."""
        return 1 - point.kl / next(iter(self.curves.values()))[0].kl


def held_out_file(folder: Path, teacher: Checkpoint) -> Path:
    """The first tokens of both held-out domains as one file."""
    path = folder / "heldout.jsonl"
    tokenizer, texts = load_tokenizer(teacher.folder), DemoTexts()
    documents = [
        text
        for domain in texts.domains.values()
        for text in documents_within(tokenizer, read_documents([domain]), HELD_OUT_TOKENS)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def measure(folder: Path) -> Recovery:
    """Prune once, distil with every seed."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher, texts = Checkpoint.open(EXAMPLE / "model"), DemoTexts()
    held_out = held_out_file(folder, teacher)
    if not (folder / "pruned").is_dir():
        small = DemoSettings(memory=MEMORY, samples=SAMPLES)
        prune_demo(teacher, folder / "pruned", texts, small, Compute(progress=drawn_bar))
    student = Checkpoint.open(folder / "pruned")
    curves = {}
    for seed in SEEDS:
        out = folder / f"seed-{seed}"
        settings = demo_distillation(TOKENS, seed=seed, evaluations=EVALUATIONS)
        if not out.is_dir():
            request = DistillRequest(
                student=student,
                teacher=teacher,
                data=(texts.distillation,),
                validation=(held_out,),
                settings=settings,
                out=out,
            )
            result = distill_checkpoint(
                request,
                on_step=lambda record: print(record, flush=True) if record.validation_kl is not None else None,
            )
            before = {"kl": result.validation_kl_before, "loss": result.validation_loss_before}
            (out / "before.json").write_text(json.dumps(before), encoding="utf-8")
        start = Point(tokens=0, **json.loads((out / "before.json").read_text(encoding="utf-8")))
        curves[seed] = [start] + [
            Point(tokens=line["tokens"], kl=line["validation_kl"], loss=line["validation_loss"])
            for line in read_metrics(out)
            if "validation_kl" in line
        ]
    tokenizer = load_tokenizer(teacher.folder)
    windows = evaluation_windows(tokenizer, read_documents([held_out]), sequence_length=settings.sequence_length)
    teacher_loss = evaluate(load_model(teacher), teacher.family, windows).loss
    return Recovery(teacher_loss=teacher_loss, curves=curves)


def _spread(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values)


def draw(recovery: Recovery) -> None:
    """Both curves with every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    kl_axes, loss_axes = figure.subplots(1, 2)
    for seed, curve in recovery.curves.items():
        tokens = [point.tokens / 1000 for point in curve]
        kl_axes.plot(tokens, [point.kl for point in curve], marker="o", markersize=3, label=f"seed {seed}")
        loss_axes.plot(tokens, [point.loss for point in curve], marker="o", markersize=3)
    loss_axes.axhline(recovery.teacher_loss, color="0.5", linestyle=":", label="teacher")
    kl_axes.set(xlabel="thousand tokens", ylabel="KL to the teacher, nats/token", ylim=(0, None))
    loss_axes.set(xlabel="thousand tokens", ylabel="held-out loss, nats/token")
    for axes in (kl_axes, loss_axes):
        axes.legend(frameon=False)
    figure.savefig(HERE / "recovery_curve.png", dpi=130)


def render(recovery: Recovery) -> str:
    """The result page."""
    rows = []
    for points in zip(*recovery.curves.values(), strict=True):
        kl, kl_spread = _spread([point.kl for point in points])
        loss, loss_spread = _spread([point.loss for point in points])
        closed_kl, closed_loss = (mean(map(way, points)) for way in (recovery.closed_kl, recovery.closed_loss))
        rows.append(
            f"| {points[0].tokens:,} | {kl:.4f} ± {kl_spread:.4f} | {closed_kl:.1%} "
            f"| {loss:.4f} ± {loss_spread:.4f} | {closed_loss:.1%} |"
        )
    table = "\n".join(rows)
    ends = [curve[-1] for curve in recovery.curves.values()]
    seeds = ", ".join(f"{recovery.closed_loss(end):.1%}" for end in ends)
    settings = demo_distillation(TOKENS)
    return f"""# Recovery of the embedded hybrid against tokens

Written by `make bench-recovery-curve` on {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}.
The model is pruned to {MEMORY} of its memory as in the demo and distilled with the demo's settings: {settings.form} KL
at temperature {settings.temperature:g}, rate {settings.learning_rate:g}, {settings.batch_sequences} sequences of
{settings.sequence_length} tokens a step. Seeds ({len(recovery.curves)}) order the text. Mean ± standard deviation on
{2 * HELD_OUT_TOKENS:,} tokens of held-out speeches and code; the teacher's loss there is {recovery.teacher_loss:.4f}.

| tokens | KL to the teacher | of it closed | held-out loss | of the loss gap closed |
|---:|---:|---:|---:|---:|
{table}

At the end the seeds closed {seeds} of the gap in loss.

![both curves](recovery_curve.png)
"""


def main() -> None:
    """Measure, and write page and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where models are kept")
    recovery = measure(parser.parse_args().folder)
    draw(recovery)
    page = render(recovery)
    (HERE / "recovery_curve.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
