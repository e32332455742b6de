"""Guarantee: the search finds what exhaustive enumeration finds, and everything it returns fits.

The grid's pricing is array arithmetic; here every candidate is priced one by one from its own architecture.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipuzzle.architecture import Architecture
from minipuzzle.errors import InfeasibleBudgetError, MinipuzzleError
from minipuzzle.families import FAMILIES, read_architecture
from minipuzzle.memory import Deployment, memory_breakdown
from minipuzzle.plan import keep_everything
from minipuzzle.scores import Scores, read_scores, write_scores
from minipuzzle.search import SearchRequest, find_candidates, plan_of, requested_space
from minipuzzle.selection import keep_best_layers, keep_best_units, make_plan

PATTERN = "M-M*-MM-*-M-"
DEPLOYMENTS = (Deployment(), Deployment(context_tokens=1_000_000, batch=3, weights="nvfp4", kv_cache="fp8"))


def source_architecture() -> Architecture:
    config = {**FAMILIES["nemotron_h"].tiny_config, "hybrid_override_pattern": PATTERN, "intermediate_size": 64}
    return read_architecture(config)


def random_scores(source: Architecture, seed: int = 0) -> Scores:
    generator = np.random.default_rng(seed)
    units = {}
    for layer_idx, layer in enumerate(source.layers):
        for axis in ("ffn", "ssm_head", "ssm_head_channel", "kv_group"):
            if axis in layer.sizes:
                units[f"{axis}.{layer_idx}"] = generator.random(layer.sizes[axis]).astype(np.float32)
    return Scores(layer={"mse": generator.random(len(source.layers))}, units=units)


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize("share", ["55%", "70%", "90%", "100%"])
def test_the_candidates_are_exactly_the_undominated_ones_that_fit(share: str, deployment: Deployment) -> None:
    source = source_architecture()
    request = SearchRequest(memory=share, granularity=16, min_ffn_fraction=0.25, min_kept_fraction=0.3)
    found = find_candidates(source, random_scores(source), request, deployment)
    space = requested_space(source, request)
    budget_bytes = request.budget_bytes(memory_breakdown(source, deployment).total_bytes)
    scores = random_scores(source).layer["mse"]
    fitting = []
    for point in itertools.product(*space.counts.values(), *space.widths.values()):
        counts = dict(zip(space.counts, point, strict=False))
        kept = keep_best_layers(source, scores, counts)
        layers = tuple(source.layers[idx] for idx in kept)
        layers = tuple(layer.resized(ffn=point[-1]) if layer.kind == "mlp" else layer for layer in layers)
        if memory_breakdown(replace(source, layers=layers), deployment).total_bytes <= budget_bytes:
            fitting.append(point)
    undominated = {
        point
        for point in fitting
        if not any(other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in fitting)
    }
    assert {(*candidate.counts.values(), *candidate.widths.values()) for candidate in found} == undominated
    assert [candidate.predicted_loss for candidate in found] == sorted(c.predicted_loss for c in found)


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_every_plan_fits_when_its_terms_are_added_up_again(deployment: Deployment) -> None:
    source = source_architecture()
    scores = random_scores(source)
    request = SearchRequest(memory="70%", granularity=16)
    budget_bytes = request.budget_bytes(memory_breakdown(source, deployment).total_bytes)
    for candidate in find_candidates(source, scores, request, deployment):
        target = plan_of(source, scores, candidate, metric="mse").apply(source)
        assert memory_breakdown(target, deployment).total_bytes == candidate.memory_bytes <= budget_bytes
        assert target.num_parameters == candidate.num_parameters


def test_layers_are_ranked_inside_their_kind() -> None:
    """A global ranking would drop both attention layers here; per kind, one of each kind goes."""
    source = source_architecture()
    scores = np.array([9, 8, 7, 0.1, 6, 5, 4, 3, 0.2, 2, 1, 9.5])
    counts = {"mamba": 4, "attention": 1, "mlp": 4}
    kept = keep_best_layers(source, scores, counts)
    assert kept == (0, 1, 2, 4, 5, 6, 7, 8, 11)
    globally_best = tuple(sorted(np.argsort(-scores, kind="stable")[: len(kept)]))
    assert kept != globally_best


def test_of_equal_layers_the_later_one_goes_first() -> None:
    source = source_architecture()
    kept = keep_best_layers(source, np.ones(len(PATTERN)), {"mamba": 2, "mlp": 1, "attention": 1})
    assert kept == (0, 1, 2, 3)


def test_units_are_ranked_inside_their_group() -> None:
    scores = np.array([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])
    assert keep_best_units(scores, 4) == (0, 1, 2, 5)
    assert keep_best_units(scores, 4, num_groups=2) == (0, 1, 4, 5)
    with pytest.raises(MinipuzzleError, match="groups"):
        keep_best_units(scores, 3, num_groups=2)


def test_explicit_targets_give_one_candidate_with_just_these_numbers() -> None:
    source = source_architecture()
    request = SearchRequest(keep={"mamba": 3, "attention": 1}, width={"ffn": 40, "ssm_head": 2})
    (candidate,) = find_candidates(source, random_scores(source), request, Deployment())
    assert candidate.architecture.layer_counts == {"mamba": 3, "attention": 1, "mlp": 5}
    assert (candidate.architecture.width("ffn"), candidate.architecture.width("ssm_head")) == (40, 2)


def test_narrowing_costs_more_the_more_the_lost_units_score() -> None:
    source = source_architecture()
    even = random_scores(source)
    peaked = {}
    for name, values in even.units.items():
        peaked[name] = np.where(np.arange(values.size) < values.size // 2, values, values * 1e-3)
    request = SearchRequest(width={"ffn": 32})
    (of_even,) = find_candidates(source, even, request, Deployment())
    (of_peaked,) = find_candidates(source, replace(even, units=peaked), request, Deployment())
    assert 0 < of_peaked.predicted_loss < 0.01 * of_even.predicted_loss


def test_an_infeasible_budget_names_the_smallest_feasible_memory() -> None:
    source = source_architecture()
    request = SearchRequest(memory="20%", granularity=16)
    with pytest.raises(InfeasibleBudgetError, match=r"needs .* GiB \(linear weights") as caught:
        find_candidates(source, random_scores(source), request, Deployment())
    assert caught.value.exit_code == 3
    assert "--memory" in caught.value.hint


@pytest.mark.parametrize(
    ("request_fields", "word"),
    [
        ({"keep": {"moe": 3}}, "moe"),
        ({"keep": {"mamba": 99}}, "99"),
        ({"width": {"ffn": 65}}, "65"),
        ({"width": {"experts": 2}}, "experts"),
        ({"width": {"ssm_head": 3}}, "groups"),
        ({"memory": "12"}, "unit"),
        ({"memory": "150%"}, "share"),
        ({}, "how small"),
    ],
)
def test_an_impossible_request_is_an_error_that_names_it(request_fields: dict[str, Any], word: str) -> None:
    source = source_architecture()
    with pytest.raises(MinipuzzleError, match=word):
        find_candidates(source, random_scores(source), SearchRequest(**request_fields), Deployment())


def test_a_cut_of_heads_without_measured_energies_is_refused() -> None:
    source = source_architecture()
    with pytest.raises(MinipuzzleError, match="energies"):
        make_plan(source, random_scores(source), counts={}, widths={"ssm_head": 2}, metric="mse")


def test_a_plan_that_cuts_nothing_keeps_everything() -> None:
    source = source_architecture()
    widths = {"ffn": 64, "ssm_head": 4}
    plan = make_plan(source, random_scores(source), counts=source.layer_counts, widths=widths, metric="mse")
    assert plan == keep_everything(source)


def test_scores_survive_their_file(tmp_path: Path) -> None:
    variants = {"ffn.32": np.arange(len(PATTERN), dtype=np.float64)}
    scores = replace(random_scores(source_architecture()), metadata={"model_fingerprint": "abc"}, variants=variants)
    write_scores(scores, tmp_path / "scores.safetensors")
    found = read_scores(tmp_path / "scores.safetensors")
    assert found.metadata["model_fingerprint"] == "abc"
    assert all(np.array_equal(found.units[name], values) for name, values in scores.units.items())
    assert np.array_equal(found.layer["mse"], scores.layer["mse"])
    assert np.array_equal(found.variants["ffn.32"], variants["ffn.32"])


def test_scores_of_another_model_or_with_nan_are_refused(tmp_path: Path) -> None:
    source = source_architecture()
    scores = replace(random_scores(source), metadata={"model_fingerprint": "abc"})
    with pytest.raises(MinipuzzleError, match="abc"):
        scores.check_against(source, "def")
    with pytest.raises(MinipuzzleError, match="cover 3 layers"):
        Scores(layer={"mse": np.ones(3)}).check_against(source)
    with pytest.raises(MinipuzzleError, match="NaN"):
        Scores(layer={"mse": np.full(len(PATTERN), np.nan)}).check_against(source)
    broken = tmp_path / "scores.safetensors"
    broken.write_bytes(b"not a score file")
    with pytest.raises(MinipuzzleError, match="not a score file"):
        read_scores(broken)


def test_plain_json_scores_are_accepted(tmp_path: Path) -> None:
    source = source_architecture()
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"layer": {"mse": list(range(len(PATTERN)))}}))
    scores = read_scores(path)
    assert not scores.is_measured_here
    request = SearchRequest(keep={"mamba": 2}, width={"ffn": 32})
    (candidate,) = find_candidates(source, scores, request, Deployment())
    assert candidate.architecture.width("ffn") == 32
