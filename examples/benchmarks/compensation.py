"""What the closed-form refit makes up of cuts, before any distillation: KL to the source on held-out text.

Each cut of the embedded hybrid, and with --smollm2 the cut of examples/smollm2 (its model folder and its texts), is
evaluated as it is cut, refitted, and refitted with neurons and key-value groups chosen for that. Calibration text is
never held-out text. Rows that the work folder holds are not measured again; compensation.md lies beside this file.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from importance.channels import score_channels
from minipuzzle.cut.scores import Scores
from minipuzzle.cut.selection import make_plan
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import evaluation_windows, sample_windows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.quality.evaluate import combine, documents_within, evaluate
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import load_model, load_tokenizer
from minipuzzle.workflows.compensation import CutWriter
from minipuzzle.workflows.demo import EXAMPLE, DemoTexts

PAGE = Path(__file__).with_suffix(".md")
SCORED_WINDOWS = 64  # that units are chosen on as published
HELD_OUT_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class Material:
    """A model, its text, and how many windows of how many tokens a cut is mended on."""

    model: Path
    calibration: Path
    held_out: Sequence[Path]
    held_out_tokens: int  # of each file
    num_windows: int
    window_tokens: int


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A row: the layers that go, and the widths that all layers with an axis keep."""

    name: str
    dropped: tuple[int, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)


HYBRID = (
    Cut(name="the demo's: 3 layers dropped, FFN 512 -> 384", dropped=(8, 12, 24), widths={"ffn": 384}),
    Cut(name="FFN 512 -> 384", widths={"ffn": 384}),
    Cut(name="FFN 512 -> 256", widths={"ffn": 256}),
    Cut(name="one of two KV groups", widths={"kv_group": 1}),
    Cut(name="Mamba heads 8 -> 6", widths={"ssm_head": 6}),
    Cut(name="Mamba heads 8 -> 4", widths={"ssm_head": 4}),
)
SMOLLM2 = (Cut(name="SmolLM2-135M: FFN 1,536 -> 1,408, KV groups 3 -> 2", widths={"ffn": 1408, "kv_group": 2}),)


def measure(material: Material, cut: Cut) -> dict[str, float]:
    """KL of a cut as it is, refitted, and refitted with other units; and what the last took."""
    checkpoint = Checkpoint.open(material.model)
    source, tokenizer = checkpoint.architecture, load_tokenizer(checkpoint.folder)
    documents = read_documents([material.calibration])
    token_ids = sample_windows(
        tokenizer, documents, num_samples=material.num_windows, sequence_length=material.window_tokens
    )
    units, energies = score_channels(LayerStack(checkpoint), token_ids[:SCORED_WINDOWS])
    scores = Scores(layer={"kl": np.zeros(len(source.layers))}, units=units, energies=energies)
    kept = [idx for idx in range(len(source.layers)) if idx not in cut.dropped]
    widths = {idx: {a: w for a, w in cut.widths.items() if a in source.layers[idx].sizes} for idx in kept}
    plan = make_plan(source, scores, kept_layers=kept, widths=widths)
    windows = [
        evaluation_windows(
            tokenizer,
            documents_within(tokenizer, read_documents([path]), material.held_out_tokens),
            sequence_length=HELD_OUT_LENGTH,
        )
        for path in material.held_out
    ]
    teacher, found = load_model(checkpoint), {}
    for name, windows_to_mend_on, may_choose in (
        ("plain", None, False),
        ("refit", token_ids, False),
        ("refit and choice", token_ids, True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            writer = CutWriter(
                checkpoint=checkpoint, token_ids=windows_to_mend_on, compute=Compute(), may_choose=may_choose
            )
            record = writer.write(plan, Path(folder))
            found["seconds"], found["left plain"] = (
                time.process_time() - start,
                len(record.layers) - record.num_refitted,
            )
            student = load_model(Checkpoint.open(Path(folder)))
            evaluations = [evaluate(student, checkpoint.family, text, against=teacher) for text in windows]
            found[name] = combine(evaluations).kl or 0.0
            found["held-out tokens"] = sum(text.num_predictions for text in windows)
    return {**found, "tokens": token_ids.numel()}


def page(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The page of all rows."""
    lines = [
        "# Cuts that are mended in closed form",
        "",
        "KL to the source in nats a token on held-out text, without any training. Written by `compensation.py`, whose",
        f"docstring says what is compared; float32, {torch.get_num_threads()} thread of {platform.machine()}, torch "
        f"{torch.__version__}.",
        "",
        "| cut | plain | refit | refit and choice | tokens to mend on | held-out tokens | layers left plain | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        figures = [f"{row[kind]:.4f}" for kind in ("plain", "refit", "refit and choice")]
        counts = [f"{row[what]:,.0f}" for what in ("tokens", "held-out tokens", "left plain", "seconds")]
        lines.append(f"| {' | '.join((name, *figures, *counts))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not measured yet and write the page; what stands below its table stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("recovery_output/compensation"))
    parser.add_argument("--windows", type=int, default=150, help="of 256 tokens, for the hybrid")
    parser.add_argument("--held-out-tokens", type=int, default=16_000, help="of each domain")
    parser.add_argument("--smollm2", type=Path, nargs=2, metavar=("MODEL", "TEXTS"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file, texts = arguments.folder / "rows.json", DemoTexts()
    rows = read_json(file) if file.is_file() else {}
    hybrid = Material(
        model=EXAMPLE / "model",
        calibration=texts.calibration,
        held_out=tuple(texts.domains.values()),
        held_out_tokens=arguments.held_out_tokens,
        num_windows=arguments.windows,
        window_tokens=256,
    )
    wanted = [(hybrid, cut) for cut in HYBRID]
    if arguments.smollm2:
        model, folder = arguments.smollm2
        smollm2 = Material(
            model=model,
            calibration=folder / "calibration.jsonl",
            held_out=[folder / f"heldout_{domain}.jsonl" for domain in ("speeches", "wikipedia", "code")],
            held_out_tokens=1_000,
            num_windows=96,
            window_tokens=512,
        )
        wanted += [(smollm2, cut) for cut in SMOLLM2]
    for material, cut in wanted:
        if cut.name not in rows:
            rows[cut.name] = measure(material, cut)
            write_json(file, rows)
            print(cut.name, rows[cut.name], flush=True)
    below = PAGE.read_text(encoding="utf-8").partition("\n## ") if PAGE.is_file() else ("", "", "")
    PAGE.write_text(page(rows) + "".join(below[1:]), encoding="utf-8")


if __name__ == "__main__":
    main()
