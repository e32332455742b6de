"""Guarantee: the refit of a projection is the ridge regression that its formula says, however its tokens are summed,
and what it says about tokens that were not fitted is what those tokens say."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from minipuzzle.cut.compensation import RefitRows, RefitSums, cheapest_to_keep, refit, ridge_of

TOKENS, INPUTS, HIDDEN = 60, 12, 5
RIDGE = 0.1
Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def tokens() -> Tokens:
    """Inputs of a projection that lean on each other, what is missing, and the weight of each token."""
    generator = torch.Generator().manual_seed(0)
    mixed, missing, noise = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((TOKENS, INPUTS), (TOKENS, HIDDEN), (INPUTS, INPUTS))
    )
    return mixed @ noise, missing + mixed[:, :HIDDEN], torch.rand(TOKENS, generator=generator).double() + 0.1


def sums_of(inputs: torch.Tensor, missing: torch.Tensor, weights: torch.Tensor) -> RefitSums:
    sums = RefitSums.zeros(inputs.shape[1], missing.shape[1])
    sums.add(inputs, missing, weights)
    return sums


def rows_of(inputs: torch.Tensor, missing: torch.Tensor, weights: torch.Tensor) -> RefitRows:
    rows = RefitRows()
    for start in range(0, len(inputs), 7):
        rows.add(*(part[start : start + 7] for part in (inputs, missing, weights)))
    return rows


def test_a_refit_is_the_least_squares_solution_with_the_ridge_as_further_rows(tokens: Tokens) -> None:
    inputs, missing, weights = tokens
    sums = sums_of(*tokens)
    roots = weights.sqrt()[:, None]
    ridge_rows = torch.diag(ridge_of(sums.gram.diagonal(), RIDGE).sqrt())
    table = torch.cat([inputs * roots, ridge_rows])
    wanted = torch.cat([missing * roots, torch.zeros(INPUTS, HIDDEN)])
    solution = np.linalg.lstsq(table.numpy(), wanted.numpy(), rcond=None)[0]
    np.testing.assert_allclose(sums.change(RIDGE).T.numpy(), solution, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_tokens", [5, 11, TOKENS])
def test_tokens_give_the_same_refit_as_their_sums_to_eight_digits(tokens: Tokens, num_tokens: int) -> None:
    some = [part[:num_tokens] for part in tokens]
    from_sums, from_rows = sums_of(*some).change(RIDGE), rows_of(*some).change(RIDGE)
    torch.testing.assert_close(from_rows, from_sums, rtol=1e-8, atol=1e-10)
    assert rows_of(*some).loss(from_sums) == pytest.approx(sums_of(*some).loss(from_sums), rel=1e-9)


def test_the_loss_of_a_change_is_what_is_missing_after_it(tokens: Tokens) -> None:
    inputs, missing, weights = tokens
    sums = sums_of(*tokens)
    change = torch.full((HIDDEN, INPUTS), 0.03, dtype=torch.float64)
    left = (missing - inputs @ change.T).square().sum(1) @ weights
    assert sums.loss(change) == pytest.approx(float(left), rel=1e-12)
    assert sums.loss() == pytest.approx(float(missing.square().sum(1) @ weights), rel=1e-12)


def test_silent_inputs_keep_their_weights(tokens: Tokens) -> None:
    inputs, missing, weights = tokens
    inputs[:, 3:6] = 0
    for change in (sums_of(inputs, missing, weights).change(RIDGE), rows_of(inputs, missing, weights).change(RIDGE)):
        assert change[:, 3:6].eq(0).all()
        assert change[:, :3].ne(0).all()


def test_where_all_inputs_are_silent_or_nothing_is_missing_nothing_changes(tokens: Tokens) -> None:
    inputs, missing, weights = tokens
    for make in (sums_of, rows_of):
        assert make(inputs, torch.zeros_like(missing), weights).change(RIDGE).eq(0).all()
        assert make(torch.zeros_like(inputs), missing, weights).change(RIDGE).eq(0).all()


def test_sums_of_slices_and_of_processes_add_up(tokens: Tokens) -> None:
    whole, sliced, apart = sums_of(*tokens), RefitSums.zeros(INPUTS, HIDDEN), RefitSums.zeros(INPUTS, HIDDEN)
    for start in range(0, TOKENS, 7):
        sliced.add(*(part[start : start + 7] for part in tokens))
    for rank in range(3):
        apart += sums_of(*(part[rank::3] for part in tokens))
    for other in (sliced, apart):
        torch.testing.assert_close(other.gram, whole.gram, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.change(RIDGE), whole.change(RIDGE), rtol=1e-9, atol=1e-12)
        assert other.loss() == pytest.approx(whole.loss(), rel=1e-12)


def test_sums_of_the_inputs_that_stay_are_those_of_a_cut_layer(tokens: Tokens) -> None:
    inputs, missing, weights = tokens
    weight = torch.arange(HIDDEN * INPUTS).view(HIDDEN, INPUTS).double()
    kept = [0, 2, 3, 7, 11]
    gone = [idx for idx in range(INPUTS) if idx not in kept]
    of_cut = sums_of(inputs[:, kept], missing + inputs[:, gone] @ weight[:, gone].T, weights)
    derived = sums_of(*tokens).keeping(kept, weight)
    for name in ("gram", "cross", "energy"):
        torch.testing.assert_close(getattr(derived, name), getattr(of_cut, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [sums_of, rows_of])
def test_the_ridge_is_chosen_by_held_out_tokens_and_then_all_are_fitted(
    tokens: Tokens, make: Callable[..., RefitSums]
) -> None:
    fitted, held_out = (make(*(part[rows] for part in tokens)) for rows in (slice(0, 16), slice(16, None)))
    ridges = (0.001, 0.1, 1.0, 10.0)
    found = refit(fitted, held_out, ridges)
    assert found.ridge == min(ridges, key=lambda ridge: held_out.loss(fitted.change(ridge)))
    assert found.loss_before == held_out.loss() > found.loss_after
    assert found.change is not None
    torch.testing.assert_close(found.change, sums_of(*tokens).change(found.ridge), rtol=1e-8, atol=1e-10)


def test_a_refit_that_harms_held_out_tokens_changes_nothing(tokens: Tokens) -> None:
    inputs, missing, weights = tokens
    found = refit(sums_of(*tokens), sums_of(inputs, -missing, weights))
    assert found.change is None
    assert found.loss_after >= found.loss_before


@pytest.mark.parametrize("num_units", [INPUTS, 4])
def test_one_unit_goes_whose_absence_costs_least_after_the_best_refit(tokens: Tokens, num_units: int) -> None:
    sums, weight, width = sums_of(*tokens), torch.ones(HIDDEN, INPUTS).double(), INPUTS // num_units
    ridge = ridge_of(sums.gram.diagonal(), RIDGE)

    def penalised_loss(units: tuple[int, ...]) -> float:
        """The loss of the best refit that the ridge of the whole layer leaves."""
        kept = [unit * width + offset for unit in units for offset in range(width)]
        left = sums.keeping(kept, weight)
        start = torch.zeros(HIDDEN, INPUTS).double()
        return _minimum(left, ridge[kept]) + float((ridge * (start - weight).square())[:, _others(kept)].sum())

    kept = cheapest_to_keep(sums, weight, num_units=num_units, num_kept=num_units - 1, ridge=RIDGE)
    choices = list(itertools.combinations(range(num_units), num_units - 1))
    assert kept == min(choices, key=penalised_loss)


def _minimum(sums: RefitSums, ridge: torch.Tensor) -> float:
    change = torch.linalg.solve(sums.gram + torch.diag(ridge), sums.cross).T
    return sums.loss(change) + float((ridge * change.square()).sum())


def _others(kept: list[int]) -> list[int]:
    return [idx for idx in range(INPUTS) if idx not in kept]


def test_copies_go_before_inputs_that_nothing_replaces(tokens: Tokens) -> None:
    inputs, missing, weights = tokens
    inputs[:, 9:] = inputs[:, :3]
    sums = sums_of(inputs, torch.zeros_like(missing), weights)
    weight = torch.ones(HIDDEN, INPUTS).double()
    kept = cheapest_to_keep(sums, weight, num_units=INPUTS, num_kept=9, ridge=1e-6)
    assert {idx % 9 if idx >= 9 else idx for idx in kept} == set(range(9))
