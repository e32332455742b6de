"""The closed form that mends a cut: output projections refitted so that the residual stream is right again.

A layer adds ``A W^T`` to the stream of its tokens, with A the inputs of its output projection. R is what the stream
still lacks behind the layer. The change of the projection is the ridge regression of R on A,

    dW = argmin sum_n d_n ||R_n - A_n dW^T||^2 + sum_i ridge_i ||dW_i||^2 = R^T D A (A^T D A + diag(ridge))^-1,

with a ridge towards the old weights and a weight ``d_n`` for each token. Everything that the choice of the ridge, the
choice of channels and the verdict on held-out tokens need follows from the sums ``A^T D A`` and ``A^T D R``. Where
there are fewer tokens than inputs the same solution is found from the tokens themselves, by a system of their size.

Sources: the costs and downdates of removed inputs are those of Optimal Brain Surgeon, for units of several inputs as in
arXiv 2302.04089; what is fitted, the residual stream instead of the layer's own output, is ours.

Shape suffixes: N tokens, I inputs of the projection, H hidden channels, U units, W inputs of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # fractions of each input's sum of squares
_SILENT_SHARE = 1e-12  # of the mean of all inputs: what a silent input's sum of squares counts as
_ROWS_AT_ONCE = 64
_ROUNDS_OF_REMOVAL = 64  # units of one input may go several at a time: the choice is the same


@dataclass(frozen=True, kw_only=True)
class RefitSums:
    """What a refit needs to know of some tokens: float64 sums over them.

    Shapes: ``gram`` is ``A^T D A``, ``cross`` is ``A^T D R``, ``energy`` is the trace of ``R^T D R``.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: torch.Tensor

    @classmethod
    def zeros(cls, num_inputs: int, hidden: int, device: torch.device | str = "cpu") -> RefitSums:
        """The sums over no tokens."""
        shapes: tuple[tuple[int, ...], ...] = ((num_inputs, num_inputs), (num_inputs, hidden), ())
        gram_II, cross_IH, energy = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        return cls(gram=gram_II, cross=cross_IH, energy=energy)

    def add(self, inputs_NI: torch.Tensor, missing_NH: torch.Tensor, weights_N: torch.Tensor) -> None:
        """Add some tokens in place: products in the precision given, sums in float64."""
        roots_N1 = weights_N.sqrt()[:, None]
        weighted_NI, weighted_NH = inputs_NI * roots_N1, missing_NH * roots_N1
        self.gram.add_(weighted_NI.T @ weighted_NI)
        self.cross.add_(weighted_NI.T @ weighted_NH)
        self.energy.add_(weighted_NH.double().square().sum())

    def __add__(self, other: RefitSums) -> RefitSums:
        return RefitSums(
            gram=self.gram + other.gram,
            cross=self.cross + other.cross,
            energy=self.energy + other.energy,
        )

    def regular(self, ridge: float) -> torch.Tensor:
        """``A^T D A`` with the ridge."""
        return self.gram + torch.diag(ridge_of(self.gram.diagonal(), ridge))

    def change(self, ridge: float) -> torch.Tensor:
        """``dW`` ``[H, I]``, zero for silent inputs. ``ridge``: as a fraction of each input's own sum of squares."""
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(self.regular(ridge))).T

    def loss(self, change_HI: torch.Tensor | None = None) -> float:
        """The weighted sum of squares of what is missing, after a change if one is given."""
        if change_HI is None:
            return float(self.energy)
        return float(self.energy + ((self.gram @ change_HI.T - 2 * self.cross) * change_HI.T).sum())

    def loss_with(self, fitted: RefitSums, ridge: float) -> float:
        """The loss after the change that other tokens ask for."""
        return self.loss(fitted.change(ridge))

    def keeping(self, kept_inputs: Sequence[int], weight_HI: torch.Tensor) -> RefitSums:
        """The sums of the same tokens once only some inputs are left: what the others added is missing, too."""
        kept = torch.as_tensor(kept_inputs, device=self.gram.device)
        gone = torch.ones(len(self.gram), dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
        gone_CH = weight_HI.T.to(self.gram)[gone]
        cross_IH = self.cross + self.gram[:, gone] @ gone_CH
        energy = self.energy + ((self.cross + cross_IH)[gone] * gone_CH).sum()
        return RefitSums(gram=self.gram[kept][:, kept], cross=cross_IH[kept], energy=energy)


@dataclass(frozen=True, kw_only=True)
class RefitRows:
    """The tokens of a refit themselves, where they are fewer than the inputs: parts of ``D^1/2 A`` and ``D^1/2 R``."""

    parts: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def inputs(self) -> torch.Tensor:
        """Weighted inputs of all tokens, ``[N, I]`` float64."""
        return torch.cat([inputs_NI.double() for inputs_NI, _ in self.parts])

    @property
    def missing(self) -> torch.Tensor:
        """What is missing of all tokens, weighted, ``[N, H]`` float64."""
        return torch.cat([missing_NH.double() for _, missing_NH in self.parts])

    def add(self, inputs_NI: torch.Tensor, missing_NH: torch.Tensor, weights_N: torch.Tensor) -> None:
        """Add some tokens in place."""
        roots_N1 = weights_N.sqrt()[:, None]
        self.parts.append((inputs_NI * roots_N1, missing_NH * roots_N1))

    def __add__(self, other: RefitRows) -> RefitRows:
        return RefitRows(parts=[*self.parts, *other.parts])

    def change(self, ridge: float) -> torch.Tensor:
        """``dW`` ``[H, I]``, as ``RefitSums.change`` gives it for the same tokens, in their precision."""
        scaled_IN, shares_NH = self._dual(ridge)
        change_HI = torch.empty(
            shares_NH.shape[1], len(scaled_IN), dtype=self.parts[0][0].dtype, device=scaled_IN.device
        )
        for rows_RI, shares_NR in zip(change_HI.split(_ROWS_AT_ONCE), shares_NH.split(_ROWS_AT_ONCE, 1), strict=True):
            rows_RI.copy_((scaled_IN @ shares_NR).T)  # few rows, because wide layers leave little room
        return change_HI

    def _dual(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Two factors of the change, neither of which is as large."""
        inputs_NI = self.inputs
        scaled_IN = inputs_NI.T / ridge_of(inputs_NI.square().sum(0), ridge)[:, None]
        regular_NN = inputs_NI @ scaled_IN
        regular_NN.diagonal().add_(1.0)
        return scaled_IN, torch.cholesky_solve(self.missing, torch.linalg.cholesky(regular_NN))

    def loss_with(self, fitted: RefitRows, ridge: float) -> float:
        """The loss after the change that other tokens ask for, without that change itself."""
        scaled_IN, shares_NH = fitted._dual(ridge)
        return float((self.missing - (self.inputs @ scaled_IN) @ shares_NH).square().sum())

    def loss(self, change_HI: torch.Tensor | None = None) -> float:
        """The weighted sum of squares of what is missing, after a change if one is given."""
        missing_NH = self.missing if change_HI is None else self.missing - self.inputs @ change_HI.T
        return float(missing_NH.square().sum())


def ridge_of(squares_I: torch.Tensor, ridge: float) -> torch.Tensor:
    """The ridge of each input by the sums of squares of all: a fraction of its own, and a trace where it is silent."""
    mean = squares_I.mean()
    return ridge * (squares_I + torch.where(mean > 0, _SILENT_SHARE * mean, 1.0))


Tokens = TypeVar("Tokens", RefitSums, RefitRows)


@dataclass(frozen=True, kw_only=True)
class Refit:
    """The change of a weight, and what is missing of held-out tokens without it and with that of the fitted tokens.

    ``change``: ``[H, I]``; None where no ridge leaves less missing, so that the plain weight should stay.
    """

    change: torch.Tensor | None
    ridge: float
    loss_before: float
    loss_after: float


def refit(fitted: Tokens, held_out: Tokens, ridges: Sequence[float] = RIDGES) -> Refit:
    """Choose the ridge by tokens that were not fitted, and fit all tokens with it."""
    losses = {ridge: held_out.loss_with(fitted, ridge) for ridge in ridges}
    best, before = min(losses, key=lambda ridge: losses[ridge]), held_out.loss()
    change = (fitted + held_out).change(best) if losses[best] < before else None
    return Refit(change=change, ridge=best, loss_before=before, loss_after=losses[best])


def cheapest_to_keep(
    sums: RefitSums, weight_HI: torch.Tensor, *, num_units: int, num_kept: int, ridge: float
) -> tuple[int, ...]:
    """Ascending indices of the units that stay when those go one after another whose loss the others can best make up.

    Units are equal, consecutive shares of the inputs. The cost of unit p, with W its columns after a refit to all
    inputs and G the regular Gram matrix, is ``tr(W_p (G^-1_pp)^-1 W_p^T)``; after each removal W and G^-1 are
    downdated.
    """
    weight_HI = weight_HI.double() + sums.change(ridge)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(sums.regular(ridge)))
    width, left = len(inverse_II) // num_units, torch.arange(num_units, device=inverse_II.device)
    at_once = max(1, (num_units - num_kept) // _ROUNDS_OF_REMOVAL) if width == 1 else 1
    while len(left) > num_kept:
        weight_UWH = weight_HI.T.reshape(len(left), width, -1)
        blocks_UWW = inverse_II.view(len(left), width, len(left), width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        costs_U = (weight_UWH * torch.linalg.solve(blocks_UWW, weight_UWH)).sum((1, 2))
        goes_U = torch.zeros_like(left, dtype=torch.bool)
        goes_U[costs_U.argsort(stable=True)[: min(at_once, len(left) - num_kept)]] = True
        gone, stay = (mask.repeat_interleave(width).nonzero()[:, 0] for mask in (goes_U, ~goes_U))
        shares_CI = torch.linalg.solve(inverse_II[gone][:, gone], inverse_II[gone][:, stay])
        weight_HI = weight_HI[:, stay] - weight_HI[:, gone] @ shares_CI
        inverse_II = inverse_II[stay][:, stay] - inverse_II[stay][:, gone] @ shares_CI
        left = left[~goes_U]
    return tuple(left.tolist())
