"""Guarantee: the per-layer search finds the true optimum, the next best after it, and says so when there is none.

Every choice for every layer is enumerated and built as a whole model; nothing of the programme's own sums is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minipuzzle.architecture.families import FAMILIES, read_architecture
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.architecture.model import Architecture
from minipuzzle.architecture.quantities import format_gib
from minipuzzle.cut.scores import Scores
from minipuzzle.errors import InfeasibleBudgetError
from minipuzzle.search.candidates import Candidate, resized
from minipuzzle.search.engine import find_candidates, plan_of
from minipuzzle.search.request import SearchRequest
from tests.support.scores import random_scores, tiny_architecture

PATTERN = "M-*M-*"
DEPLOYMENT = Deployment(context_tokens=300, weights="nvfp4", kv_cache="fp8")
FFN_WIDTHS, KV_WIDTHS = (32, 48, 64), (1, 2)
Choice = tuple[dict[str, int] | None, ...]  # widths of each layer, None where it goes


def request(**fields: Any) -> SearchRequest:
    widths = {"ffn": ",".join(map(str, FFN_WIDTHS)), "kv_group": "1,2"}
    return SearchRequest(**{"layout": "per-layer", "widths": widths, "min_kept_fraction": 0, **fields})


def all_choices() -> Iterator[Choice]:
    of_kind: dict[str, list[dict[str, int] | None]] = {
        "M": [None, {}],
        "-": [None, *({"ffn": width} for width in FFN_WIDTHS)],
        "*": [None, *({"kv_group": width} for width in KV_WIDTHS)],
    }
    yield from itertools.product(*(of_kind[symbol] for symbol in PATTERN))


def loss_of(source: Architecture, scores: Scores, choice: Choice) -> float:
    total = 0.0
    for idx, widths in enumerate(choice):
        removal = float(scores.layer["mse"][idx])
        if widths is None:
            total += removal
            continue
        for axis, width in widths.items():
            energy = np.sort(scores.units[f"{axis}.{idx}"].astype(np.float64) ** 2)
            total += removal * float(energy[: energy.size - width].sum() / energy.sum())
    return total


def by_brute_force(source: Architecture, scores: Scores, asked: SearchRequest) -> list[tuple[float, Choice]]:
    """All choices within the request, best first."""
    limits, found = asked.limits(source, DEPLOYMENT), []
    for choice in all_choices():
        target = resized(source, {idx: widths for idx, widths in enumerate(choice) if widths is not None})
        counts = [target.layer_counts.get(kind, 0) for kind in source.layer_counts]
        if any(counts[at] < asked.minimum.get(kind, 0) for at, kind in enumerate(source.layer_counts)):
            continue
        if any(counts[at] > asked.maximum.get(kind, 9) for at, kind in enumerate(source.layer_counts)):
            continue
        if any((2 - count) % asked.depth_step for count in counts):
            continue
        if any(choice[idx] is None for idx in asked.keep_layers):
            continue
        fits = memory_breakdown(target, DEPLOYMENT).total_bytes <= limits.memory_bytes
        if fits and target.num_parameters <= limits.num_parameters:
            found.append((loss_of(source, scores, choice), choice))
    return sorted(found, key=lambda pair: pair[0])


def choice_of(candidate: Candidate) -> Choice:
    kept = set(candidate.kept_layers)
    return tuple(candidate.widths_of(idx) if idx in kept else None for idx in range(len(PATTERN)))


REQUESTS: tuple[dict[str, Any], ...] = (
    {"memory": "50%"},
    {"memory": "80%", "params": "70%"},
    {"params": "60%", "minimum": {"attention": 1, "mamba": 1}},
    {"memory": "65%", "keep_layers": (2, 4)},
    {"memory": "70%", "maximum": {"mlp": 1}},
    {"memory": "60%", "depth_step": 2},
)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fields", REQUESTS, ids=str)
def test_the_best_solutions_are_those_of_enumeration(fields: dict[str, Any], seed: int) -> None:
    source = tiny_architecture(PATTERN)
    scores, asked = random_scores(source, seed), request(**fields)
    expected = by_brute_force(source, scores, asked)
    found = find_candidates(source, scores, asked, DEPLOYMENT, max_candidates=5)
    assert [choice_of(candidate) for candidate in found] == [choice for _, choice in expected[:5]]
    for candidate, (loss, _) in zip(found, expected, strict=False):
        assert candidate.predicted_loss == pytest.approx(loss, rel=1e-12)
        candidate.check()


@pytest.mark.parametrize("min_different", [2, 3])
def test_further_solutions_are_the_best_that_differ_enough(min_different: int) -> None:
    source = tiny_architecture(PATTERN)
    scores, asked = random_scores(source, 7), request(memory="60%", diversity=min_different)
    expected: list[Choice] = []
    for _, choice in by_brute_force(source, scores, asked):
        if all(sum(a != b for a, b in zip(choice, other, strict=True)) >= min_different for other in expected):
            expected.append(choice)
    found = find_candidates(source, scores, asked, DEPLOYMENT, max_candidates=4)
    assert [choice_of(candidate) for candidate in found] == expected[: len(found)]
    assert len(found) == min(4, len(expected))


def test_a_budget_that_just_fits_is_used_to_the_last_byte() -> None:
    """Whole numbers decide, not the solver's tolerance: one byte less, and another solution is the best."""
    source, scores = tiny_architecture(PATTERN), random_scores(tiny_architecture(PATTERN), 3)
    best = find_candidates(source, scores, request(memory="70%"), DEPLOYMENT, max_candidates=1)[0]
    exact = request(memory=f"{best.memory_bytes}B")
    below = request(memory=f"{best.memory_bytes - 1}B")
    assert choice_of(find_candidates(source, scores, exact, DEPLOYMENT, max_candidates=1)[0]) == choice_of(best)
    (other,) = find_candidates(source, scores, below, DEPLOYMENT, max_candidates=1)
    assert choice_of(other) == by_brute_force(source, scores, below)[0][1] != choice_of(best)


def test_per_layer_is_never_worse_than_uniform() -> None:
    source = tiny_architecture(PATTERN)
    for seed in range(5):
        scores = random_scores(source, seed)
        uniform = find_candidates(source, scores, replace(request(memory="60%"), layout="uniform"), DEPLOYMENT)[0]
        free = find_candidates(source, scores, request(memory="60%"), DEPLOYMENT, max_candidates=1)[0]
        assert free.predicted_loss <= uniform.predicted_loss + 1e-12


def test_a_per_layer_plan_leaves_what_was_priced() -> None:
    source, scores = tiny_architecture(PATTERN), random_scores(tiny_architecture(PATTERN), 1)
    candidate = find_candidates(source, scores, request(memory="60%"), DEPLOYMENT, max_candidates=1)[0]
    plan = plan_of(source, scores, candidate, metric="mse")
    left = plan.apply(source)
    assert memory_breakdown(left, DEPLOYMENT).total_bytes == candidate.memory_bytes
    assert {layer.sizes["ffn"] for layer in left.layers if layer.kind == "mlp"} <= set(FFN_WIDTHS)
    assert plan.figures is not None
    assert plan.figures.memory_bytes == candidate.memory_bytes and plan.figures.layout == "per-layer"


def test_an_infeasible_budget_names_the_smallest_memory_and_what_binds() -> None:
    source, scores = tiny_architecture(PATTERN), random_scores(tiny_architecture(PATTERN), 0)
    asked = request(memory="45%", minimum={"attention": 2, "mamba": 1})
    smallest = min(
        memory_breakdown(target, DEPLOYMENT).total_bytes
        for choice in all_choices()
        for target in [resized(source, {idx: widths for idx, widths in enumerate(choice) if widths is not None})]
        if target.layer_counts.get("attention", 0) == 2 and target.layer_counts.get("mamba", 0) >= 1
    )
    with pytest.raises(
        InfeasibleBudgetError, match="binds is the lower bound on mamba layers or attention layers"
    ) as caught:
        find_candidates(source, scores, asked, DEPLOYMENT)
    assert f"{format_gib(smallest)} is the least" in caught.value.problem


def test_limits_that_hold_alone_but_not_together_are_said_to_clash() -> None:
    """Two layers must stay of which one is small in memory and the other in parameters."""
    config = {
        **FAMILIES["nemotron_h"].tiny_config,
        "hybrid_override_pattern": "*-*-",
        "num_hidden_layers": 4,
        "intermediate_size": 64,
    }
    source = read_architecture(config)
    layers = list(source.layers)
    layers[0] = layers[0].resized(queries_per_group=8)  # more parameters ...
    layers[2] = layers[2].resized(kv_group=4, queries_per_group=1)  # ... against more cache
    source = replace(source, layers=tuple(layers))
    deployment = Deployment(context_tokens=100_000)
    one_attention = {"keep": {"attention": 1, "mlp": 2}, "layout": "per-layer"}
    alone = [resized(source, {idx: {}, 1: {}, 3: {}}) for idx in (0, 2)]
    memory = [memory_breakdown(model, deployment).total_bytes for model in alone]
    assert memory[0] < memory[1] and alone[0].num_parameters > alone[1].num_parameters
    asked = SearchRequest(memory=f"{memory[0]}B", params=str(alone[1].num_parameters), **one_attention)  # type: ignore[arg-type]
    scores = Scores(layer={"mse": np.ones(4)})
    with pytest.raises(InfeasibleBudgetError, match="not together") as caught:
        find_candidates(source, scores, asked, deployment)
    assert format_gib(memory[1]) in caught.value.problem
