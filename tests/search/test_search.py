"""Guarantee: the search finds what exhaustive enumeration finds, and everything it returns fits.

The grid's pricing is array arithmetic; here every candidate is priced one by one from its own architecture.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minipuzzle.architecture.families import FAMILIES, read_architecture
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.architecture.quantities import format_gib
from minipuzzle.cut.scores import Scores
from minipuzzle.cut.selection import keep_best_units
from minipuzzle.errors import InfeasibleBudgetError, MinipuzzleError, NothingToPruneError
from minipuzzle.search.candidates import resized
from minipuzzle.search.costs import Limits
from minipuzzle.search.engine import find_candidates, plan_of
from minipuzzle.search.request import SearchRequest
from minipuzzle.search.space import requested_space
from tests.support.cuts import best_layers
from tests.support.scores import random_scores, tiny_architecture

PATTERN = "M-M*-MM-*-M-"
MOE_FIELDS: dict[str, Any] = {
    "hybrid_override_pattern": "MEM*ME",
    "num_hidden_layers": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
DEPLOYMENTS = (Deployment(), Deployment(context_tokens=1_000_000, batch=3, weights="nvfp4", kv_cache="fp8"))


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize("share", ["55%", "70%", "90%", "99.9%"])
def test_the_candidates_are_exactly_the_undominated_ones_that_fit(share: str, deployment: Deployment) -> None:
    source = tiny_architecture(PATTERN)
    request = SearchRequest(memory=share, granularity=16, min_ffn_fraction=0.25, min_kept_fraction=0.3)
    found = find_candidates(source, random_scores(source), request, deployment)
    space = requested_space(source, request)
    budget_bytes = request.budget_bytes(memory_breakdown(source, deployment).total_bytes)
    scores = random_scores(source).layer["mse"]
    fitting = []
    for point in itertools.product(*space.counts.values(), *space.widths.values()):
        counts = dict(zip(space.counts, point, strict=False))
        kept = best_layers(source, scores, counts)
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
    source = tiny_architecture(PATTERN)
    scores = random_scores(source)
    request = SearchRequest(memory="70%", granularity=16)
    budget_bytes = request.budget_bytes(memory_breakdown(source, deployment).total_bytes)
    for candidate in find_candidates(source, scores, request, deployment):
        target = plan_of(source, scores, candidate, metric="mse").apply(source)
        assert memory_breakdown(target, deployment).total_bytes == candidate.memory_bytes <= budget_bytes
        assert target.num_parameters == candidate.num_parameters


def test_layers_are_ranked_inside_their_kind() -> None:
    """A global ranking would drop both attention layers here; per kind, one of each kind goes."""
    source = tiny_architecture(PATTERN)
    scores = np.array([9, 8, 7, 0.1, 6, 5, 4, 3, 0.2, 2, 1, 9.5])
    counts = {"mamba": 4, "attention": 1, "mlp": 4}
    kept = best_layers(source, scores, counts)
    assert kept == (0, 1, 2, 4, 5, 6, 7, 8, 11)
    globally_best = tuple(sorted(np.argsort(-scores, kind="stable")[: len(kept)]))
    assert kept != globally_best


def test_of_equal_layers_the_later_one_goes_first() -> None:
    source = tiny_architecture(PATTERN)
    kept = best_layers(source, np.ones(len(PATTERN)), {"mamba": 2, "mlp": 1, "attention": 1})
    assert kept == (0, 1, 2, 3)


def test_units_are_ranked_inside_their_group() -> None:
    scores = np.array([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])
    assert keep_best_units(scores, 4) == (0, 1, 2, 5)
    assert keep_best_units(scores, 4, num_groups=2) == (0, 1, 4, 5)
    with pytest.raises(MinipuzzleError, match="groups"):
        keep_best_units(scores, 3, num_groups=2)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_candidate_is_the_best_of_all_subsets(seed: int) -> None:
    """Every subset of the layers at every width is priced and its loss added up, layer by layer."""
    layers = {"hybrid_override_pattern": "M-*M-*-", "num_hidden_layers": 7}
    config = {**FAMILIES["nemotron_h"].tiny_config, **layers, "intermediate_size": 64}
    source = read_architecture(config)
    scores, deployment = random_scores(source, seed), Deployment(context_tokens=500)
    limits = {"memory": "62%", "params": "70%"}
    request = SearchRequest(**limits, granularity=16, min_ffn_fraction=0.25, min_kept_fraction=0)  # type: ignore[arg-type]
    most_bytes = request.budget_bytes(memory_breakdown(source, deployment).total_bytes)
    best = np.inf
    for kept in itertools.chain.from_iterable(itertools.combinations(range(7), size) for size in range(8)):
        for width in (16, 32, 48, 64):
            target = resized(source, {idx: {"ffn": width} if idx in (1, 4, 6) else {} for idx in kept})
            if memory_breakdown(target, deployment).total_bytes > most_bytes:
                continue
            if target.num_parameters > -(-source.num_parameters * 70 // 100):
                continue
            loss = scores.layer["mse"][[idx for idx in range(7) if idx not in kept]].sum()
            for idx in set(kept) & {1, 4, 6}:
                energy = np.sort(scores.units[f"ffn.{idx}"].astype(np.float64) ** 2)
                loss += scores.layer["mse"][idx] * energy[: 64 - width].sum() / energy.sum()
            best = min(best, loss)
    assert find_candidates(source, scores, request, deployment)[0].predicted_loss == pytest.approx(best, rel=1e-12)


def test_all_limits_bounds_and_axes_combine() -> None:
    """All points of a grid over five axes and three kinds, each built and priced as a whole model."""
    source, deployment = tiny_architecture(PATTERN), Deployment(context_tokens=100, batch=2, weights="fp8")
    scores = replace(random_scores(source), units={**random_scores(source).units, "hidden": np.ones(32, np.float32)})
    request = SearchRequest(
        memory="80%",
        params="75%",
        active_params="74%",
        widths={
            "ffn": "32:64:32",
            "ssm_head": "50%:100%",
            "ssm_head_channel": "4,8",
            "kv_group": "1,2",
            "hidden": "24,32",
        },
        minimum={"mamba": 3},
        maximum={"mlp": 4},
        keep_layers=(8, 9),
        depth_step=2,
    )
    space = requested_space(source, request)
    assert space.counts == {"mamba": (3, 5), "attention": (2,), "mlp": (4,)}
    assert space.widths["ssm_head"] == (2, 4)
    limits = request.limits(source, deployment)
    fitting = set()
    for point in itertools.product(*space.counts.values(), *space.widths.values()):
        widths = dict(zip(space.widths, point[3:], strict=True))
        counts = dict(zip(space.counts, point[:3], strict=True))
        kept = best_layers(source, scores.layer["mse"], counts)
        of_layer = {idx: {a: w for a, w in widths.items() if a in source.layers[idx].sizes} for idx in kept}
        target = resized(source, of_layer)
        within_memory = memory_breakdown(target, deployment).total_bytes <= limits.memory_bytes
        if within_memory and target.num_parameters <= limits.num_active_parameters:
            fitting.add(point)
    found = find_candidates(source, scores, request, deployment)
    points = {(*candidate.counts.values(), *candidate.widths.values()) for candidate in found}
    assert points and points == {
        point
        for point in fitting
        if not any(other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in fitting)
    }
    for candidate in found:
        candidate.check()
        assert {8, 9} <= set(candidate.kept_layers)


def test_candidates_that_fit_by_the_search_but_not_by_their_sum_are_refused() -> None:
    source = tiny_architecture(PATTERN)
    (candidate,) = find_candidates(source, random_scores(source), SearchRequest(keep={"mamba": 3}), Deployment())
    limits = Limits(memory_bytes=candidate.memory_bytes - 1)
    with pytest.raises(MinipuzzleError, match="exceeds"):
        replace(candidate, limits=limits).check()
    with pytest.raises(AssertionError, match="counted"):
        replace(candidate, costs=replace(candidate.costs, num_parameters=1)).check()


@pytest.mark.parametrize("min_different", [1, 3, 6])
def test_candidates_differ_in_as_many_layers_as_asked(min_different: int) -> None:
    source = tiny_architecture(PATTERN)
    loose: dict[str, Any] = {"granularity": 16, "min_kept_fraction": 0.2, "min_ffn_fraction": 0.25}
    request = SearchRequest(memory="65%", diversity=min_different, **loose)
    short = Deployment(context_tokens=64)
    found = find_candidates(source, random_scores(source), request, short, max_candidates=4)
    assert len(found) > 1
    for one, other in itertools.combinations(found, 2):
        symbols = [{idx: candidate.widths_of(idx) for idx in candidate.kept_layers} for candidate in (one, other)]
        assert sum(symbols[0].get(idx) != symbols[1].get(idx) for idx in range(len(PATTERN))) >= min_different


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_is_searched_and_its_sums_are_those_of_whole_models(model_type: str, layout: str) -> None:
    source = read_architecture(FAMILIES[model_type].tiny_config)
    scores = Scores(layer={"mse": np.random.default_rng(0).random(len(source.layers))})
    request = SearchRequest(memory="75%", params="90%", layout=layout, granularity=8, min_kept_fraction=0.25)
    found = find_candidates(source, scores, request, Deployment(context_tokens=64, weights="fp8"))
    for candidate in found:
        candidate.check()
        assert (
            candidate.memory_bytes == memory_breakdown(candidate.architecture, candidate.pricing.deployment).total_bytes
        )


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_kv_groups_vary_by_default_in_blocks_of_attention_and_mlp_that_all_engines_would_load(model_type: str) -> None:
    source = read_architecture(FAMILIES[model_type].tiny_config)
    groups = source.width("kv_group")
    assert groups == 2
    for layout in ("uniform", "per-layer"):
        widths = requested_space(source, SearchRequest(memory="75%", layout=layout)).widths
        is_fixed = model_type in ("nemotron_h", "qwen2", "phi3", "granitemoehybrid")
        assert widths.get("kv_group") == (None if is_fixed else (1, 2))
    for request in (
        SearchRequest(memory="75%", width={"kv_group": 2}),
        SearchRequest(memory="75%", min_kept_fraction=1),
    ):
        assert requested_space(source, request).widths.get("kv_group") in (None, (2,))
    assert requested_space(source, SearchRequest(keep={"attention": 1})).widths == {}


def test_experts_are_counted_once_in_total_and_by_their_share_when_active() -> None:
    """A mixture of 8 experts of which a token uses 2: limits on all and on active parameters cut different things."""
    config = {**FAMILIES["nemotron_h"].tiny_config, **MOE_FIELDS}
    source = read_architecture(config)
    one_expert = 2 * 32 * config["moe_intermediate_size"]
    assert source.num_parameters - source.num_active_parameters == 2 * (8 - 2) * one_expert
    request = SearchRequest(params="80%", widths={"expert": "2:8:2"}, min_kept_fraction=1, min_ffn_fraction=1)
    scores = Scores(layer={"mse": np.ones(len(source.layers))})
    best = find_candidates(source, scores, request, Deployment())[0]
    assert best.widths["expert"] < 8
    # Fewer experts save no active parameters but those of the router.
    router = 2 * (8 - best.widths["expert"]) * (32 + 1)
    assert source.num_active_parameters - best.costs.num_active_parameters == router
    with pytest.raises(MinipuzzleError, match="picks 2 a token"):
        find_candidates(source, scores, replace(request, widths={"expert": "1,8"}), Deployment())


def test_lost_heads_are_counted_in_each_group() -> None:
    """Two groups of two heads, all silent ones in the first: one head of each group goes, so a loud one as well."""
    source = tiny_architecture(PATTERN)
    heads = np.array([0.0, 0.0, 2.0, 1.0], np.float32)
    units = {f"ssm_head.{idx}": heads for idx in source.layer_indices("mamba")}
    scores = Scores(layer={"mse": np.ones(len(PATTERN))}, units=units)
    (candidate,) = find_candidates(source, scores, SearchRequest(width={"ssm_head": 2}), Deployment())
    assert candidate.predicted_loss == pytest.approx(5 * 1 / 5)


def test_measured_losses_of_narrower_layers_are_used_and_interpolated() -> None:
    source = tiny_architecture(PATTERN)
    measured = {"mse.ffn.48": np.full(len(PATTERN), 0.1), "mse.ffn.32": np.full(len(PATTERN), 0.4)}
    measured["kl.ffn.32"] = np.full(len(PATTERN), 99.0)  # of another metric than the one that is searched by
    scores = replace(random_scores(source), layer={"mse": np.ones(len(PATTERN))}, variants=measured)
    losses = {}
    for width in (16, 32, 40, 48, 56):
        request = SearchRequest(width={"ffn": width})
        losses[width] = find_candidates(source, scores, request, Deployment())[0].predicted_loss
    # Five MLP layers; removed they cost 1 each, whole 0.
    assert losses == pytest.approx({16: 5 * 0.7, 32: 5 * 0.4, 40: 5 * 0.25, 48: 5 * 0.1, 56: 5 * 0.05})


def test_explicit_targets_give_one_candidate_with_just_these_numbers() -> None:
    source = tiny_architecture(PATTERN)
    request = SearchRequest(keep={"mamba": 3, "attention": 1}, width={"ffn": 40, "ssm_head": 2})
    (candidate,) = find_candidates(source, random_scores(source), request, Deployment())
    assert candidate.architecture.layer_counts == {"mamba": 3, "attention": 1, "mlp": 5}
    assert (candidate.architecture.width("ffn"), candidate.architecture.width("ssm_head")) == (40, 2)


def test_narrowing_costs_more_the_more_the_lost_units_score() -> None:
    source = tiny_architecture(PATTERN)
    even = random_scores(source)
    peaked = {}
    for name, values in even.units.items():
        peaked[name] = np.where(np.arange(values.size) < values.size // 2, values, values * 1e-3)
    request = SearchRequest(width={"ffn": 32})
    (of_even,) = find_candidates(source, even, request, Deployment())
    (of_peaked,) = find_candidates(source, replace(even, units=peaked), request, Deployment())
    assert 0 < of_peaked.predicted_loss < 0.01 * of_even.predicted_loss


def test_an_infeasible_budget_names_the_smallest_feasible_memory() -> None:
    source = tiny_architecture(PATTERN)
    request = SearchRequest(memory="20%", granularity=16)
    with pytest.raises(InfeasibleBudgetError) as caught:
        find_candidates(source, random_scores(source), request, Deployment())
    assert caught.value.exit_code == 3
    assert "‹memory›" in caught.value.hint
    # 3 mamba, 1 attention and 3 mlp layers are the fewest by default, 48 of 64 the narrowest FFN.
    smallest = {idx: {"ffn": 48} if PATTERN[idx] == "-" else {} for idx in (0, 1, 2, 3, 4, 5, 7)}
    needed = memory_breakdown(resized(source, smallest), Deployment())
    assert f"{format_gib(needed.total_bytes)} is the least" in caught.value.problem
    assert all(format_gib(term.num_bytes) in caught.value.problem for term in needed.terms if term.num_bytes)
    assert "lower bound on attention layers" in caught.value.problem


def test_a_bound_that_binds_is_named_and_none_if_none_does() -> None:
    source, scores = tiny_architecture(PATTERN), random_scores(tiny_architecture(PATTERN))

    def problem(**fields: Any) -> str:
        with pytest.raises(InfeasibleBudgetError) as caught:
            find_candidates(source, scores, SearchRequest(granularity=16, **fields), Deployment())
        return caught.value.problem

    all_attention = problem(memory="60%", minimum={"attention": 2})
    assert "binds is the lower bound on attention layers" in all_attention
    assert "no single bound" in problem(memory="0.1%")
    assert "parameters" in problem(params="30%")
    assert "memory" in problem(params="60%", memory="10%")


def test_a_budget_above_the_source_says_that_nothing_needs_pruning() -> None:
    source = tiny_architecture(PATTERN)
    for fields in ({"memory": "100%"}, {"memory": "1TiB"}, {"params": "100%", "memory": "1TiB"}):
        with pytest.raises(NothingToPruneError, match="nothing needs pruning"):
            find_candidates(source, random_scores(source), SearchRequest(**fields), Deployment())  # type: ignore[arg-type]


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
        ({"memory": "50%", "keep_layers": (12,)}, "12"),
        ({"memory": "50%", "minimum": {"mamba": 9}}, "9"),
        ({"memory": "50%", "maximum": {"mamba": 1}, "keep_layers": (0, 2)}, "keep_layers"),
        ({"memory": "50%", "minimum": {"mamba": 4}, "maximum": {"mamba": 3}}, "above"),
        ({"memory": "50%", "widths": {"ffn": "9:1"}}, "range"),
        ({"memory": "50%", "widths": {"ffn": "a,b"}}, "count"),
        ({"memory": "50%", "widths": {"expert": "4"}}, "expert"),
        ({"memory": "50%", "layout": "random"}, "layout"),
        ({"memory": "50%", "layout": "per-layer", "widths": {"hidden": "16,32"}}, "hidden"),
        ({"throughput": 5.0}, "measured times"),
        ({}, "how small"),
    ],
)
def test_an_impossible_request_is_an_error_that_names_it(request_fields: dict[str, Any], word: str) -> None:
    source = tiny_architecture(PATTERN)
    with pytest.raises(MinipuzzleError, match=word):
        find_candidates(source, random_scores(source), SearchRequest(**request_fields), Deployment())
