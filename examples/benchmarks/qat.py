"""Training through FP8 rounding: what an FP8 export loses when the student was distilled without it and with it.

The embedded hybrid is pruned and distilled as in the demo, once plainly and once with ``qat``, on the same text in the
same order; both students are exported to FP8 and compared with the teacher, as BF16 and as FP8. The run leaves its
folder behind and continues there where it was stopped; qat.md lies beside this file.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.engine import EngineSettings
from distill.run import distill_checkpoint
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.commands.demo import EXAMPLE, DemoTexts, demo_distillation, prune_demo
from minipuzzle.corpus import EvaluationWindows, evaluation_windows, read_documents, sample_windows
from minipuzzle.evaluate import Evaluation, documents_within, evaluate
from minipuzzle.export.reader import load_any_model
from minipuzzle.export.run import ExportRequest, export_checkpoint
from minipuzzle.models import load_tokenizer

MEMORY, SAMPLES = "75%", 64  # as the demo prunes
TOKENS = 200_000
WINDOW_TOKENS = 256
EVALUATION_TOKENS = 16_000  # of each domain
WAYS = {"plain": EngineSettings(), "qat": EngineSettings(qat="fp8")}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A model on held-out text, nats per token."""

    kl: float
    loss: float
    agreement: float


def run(folder: Path) -> dict[tuple[str, str], Loss]:
    """Prune once, distil in both ways, export both; losses by way and format."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher, texts = Checkpoint.open(EXAMPLE / "model"), DemoTexts()
    if not (folder / "pruned").is_dir():
        prune_demo(teacher, folder / "pruned", texts, MEMORY, SAMPLES, quiet=False)
    tokenizer = load_tokenizer(teacher.folder)
    calibration = read_documents([texts.calibration])
    calibration_ids = sample_windows(tokenizer, calibration, num_samples=SAMPLES, sequence_length=WINDOW_TOKENS)
    held_out = [
        document
        for domain in texts.domains.values()
        for document in documents_within(tokenizer, read_documents([domain]), EVALUATION_TOKENS)
    ]
    windows = evaluation_windows(tokenizer, held_out, sequence_length=WINDOW_TOKENS)
    found = {}
    for way, engine in WAYS.items():
        trained, exported = folder / way, folder / f"{way}-fp8"
        if not trained.is_dir():
            distill_checkpoint(
                student=Checkpoint.open(folder / "pruned"),
                teacher=teacher,
                data=[texts.distillation],
                settings=demo_distillation(TOKENS),
                engine=engine,
                out=trained,
            )
        if not exported.is_dir():
            request = ExportRequest(scheme="fp8", verifies=False)
            export_checkpoint(Checkpoint.open(trained), exported, request, calibration_token_ids=calibration_ids)
        for name, path in (("BF16", trained), ("FP8", exported)):
            found[way, name] = _measured(path, teacher, windows)
    return found


def _measured(path: Path, teacher: Checkpoint, windows: EvaluationWindows) -> Loss:
    result: Evaluation = evaluate(
        load_any_model(Checkpoint.open(path)), teacher.family, windows, against=load_any_model(teacher)
    )
    assert result.kl is not None and result.top1_agreement is not None
    return Loss(kl=result.kl, loss=result.loss, agreement=result.top1_agreement)


def render(found: dict[tuple[str, str], Loss]) -> str:
    """The result page."""
    titles = {"plain": "without", "qat": "with `--qat fp8`"}
    table = "\n".join(
        f"| {titles[way]} | {name} | {loss.kl:.5f} | {loss.loss:.5f} | {loss.agreement:.2%} |"
        for (way, name), loss in found.items()
    )
    plain, exported, qat = found["plain", "BF16"], found["plain", "FP8"], found["qat", "FP8"]
    settings = demo_distillation(TOKENS)
    return f"""# FP8 exports of students distilled without and with FP8 rounding

Written by `make bench-qat`, torch {torch.__version__}. The embedded hybrid, pruned to {MEMORY} of its memory and
distilled on {TOKENS:,} tokens as in the demo (temperature {settings.temperature:g}, rate {settings.learning_rate:g}),
once plainly and once with `--qat fp8`, on the same text in the same order. Against the teacher in BF16, on
{2 * EVALUATION_TOKENS:,} tokens of held-out speeches and code:

| distilled | as | KL, nats/token | loss, nats/token | same best next token |
|---|---|---:|---:|---:|
{table}

Against the plain BF16 student, its own export stands at {exported.kl - plain.kl:+.5f} nats/token of KL and
{exported.loss - plain.loss:+.5f} of loss; the export of the student distilled with `--qat fp8` stands at
{qat.kl - plain.kl:+.5f} and {qat.loss - plain.loss:+.5f}. The training takes its input scales from each batch, the
export from its calibration text.
"""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where models are kept")
    page = render(run(parser.parse_args().folder))
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
