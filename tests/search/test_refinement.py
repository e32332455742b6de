"""Guarantee: refinement ends where no allowed exchange of layers measures better, and stays within every limit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from importance.candidates import rank_plans
from importance.measure import measure
from minipuzzle.architecture.memory import Deployment
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan, keep_everything
from minipuzzle.cut.selection import make_plan
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.ranked import RankedPlan
from minipuzzle.search.refinement import refine, with_layers
from minipuzzle.search.request import SearchRequest
from minipuzzle.workflows.choosing.compare import ChoosingSettings, Problem, compare
from tests.support.ranking import padded_windows
from tests.support.tiny_models import VOCABULARY, write_tiny_checkpoint

DEPLOYMENT = Deployment(context_tokens=64)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """A random model of eleven layers with scores that say the opposite of what was measured."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("eleven"), pattern="M-M*-M-M*-M"))
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    target = SearchRequest(memory="75%", granularity=16, metric="kl", min_kept_fraction=0.3, keep_layers=(0,))
    return Problem(checkpoint=checkpoint, scores=measure(checkpoint, ids), target=target, deployment=DEPLOYMENT)


def divergence(problem: Problem, plans: list, texts: EvaluationWindows) -> list[float]:  # type: ignore[type-arg]
    ranked = rank_plans(problem.checkpoint, plans, texts)
    return [item.kl for item in ranked]


def test_no_neighbour_of_the_refined_plan_measures_better(problem: Problem) -> None:
    found = compare(problem, padded_windows(), ChoosingSettings(num_candidates=2, refine=True))
    best = found.ranked[0]
    neighbours = problem.neighbourhood.of(best.plan)
    assert neighbours
    assert min(divergence(problem, neighbours, padded_windows())) >= best.kl * (1 - 1e-5)
    start = compare(problem, padded_windows(), ChoosingSettings(num_candidates=2)).ranked[0]
    assert found.refinement is not None
    assert found.refinement.start.kl == pytest.approx(start.kl)
    assert best.kl <= start.kl
    exchanged = set(best.plan.kept_layers) ^ set(start.plan.kept_layers)
    assert found.refinement.layers_exchanged == sorted(exchanged)
    assert found.refinement.dropped_layers_kl is not None
    added_up = found.refinement.dropped_layers_kl[1]
    dropped = problem.source.layers_besides(best.plan.kept_layers)
    assert added_up == pytest.approx(float(np.sum(problem.scores.layer["kl"][list(dropped)])))


def test_a_bad_start_is_left_behind_step_by_step(problem: Problem) -> None:
    def measured(plans: Sequence[Plan]) -> list[RankedPlan]:
        return rank_plans(problem.checkpoint, plans, padded_windows())

    whole = keep_everything(problem.source)
    starts = [replace(whole, kept_layers=(0, 3, *rest)) for rest in itertools.combinations((1, 2, 4, 5, 6, 7), 3)]
    worst = measured([plan for plan in starts if problem.neighbourhood.fits(plan.apply(problem.source))])[-1]
    found = refine(worst, neighbours=problem.neighbourhood.of, measure=measured, rank_by="kl")
    steps = [item.kl for item in found.path]
    assert len(steps) > 1 and steps == sorted(steps, reverse=True)
    layers = [item.plan.kept_layers for item in (worst, *found.measured)]
    assert len(set(layers)) == len(layers)  # nothing is measured twice


def layers_one_exchange_away(problem: Problem, plan: Plan) -> set[tuple[int, ...]]:
    """By brute force: one or two layers come in, none or one goes, the result fits and keeps layer 0."""
    kept, outside = set(plan.kept_layers), problem.source.layers_besides(plan.kept_layers)
    exchanges = [({added}, dropped) for added in outside for dropped in (set[int](), *({idx} for idx in kept))]
    exchanges += [({*pair}, {dropped}) for pair in itertools.combinations(outside, 2) for dropped in kept]
    reached = {tuple(sorted((kept - dropped) | added)) for added, dropped in exchanges}
    plans = {layers: with_layers(problem.source, problem.scores, plan, layers) for layers in reached if 0 in layers}
    return {layers for layers, found in plans.items() if problem.neighbourhood.fits(found.apply(problem.source))}


def has_too_few_of_a_kind(source: Architecture, layers: tuple[int, ...]) -> bool:
    """Whether fewer layers of a kind stay than --min-kept allows, by which attention is not bound."""
    kinds = [source.layers[idx].kind for idx in layers]
    bound = {kind: count for kind, count in source.layer_counts.items() if kind != "attention"}
    return any(kinds.count(kind) < 0.5 * count for kind, count in bound.items())


def test_neighbours_stay_within_budget_and_bounds_and_are_complete(problem: Problem) -> None:
    plan = problem.predicted_plans(1)[0]
    neighbours = problem.neighbourhood.of(plan)
    found = {neighbour.kept_layers for neighbour in neighbours}
    wanted = layers_one_exchange_away(problem, plan)
    assert len(found) == len(neighbours)
    assert found <= wanted
    assert all(has_too_few_of_a_kind(problem.source, layers) for layers in wanted - found)


def test_neighbours_come_in_the_order_of_their_predictions_and_describe_themselves(problem: Problem) -> None:
    neighbours = problem.neighbourhood.of(problem.predicted_plans(1)[0])
    predicted = [neighbour.figures.predicted_loss for neighbour in neighbours if neighbour.figures]
    assert predicted == sorted(predicted)
    for neighbour in neighbours:
        architecture = neighbour.apply(problem.source)
        assert neighbour.figures is not None
        assert neighbour.figures.pattern == architecture.pattern
        assert neighbour.figures.num_parameters == architecture.num_parameters


def test_a_layer_that_comes_in_is_as_narrow_as_the_others(tmp_path: Path, problem: Problem) -> None:
    source, scores = problem.source, problem.scores
    kept_layers = (0, 1, 2, 3, 4, 5)
    plan = make_plan(source, scores, kept_layers=kept_layers, widths={1: {"ffn": 32}, 4: {"ffn": 32}})
    changed = with_layers(source, scores, plan, (0, 1, 2, 3, 6))
    wanted = make_plan(source, scores, kept_layers=(0, 1, 2, 3, 6), widths={1: {"ffn": 32}, 6: {"ffn": 32}})
    assert changed == wanted
    whole = replace(keep_everything(source), kept_layers=(0, 1))
    assert with_layers(source, scores, whole, (0, 2)).kept_units == {}
