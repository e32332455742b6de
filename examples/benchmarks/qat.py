"""Training through FP8 rounding: what the FP8 export of the embedded hybrid loses without it and with it.

Student and teacher are the embedded model: whatever distance from the teacher an export has, its rounding made. Without
``qat`` there is nothing to learn, so that column is the plain export.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.engine import EngineSettings
from distill.run import distill_checkpoint
from distill.settings import DistillSettings
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.corpus import evaluation_windows, read_documents, sample_windows
from minipuzzle.evaluate import documents_within, evaluate
from minipuzzle.export.reader import load_any_model
from minipuzzle.export.run import ExportRequest, export_checkpoint
from minipuzzle.models import load_tokenizer

EXAMPLE = Path(__file__).parents[1] / "tiny_hybrid"
TRAINING_TOKENS = 64 * 1024
EVALUATION_TOKENS = 32 * 1024


@dataclass(frozen=True, kw_only=True)
class QatResult:
    """KL to the BF16 teacher on held-out speeches, nats/token, and agreement on the next token, of FP8 exports."""

    plain_kl: float
    qat_kl: float
    plain_agreement: float
    qat_agreement: float


def run(folder: Path, training_tokens: int = TRAINING_TOKENS, evaluation_tokens: int = EVALUATION_TOKENS) -> QatResult:
    """Train, export and evaluate in a folder."""
    teacher = Checkpoint.open(EXAMPLE / "model")
    settings = DistillSettings(
        tokens=training_tokens,
        sequence_length=256,
        batch_sequences=4,
        micro_batch_sequences=4,
        learning_rate=3e-5,
        weight_decay=0.0,
    )
    distill_checkpoint(
        student=teacher,
        teacher=teacher,
        data=[EXAMPLE / "text" / "distillation.jsonl"],
        settings=settings,
        engine=EngineSettings(qat="fp8"),
        out=folder / "trained",
    )
    found = {}
    for name, source in (("plain", teacher), ("qat", Checkpoint.open(folder / "trained"))):
        found[name] = _export_and_evaluate(source, teacher, folder / f"{name}-fp8", evaluation_tokens)
    (plain_kl, plain_agreement), (qat_kl, qat_agreement) = found["plain"], found["qat"]
    return QatResult(plain_kl=plain_kl, qat_kl=qat_kl, plain_agreement=plain_agreement, qat_agreement=qat_agreement)


def _export_and_evaluate(source: Checkpoint, teacher: Checkpoint, out: Path, num_tokens: int) -> tuple[float, float]:
    tokenizer = load_tokenizer(teacher.folder)
    calibration = read_documents([EXAMPLE / "text" / "calibration.jsonl"])
    token_ids = sample_windows(tokenizer, calibration, num_samples=32, sequence_length=256)
    export_checkpoint(source, out, ExportRequest(scheme="fp8", verifies=False), calibration_token_ids=token_ids)
    held_out = documents_within(tokenizer, read_documents([EXAMPLE / "text" / "heldout_speeches.jsonl"]), num_tokens)
    windows = evaluation_windows(tokenizer, held_out, sequence_length=256)
    model, against = load_any_model(Checkpoint.open(out)), load_any_model(teacher)
    result = evaluate(model, teacher.family, windows, against=against)
    assert result.kl is not None and result.top1_agreement is not None
    return result.kl, result.top1_agreement


def render(result: QatResult) -> str:
    """The result page."""
    return f"""# FP8 exports without and with training through FP8 rounding

Written by `make bench-qat`, torch {torch.__version__}. The embedded hybrid, distilled from itself on
{TRAINING_TOKENS:,} tokens with `--qat fp8`, then exported to FP8 like the model without that training; held-out
speeches, {EVALUATION_TOKENS:,} tokens, against the BF16 model.

| FP8 export | KL, nats/token | same best next token |
|---|---:|---:|
| without | {result.plain_kl:.5f} | {result.plain_agreement:.2%} |
| with `--qat fp8` | {result.qat_kl:.5f} | {result.qat_agreement:.2%} |

{1 - result.qat_kl / result.plain_kl:.0%} of the distance is gone. The training takes its input scales from each batch,
the export from its calibration text.
"""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        page = render(run(Path(work)))
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
