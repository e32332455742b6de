"""Ranking 60 candidates of the embedded hybrid: together, with shared prefixes, against each alone.

Alone, a candidate is cut, loaded as a model of its own and evaluated beside the source model, which KL and agreement
need. Same tokens, one process, one thread; CPU seconds, because other programs may run. Then the noise of each ranking
criterion: how well the order on one half of the tokens agrees with the order on the other half.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from importance.candidates import measure_plans, open_stack
from importance.prefix_tree import build_tree
from minipuzzle.architecture.memory import Deployment
from minipuzzle.cut.plan import Plan, keep_everything
from minipuzzle.cut.scores import Scores, read_scores
from minipuzzle.cut.selection import make_plan, rank_layers
from minipuzzle.cut.surgery import cut_tensors
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import EvaluationWindows, sample_windows, windows_of_tokens
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.evaluate import evaluate
from minipuzzle.quality.ranked import RANK_BY, RankedPlan, best_first
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.models import build_model, load_model, load_tokenizer
from minipuzzle.search.request import SearchRequest
from minipuzzle.workflows.choosing.compare import Problem

EXAMPLE = Path(__file__).parents[1] / "tiny_hybrid"
PAGE = Path(__file__).with_suffix(".md")
NUM_CANDIDATES = 60


def depth_candidates(checkpoint: Checkpoint, scores: Scores, number: int = NUM_CANDIDATES) -> list[Plan]:
    """The cuts of least added-up KL among those that drop layers of each kind and narrow nothing."""
    source, layer_kl = checkpoint.architecture, scores.layer["kl"]
    ranked = rank_layers(source, layer_kl)
    found = []
    for dropped in itertools.product(*(range(len(groups) // 2 + 1) for groups in ranked.values())):
        kept = [groups[: len(groups) - n] for groups, n in zip(ranked.values(), dropped, strict=True)]
        kept_layers = sorted(idx for groups in kept for together in groups for idx in together)
        if len(kept_layers) < len(source.layers):
            lost = float(layer_kl.sum() - layer_kl[kept_layers].sum())
            found.append((lost, make_plan(source, scores, kept_layers=kept_layers, widths={})))
    return [plan for _lost, plan in sorted(found, key=lambda item: item[0])[:number]]


def candidate_sets(checkpoint: Checkpoint, scores: Scores) -> dict[str, list[Plan]]:
    """60 candidates as three uses of the ranking have them."""
    request = SearchRequest(memory="75%", metric="kl", min_kept_fraction=0.3, min_ffn_fraction=0.25)
    problem = Problem(checkpoint=checkpoint, scores=scores, target=request, deployment=Deployment(context_tokens=4096))
    at_budget = problem.predicted_plans(NUM_CANDIDATES)
    return {
        "layer counts, one width": depth_candidates(checkpoint, scores),
        "neighbours of the best at 75 %": problem.neighbourhood.of(at_budget[0]),
        "layer counts x 4 FFN widths at 75 %": at_budget,
    }


def measure_alone(checkpoint: Checkpoint, plans: Sequence[Plan], windows: EvaluationWindows) -> list[Quality]:
    """Each candidate as a model of its own."""
    teacher = load_model(checkpoint)
    qualities = []
    for plan in plans:
        config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
        student = build_model(config, cut_tensors(checkpoint, plan))
        qualities.append(evaluate(student, checkpoint.family, windows, against=teacher, batch=8))
    return qualities


def measure_together(checkpoint: Checkpoint, plans: Sequence[Plan], windows: EvaluationWindows) -> list[Quality]:
    """All candidates with shared prefixes."""
    tree = build_tree(checkpoint.architecture, [keep_everything(checkpoint.architecture), *plans])
    return measure_plans(open_stack(checkpoint, tree, windows), tree, plans, windows)


def applications(checkpoint: Checkpoint, plans: Sequence[Plan]) -> tuple[int, int, int]:
    """Layer applications together, alone, and alone without the source model's share."""
    tree = build_tree(checkpoint.architecture, [keep_everything(checkpoint.architecture), *plans])
    of_candidates = sum(len(plan.kept_layers) for plan in plans)
    return tree.num_applications, of_candidates + len(plans) * len(checkpoint.architecture.layers), of_candidates


def largest_difference(found: Sequence[Quality], wanted: Sequence[Quality]) -> float:
    """Over all candidates and figures."""
    figures = ("loss", "kl", "accuracy", "agreement")
    pairs = zip(found, wanted, strict=True)
    return max(abs(float(getattr(a, name)) - float(getattr(b, name))) for a, b in pairs for name in figures)


def order_agreement(one: Sequence[Quality], other: Sequence[Quality], rank_by: str) -> float:
    """Spearman's correlation of the orders that two measurements of the same candidates give."""

    def positions(qualities: Sequence[Quality]) -> np.ndarray:
        ranked = [
            RankedPlan(plan=Plan(source_fingerprint="", kept_layers=(number,)), quality=quality)
            for number, quality in enumerate(qualities)
        ]
        order = [item.plan.kept_layers[0] for item in best_first(ranked, rank_by)]
        return np.argsort(order)

    return float(np.corrcoef(positions(one), positions(other))[0, 1])


def windows_of(checkpoint: Checkpoint, num_windows: int) -> EvaluationWindows:
    """Windows of 256 tokens of the validation text."""
    tokenizer = load_tokenizer(checkpoint.folder)
    documents = read_documents([EXAMPLE / "text" / "validation.jsonl"])
    return windows_of_tokens(
        tokenizer, sample_windows(tokenizer, documents, num_samples=num_windows, sequence_length=257)
    )


def part_of(windows: EvaluationWindows, part: slice) -> EvaluationWindows:
    """Some of the windows."""
    return replace(windows, token_ids=windows.token_ids[part], labels=windows.labels[part])


def write_page(checkpoint: Checkpoint, scores: Scores, num_windows: int) -> None:
    """Measure and write the page beside this script."""
    sets = candidate_sets(checkpoint, scores)
    windows = windows_of(checkpoint, 2 * num_windows)
    first, second = part_of(windows, slice(0, num_windows)), part_of(windows, slice(num_windows, None))
    plans = sets["layer counts, one width"]
    seconds = []
    results = []
    for measure in (measure_together, measure_alone):
        start = time.process_time()
        results.append(measure(checkpoint, plans, first))
        seconds.append(time.process_time() - start)
    together, alone = results
    other_half = measure_together(checkpoint, plans, second)
    count_rows = []
    for name, candidates in sets.items():
        shared, separate, of_candidates = applications(checkpoint, candidates)
        count_rows.append(
            f"| {name} | {len(candidates)} | {shared:,} | {separate:,} | {shared / separate:.0%} "
            f"| {of_candidates:,} | {shared / of_candidates:.0%} |"
        )
    noise_rows = [f"| {rank_by} | {order_agreement(together, other_half, rank_by):.3f} |" for rank_by in RANK_BY]
    PAGE.write_text(
        f"""# Ranking candidates with shared prefixes

Candidates of the embedded hybrid ({checkpoint.architecture.pattern}), float32, one CPU thread. Written by
`{Path(__file__).name}`, whose docstring says what is compared.

## Time and equality

{len(plans)} candidates (layer counts, one width), {together[0].num_tokens:,} tokens.

| | CPU seconds |
|---|---|
| together | {seconds[0]:.1f} |
| each alone | {seconds[1]:.1f} |
| ratio | {seconds[1] / seconds[0]:.1f} |

Largest difference of any loss, KL, accuracy or agreement: {largest_difference(together, alone):.1e}.

## Work

Layer applications on one slice of tokens. A candidate alone needs the source model beside it; the columns on the right
leave that out of what "alone" costs, though not out of what "together" costs.

| candidates | number | together | each alone | share | alone, candidates only | share |
|---|---|---|---|---|---|---|
{chr(10).join(count_rows)}

How much is shared depends on where candidates part: those of different FFN widths part at the first MLP.

## Noise of the criteria

Spearman's correlation between the orders of the {len(plans)} candidates on two halves of {together[0].num_tokens:,}
tokens each. The less noisy a criterion, the nearer to 1.

| `--rank-by` | correlation of the orders |
|---|---|
{chr(10).join(noise_rows)}
"""
    )
    print(PAGE.read_text())


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description="Ranking with shared prefixes against each candidate alone.")
    parser.add_argument("--scores", type=Path, required=True, help="Scores of examples/tiny_hybrid/model.")
    parser.add_argument("--windows", type=int, default=4, help="Windows of 256 tokens for each half.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_page(Checkpoint.open(EXAMPLE / "model"), read_scores(options.scores), options.windows)


if __name__ == "__main__":
    main()
