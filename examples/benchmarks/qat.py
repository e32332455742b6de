"""Training through FP8 rounding: what an FP8 export loses when the student was distilled without it and with it.

The embedded hybrid is pruned and distilled as in the demo, once plainly and once with ``qat`` from the first step. The
plain student then learns a little longer at a falling rate, once plainly and once with ``qat``. Students that are
compared saw the same text in the same order; all are measured as BF16 and as FP8. The run leaves its folder behind and
continues there where it was stopped; qat.md lies beside this file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from distill.engine import EngineSettings
from distill.run import DistillRequest, distill_checkpoint
from distill.settings import DistillSettings
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import EvaluationWindows, evaluation_windows, sample_windows
from minipuzzle.export.reader import load_any_model
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.evaluate import documents_within, evaluate
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.show.bars import drawn_bar
from minipuzzle.workflows.demo import EXAMPLE, DemoSettings, DemoTexts, demo_distillation, prune_demo
from minipuzzle.workflows.export import ExportRequest, export_checkpoint

MEMORY, SAMPLES = "75%", 64  # as the demo prunes
TOKENS = 200_000
WINDOW_TOKENS = 256
EVALUATION_TOKENS = 16_000  # of each domain
FINISH_TOKENS = 24 * 1024


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a student is made: which one it begins as, with which rounding, on how much text, and what it is called."""

    title: str
    begins_as: str
    engine: EngineSettings
    settings: DistillSettings


FINISH = replace(
    demo_distillation(FINISH_TOKENS, seed=1), learning_rate=1e-4, min_learning_rate_fraction=0.0, warmup_fraction=0.1
)
PLAIN, QAT = EngineSettings(), EngineSettings(qat="fp8")
WAYS = {
    "plain": Way(title="plainly", begins_as="pruned", engine=PLAIN, settings=demo_distillation(TOKENS)),
    "throughout": Way(title="with `--qat fp8`", begins_as="pruned", engine=QAT, settings=demo_distillation(TOKENS)),
    "longer": Way(title="plainly, then longer plainly", begins_as="plain", engine=PLAIN, settings=FINISH),
    "finish": Way(title="plainly, then longer with `--qat fp8`", begins_as="plain", engine=QAT, settings=FINISH),
}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A model on held-out text, nats per token."""

    kl: float
    loss: float
    agreement: float


def run(folder: Path) -> dict[tuple[str, str], Loss]:
    """Prune once, distil in all ways, export all; losses by way and format."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher, texts = Checkpoint.open(EXAMPLE / "model"), DemoTexts()
    if not (folder / "pruned").is_dir():
        small = DemoSettings(memory=MEMORY, samples=SAMPLES)
        prune_demo(teacher, folder / "pruned", texts, small, Compute(progress=drawn_bar))
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
    for name, way in WAYS.items():
        trained, exported = folder / name, folder / f"{name}-fp8"
        if not trained.is_dir():
            request = DistillRequest(
                student=Checkpoint.open(folder / way.begins_as),
                teacher=teacher,
                data=(texts.distillation,),
                settings=way.settings,
                engine=way.engine,
                out=trained,
            )
            distill_checkpoint(request)
        if not exported.is_dir():
            unverified = ExportRequest(scheme="fp8", verifies=False)
            export_checkpoint(Checkpoint.open(trained), exported, unverified, calibration_token_ids=calibration_ids)
        for stored, path in (("BF16", trained), ("FP8", exported)):
            kept = folder / f"{name}-{stored}.json"
            if not kept.exists():
                kept.write_text(json.dumps(asdict(_measured(path, teacher, windows))), encoding="utf-8")
            found[name, stored] = Loss(**json.loads(kept.read_text(encoding="utf-8")))
    return found


def _measured(path: Path, teacher: Checkpoint, windows: EvaluationWindows) -> Loss:
    result: Quality = evaluate(
        load_any_model(Checkpoint.open(path)), teacher.family, windows, against=load_any_model(teacher)
    )
    assert result.kl is not None and result.agreement is not None
    return Loss(kl=result.kl, loss=result.loss, agreement=result.agreement)


def render(found: dict[tuple[str, str], Loss]) -> str:
    """The result page."""
    table = "\n".join(
        f"| {WAYS[name].title} | {stored} | {loss.kl:.5f} | {loss.loss:.5f} | {loss.agreement:.2%} |"
        for (name, stored), loss in found.items()
    )
    added = {name: found[name, "FP8"].kl - found[name, "BF16"].kl for name in WAYS}
    against_plain = found["finish", "FP8"].kl - found["longer", "BF16"].kl
    settings = demo_distillation(TOKENS)
    return f"""# FP8 exports of students distilled without and with FP8 rounding

Written by `make bench-qat`, torch {torch.__version__}. The embedded hybrid, pruned to {MEMORY} of its memory and
distilled on {TOKENS:,} tokens as in the demo (temperature {settings.temperature:g}, rate {settings.learning_rate:g});
*longer*: on {FINISH.total_steps * FINISH.tokens_per_step:,} tokens more, at a rate that falls from
{FINISH.learning_rate:g} to nothing. Against the teacher in BF16, on {2 * EVALUATION_TOKENS:,} tokens of held-out
speeches and code:

| distilled | stored as | KL, nats/token | loss, nats/token | same best next token |
|---|---|---:|---:|---:|
{table}

Rounding to FP8 adds {added["plain"]:.5f} nats/token to the plain student, {added["throughout"]:.5f} to the one
distilled through it from the first step, {added["longer"]:.5f} to the plain one that learned longer, and
{added["finish"]:.5f} to the one that learned longer through it. The last one's export stands at {against_plain:+.5f}
against the BF16 student that learned longer plainly. The training takes its input scales from each batch, the export
from its calibration text.
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
