"""What dropping experts by each criterion costs, as it is and after the closed-form refit.

The model is ``examples/tiny_moe``'s, scored on the calibration text of both kinds or of code alone. What is left is
compared with it on held-out text that neither its training nor the scoring saw. ``random`` is the mean of three draws.
experts.md lies beside this file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from importance.channels import score_channels
from minipuzzle.cut.expert_criteria import EXPERT, EXPERT_CRITERIA
from minipuzzle.cut.plan import Plan
from minipuzzle.cut.scores import Scores
from minipuzzle.cut.selection import make_plan
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import evaluation_windows, sample_windows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.evaluate import documents_within, evaluate
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import load_model, load_tokenizer
from minipuzzle.workflows.compensation import CutWriter
from minipuzzle.workflows.demo import DemoTexts

PAGE = Path(__file__).with_suffix(".md")
MODEL = Path(__file__).parents[1] / "tiny_moe" / "model"
SHARES = (0.75, 0.5)
WINDOW_TOKENS, NUM_WINDOWS, HELD_OUT_TOKENS = 256, 64, 4_000
NUM_RANDOM = 3
SPECIALIST = 0.75  # of its tokens, from one kind of text


def calibration(checkpoint: Checkpoint, kinds: Sequence[str]) -> torch.Tensor:
    """Windows of the calibration text of some kinds."""
    lines = DemoTexts().calibration.read_text(encoding="utf-8").splitlines()
    texts = [record["text"] for record in map(json.loads, lines) if record["source"] in kinds]
    tokenizer = load_tokenizer(checkpoint.folder)
    return sample_windows(tokenizer, texts, num_samples=NUM_WINDOWS, sequence_length=WINDOW_TOKENS)


def scores_on(checkpoint: Checkpoint, token_ids: torch.Tensor) -> Scores:
    """Experts by all criteria."""
    units, energies = score_channels(LayerStack(checkpoint), token_ids)
    return Scores(layer={"kl": np.zeros(len(checkpoint.architecture.layers))}, units=units, energies=energies)


def plans(checkpoint: Checkpoint, scores: Scores, num_kept: int) -> Iterator[tuple[str, Plan]]:
    """What each criterion keeps, and some random choices."""
    source = checkpoint.architecture
    widths = {layer_idx: {EXPERT: num_kept} for layer_idx in source.layer_indices("moe")}
    random = np.random.default_rng(0)
    shuffled = (
        {key: random.random(len(old)) if key.startswith(f"{EXPERT}.") else old for key, old in scores.units.items()}
        for _ in range(NUM_RANDOM)
    )
    ranked = [(name, scores.ranking_experts_by(name)) for name in EXPERT_CRITERIA]
    for name, by in (*ranked, *(("random", replace(scores, units=units)) for units in shuffled)):
        yield name, make_plan(source, by, kept_layers=range(len(source.layers)), widths=widths)


def specialists(mixed: Scores, code: Scores) -> tuple[int, int]:
    """How many experts get most of their tokens from one kind of text, and how many there are."""
    named = [key for key in mixed.units if key.startswith("expert_frequency.")]
    on_both = np.concatenate([mixed.units[key] for key in named])
    on_code = np.concatenate([code.units[key] for key in named]) / 2  # half of the mixed text is code
    share = on_code / np.maximum(on_both, 1e-9)
    return int(((share > SPECIALIST) | (share < 1 - SPECIALIST)).sum()), len(share)


class Judge:
    """Compares cuts of a model with it on held-out text of each kind."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.teacher = checkpoint, load_model(checkpoint)
        tokenizer = load_tokenizer(checkpoint.folder)
        self.held_out = [
            evaluation_windows(
                tokenizer,
                documents_within(tokenizer, read_documents([path]), HELD_OUT_TOKENS),
                sequence_length=2 * WINDOW_TOKENS,
            )
            for path in DemoTexts().domains.values()
        ]

    def kl(self, plan: Plan, windows_to_mend_on: torch.Tensor | None) -> list[float]:
        """Nats a token on speeches and on code, of a cut as it is or refitted on some windows."""
        with tempfile.TemporaryDirectory() as folder:
            writer = CutWriter(
                checkpoint=self.checkpoint, token_ids=windows_to_mend_on, compute=Compute(), may_choose=False
            )
            writer.write(plan, Path(folder))
            student = load_model(Checkpoint.open(Path(folder)))
            family = self.checkpoint.family
            return [evaluate(student, family, windows, against=self.teacher).kl or 0.0 for windows in self.held_out]

    def table(self, scores: Scores, windows_to_mend_on: torch.Tensor | None) -> Iterator[str]:
        """Rows of all choices: criterion, then for each share of experts the KL on both kinds, plain and refitted."""
        found: dict[str, list[list[float]]] = {}
        num_experts = self.checkpoint.architecture.width(EXPERT) or 0
        for share in SHARES:
            for criterion, plan in plans(self.checkpoint, scores, round(num_experts * share)):
                row = self.kl(plan, None)
                row += [] if windows_to_mend_on is None else self.kl(plan, windows_to_mend_on)
                found.setdefault(f"{criterion} {share}", []).append(row)
                print(criterion, share, row, flush=True)
        for criterion in (*EXPERT_CRITERIA, "random"):
            rows = [np.mean(found[f"{criterion} {share}"], axis=0) for share in SHARES]
            yield f"| {criterion} | {' | '.join(f'{value:.4f}' for row in rows for value in row)} |"


def main() -> None:
    """Measure and write the page; what stands below its tables stays."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    checkpoint = Checkpoint.open(MODEL)
    both, code = (calibration(checkpoint, kinds) for kinds in (("speeches", "code"), ("code",)))
    judge, mixed, of_code = Judge(checkpoint), scores_on(checkpoint, both), scores_on(checkpoint, code)
    special, num_experts = specialists(mixed, of_code)
    lines = [
        "# Which experts to keep",
        "",
        "KL to the source in nats a token on held-out speeches and code, before any training. Written by `experts.py`,",
        f"whose docstring says what is compared; {special} of {num_experts} experts get three quarters of their tokens",
        "or more from one kind.",
        "",
        "Scored and refitted on speeches and code:",
        "",
        "| criterion | 75 %: speeches | code | refit: speeches | code "
        "| 50 %: speeches | code | refit: speeches | code |",
        "|---|---|---|---|---|---|---|---|---|",
        *judge.table(mixed, both),
        "",
        "Scored on code alone, not refitted:",
        "",
        "| criterion | 75 %: speeches | code | 50 %: speeches | code |",
        "|---|---|---|---|---|",
        *judge.table(of_code, None),
    ]
    below = PAGE.read_text(encoding="utf-8").partition("\n## ") if PAGE.is_file() else ("", "", "")
    PAGE.write_text("\n".join(lines) + "\n" + "".join(below[1:]), encoding="utf-8")


if __name__ == "__main__":
    main()
