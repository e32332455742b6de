"""Guarantee: measuring candidates together gives what each gives alone, for less work, in any memory.

Alone means: cut, loaded by transformers as a whole model and evaluated. Streams split only where candidates differ.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from importance.candidates import measure_plans, open_stack, rank_plans, working_set
from importance.prefix_tree import PrefixTree, build_tree
from minipuzzle.cut.plan import Plan, keep_everything
from minipuzzle.cut.surgery import cut_tensors
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.progress import Advance, Progress, silent
from minipuzzle.quality.evaluate import evaluate
from minipuzzle.quality.ranked import RankedPlan, best_first
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import FINAL_NORM, LayerStack
from minipuzzle.runtime.models import build_model, load_model
from tests.support.cuts import plan_with
from tests.support.ranking import candidates, figures_with, measured_figures, padded_windows, quality_of


def measured_alone(checkpoint: Checkpoint, plans: list[Plan], texts: EvaluationWindows) -> list[Quality]:
    """What each candidate gives when it is cut, loaded as a model of its own and evaluated."""
    teacher = load_model(checkpoint)
    found = []
    for plan in plans:
        config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
        student = build_model(config, cut_tensors(checkpoint, plan))
        evaluation = evaluate(student, checkpoint.family, texts, against=teacher, batch=5)
        found.append(replace(evaluation, num_bytes=None, seconds=None))
    return found


@pytest.fixture(scope="module")
def alone(tiny_folder: Path) -> list[Quality]:
    """All candidates of the tiny model, each alone."""
    checkpoint = Checkpoint.open(tiny_folder)
    return measured_alone(checkpoint, candidates(checkpoint), padded_windows())


def open_in(checkpoint: Checkpoint, tree: PrefixTree, *, fits: bool, progress: Progress = silent) -> LayerStack:
    """A stack that keeps the whole model, or one with about the least memory in which the work can be done."""
    if fits:
        return open_stack(checkpoint, tree, padded_windows(), Compute(progress=progress))
    memory_bytes = 0
    while True:
        memory_bytes += 30_000
        with suppress(MinipuzzleError):
            stack = open_stack(
                checkpoint, tree, padded_windows(), Compute(memory_bytes=memory_bytes, progress=progress)
            )
            assert not stack.is_resident
            return stack


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("slice_windows", [None, 2])
def test_measuring_together_equals_measuring_alone(
    tiny_checkpoint: Checkpoint, alone: list[Quality], fits: bool, slice_windows: int | None
) -> None:
    plans = candidates(tiny_checkpoint)
    tree = build_tree(tiny_checkpoint.architecture, [keep_everything(tiny_checkpoint.architecture), *plans])
    stack = open_in(tiny_checkpoint, tree, fits=fits)
    found = measure_plans(stack, tree, plans, padded_windows(), slice_windows=slice_windows)
    for quality, wanted in zip(found, alone, strict=True):
        assert measured_figures(quality) == pytest.approx(measured_figures(wanted), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("fits", [True, False])
def test_each_stream_runs_once_and_weights_are_read_once_a_slice(tiny_checkpoint: Checkpoint, fits: bool) -> None:
    plans = candidates(tiny_checkpoint)[:3]
    tree = build_tree(tiny_checkpoint.architecture, [keep_everything(tiny_checkpoint.architecture), *plans])
    steps: list[int] = []
    announced: list[int] = []

    @contextmanager
    def counted(_description: str, total_steps: int) -> Iterator[Advance]:
        announced.append(total_steps)
        yield steps.append

    stack = open_in(tiny_checkpoint, tree, fits=fits, progress=counted)
    measure_plans(stack, tree, plans, padded_windows(), slice_windows=2)
    # M-M*-M-: 0 runs once; 1 for all but one; then 2 twice; 3 and 4 by who keeps them; 5 and 6 for all four.
    assert tree.num_applications == 1 + 1 + 2 + 2 + 2 + 4 + 4
    assert stack.counters.layer_applications == 3 * tree.num_applications
    assert [sum(steps)] == announced == [tree.num_steps(5)]
    norm_bytes = stack.stored_bytes(FINAL_NORM)
    reads = 1 if fits else 3
    assert stack.counters.weight_bytes_read == reads * (tiny_checkpoint.weight_bytes - norm_bytes) + norm_bytes


def test_equal_plans_share_everything(tiny_checkpoint: Checkpoint) -> None:
    plan = plan_with(tiny_checkpoint, ffn=20)
    tree = build_tree(tiny_checkpoint.architecture, [plan, plan])
    assert (tree.num_streams, tree.num_applications) == (1, 7)


def test_slices_are_sized_to_the_memory(tiny_checkpoint: Checkpoint) -> None:
    tree = build_tree(tiny_checkpoint.architecture, candidates(tiny_checkpoint))
    sizes = []
    for fits in (False, True):
        stack = open_in(tiny_checkpoint, tree, fits=fits)
        needs = working_set(tiny_checkpoint.architecture, tree, padded_windows(), stack.compute)
        sizes.append(stack.sequences_that_fit(needs, 5))
    assert 1 <= sizes[0] < sizes[1] == 5


def test_the_order_follows_the_criterion_and_ties_the_prediction() -> None:
    plan = Plan(source_fingerprint="", kept_layers=(0,))
    table = {
        "a": (quality_of(1.0, 2.0, 0.3, 0.7), 3.0),
        "b": (quality_of(2.0, 1.0, 0.4, 0.6), 2.0),
        "c": (quality_of(3.0, 3.0, 0.2, 0.8), 1.0),
        "d": (quality_of(3.0, 4.0, 0.1, 0.1), 0.5),
    }
    ranked = [
        RankedPlan(plan=replace(plan, figures=figures_with(pattern=name, predicted_loss=predicted)), quality=measured)
        for name, (measured, predicted) in table.items()
    ]

    def names(rank_by: str) -> str:
        return "".join(item.figures.pattern for item in best_first(ranked, rank_by))

    assert names("kl") == "abdc"  # c and d have equal KL; d is predicted to lose less
    assert names("loss") == "bacd"
    # ranks by accuracy b a c d, by agreement c a b d: a 1 + 1, b 0 + 2, c 2 + 0 are equal, then by prediction
    assert names("mean-rank") == "cbad"


def test_ranking_returns_the_best_first(tiny_checkpoint: Checkpoint) -> None:
    plans = candidates(tiny_checkpoint)[:3]
    ranked = rank_plans(tiny_checkpoint, plans, padded_windows())
    divergences = [item.kl for item in ranked]
    assert divergences == sorted(divergences) and len(ranked) == len(plans)


# KL of leaving out each layer of the embedded hybrid, as `make bench-ranking` measures it (three digits).
LAYER_KL = {
    "mamba": [2.851, 0.058, 0.056, 0.062, 0.048, 0.055, 0.049, 0.065, 0.17, 0.085, 0.064],
    "attention": [0.071, 0.016, 0.261, 0.043],
    "mlp": [0.109, 0.013, 0.009, 0.008, 0.009, 0.01, 0.009, 0.011, 0.024, 0.036, 0.076],
}


@pytest.fixture(scope="module")
def hybrid() -> Checkpoint:
    """The embedded model."""
    return Checkpoint.open(Path(__file__).parents[2] / "examples" / "tiny_hybrid" / "model")


@pytest.fixture(scope="module")
def hybrid_candidates(hybrid: Checkpoint) -> list[Plan]:
    """The sixty cuts of least added-up KL that drop the worst layers of each kind, up to half of them."""
    source = hybrid.architecture
    worst_first = {
        kind: sorted(zip(values, source.layer_indices(kind), strict=True)) for kind, values in LAYER_KL.items()
    }
    found = []
    for numbers in itertools.product(*(range(len(layers) // 2 + 1) for layers in worst_first.values())):
        dropped = [item for n, layers in zip(numbers, worst_first.values(), strict=True) for item in layers[:n]]
        kept_layers = set(range(len(source.layers))) - {layer_idx for _kl, layer_idx in dropped}
        found.append((sum(kl for kl, _layer_idx in dropped), tuple(sorted(kept_layers))))
    return [replace(keep_everything(source), kept_layers=kept_layers) for _kl, kept_layers in sorted(found)[1:61]]


def test_sixty_candidates_share_most_of_the_work(hybrid: Checkpoint, hybrid_candidates: list[Plan]) -> None:
    source = hybrid.architecture
    tree = build_tree(source, [keep_everything(source), *hybrid_candidates])
    # Alone, each candidate runs beside the source model, which KL and agreement need.
    alone_applications = sum(len(plan.kept_layers) + len(source.layers) for plan in hybrid_candidates)
    assert len(hybrid_candidates) == 60
    assert tree.num_applications <= 0.4 * alone_applications


@pytest.mark.slow
def test_sixty_candidates_of_the_hybrid_measure_as_alone(hybrid: Checkpoint, hybrid_candidates: list[Plan]) -> None:
    ids = torch.randint(4096, (1, 129), generator=torch.Generator().manual_seed(0))
    texts = EvaluationWindows(token_ids=ids[:, :-1], labels=ids[:, 1:], num_bytes=1)
    tree = build_tree(hybrid.architecture, [keep_everything(hybrid.architecture), *hybrid_candidates])
    found = measure_plans(open_stack(hybrid, tree, texts), tree, hybrid_candidates, texts)
    for quality_together, wanted in zip(found, measured_alone(hybrid, hybrid_candidates, texts), strict=True):
        assert measured_figures(quality_together) == pytest.approx(measured_figures(wanted), rel=1e-5, abs=1e-5)


JOB = """
import json, sys
from pathlib import Path
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.cut.plan import keep_everything
from importance.prefix_tree import build_tree
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.processes import joined_processes
from importance.candidates import measure_plans, open_stack
from tests.support.ranking import candidates, measured_figures, padded_windows

checkpoint = Checkpoint.open(Path(sys.argv[1]))
plans = candidates(checkpoint)
tree = build_tree(checkpoint.architecture, [keep_everything(checkpoint.architecture), *plans])
with joined_processes("cpu") as processes:
    stack = open_stack(checkpoint, tree, padded_windows(), Compute().among(processes))
    found = measure_plans(stack, tree, plans, padded_windows(), slice_windows=1)
    figures = [measured_figures(quality) for quality in found]
    record = {"found": figures, "applications": stack.counters.layer_applications}
    Path(sys.argv[2], f"{processes.rank}.json").write_text(json.dumps(record))
"""


@pytest.mark.slow
def test_processes_share_the_windows_and_agree(tiny_folder: Path, alone: list[Quality], tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [str(tmp_path / "job.py"), str(tiny_folder), str(tmp_path)]
    subprocess.run([*torchrun, *arguments], check=True, timeout=240, env=environment)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["found"] == second["found"]
    assert first["applications"] * 2 == second["applications"] * 3  # of five windows, three and two
    for figures, wanted in zip(first["found"], alone, strict=True):
        assert figures == pytest.approx(measured_figures(wanted), rel=1e-5, abs=1e-5)
