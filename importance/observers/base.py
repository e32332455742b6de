"""What observers of layers share: running sums, and what is taken of an activation.

Shape suffixes: B batch, T tokens, U units, F ffn, H hidden, I inputs of a projection, W inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import linear

from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.runtime.processes import Processes
from minipuzzle.table import Table

Observe = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]  # a forward hook
Modules = Mapping[str, Sequence[str]]  # the names of a layer's modules, by role


@dataclass(kw_only=True)
class Sums:
    """Running float64 sums over samples, under the keys of the score file (``hidden`` still by norm).

    ``squares``: of the means over each sequence. ``means``, ``energies``: of such means and mean squares themselves.
    ``totals``: over the tokens that experts are given, and of tokens.
    """

    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    totals: dict[str, torch.Tensor] = field(default_factory=dict)
    energies: dict[str, torch.Tensor] = field(default_factory=dict)
    num_samples: int = 0

    @staticmethod
    def add_row(sums: dict[str, torch.Tensor], key: str, num_rows: int, row: int, values: torch.Tensor) -> None:
        """Add to one row of the sum under a key, which has as many rows as a layer has experts."""
        if key not in sums:
            sums[key] = torch.zeros(num_rows, *values.shape, dtype=torch.float64)
        sums[key][row] += values.double().cpu()

    @staticmethod
    def add(sums: dict[str, torch.Tensor], key: str, values_BU: torch.Tensor) -> None:
        """Add the values of some samples to the sum under a key."""
        added = values_BU.double().sum(0).cpu()
        sums[key] = sums[key] + added if key in sums else added

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """The sums, exactly, for a file."""
        tables = {"squares": self.squares, "means": self.means, "totals": self.totals, "energies": self.energies}
        arrays = {f"{table}/{key}": total.numpy() for table, sums in tables.items() for key, total in sums.items()}
        return {**arrays, "num_samples": np.array([float(self.num_samples)])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float64]]) -> Sums:
        """The sums that ``to_arrays`` gave, to be continued."""
        sums = cls(num_samples=int(arrays["num_samples"][0]))
        for name, array in arrays.items():
            table, _, key = name.partition("/")
            if key:
                getattr(sums, table)[key] = torch.tensor(array)
        return sums

    def summed_over(self, processes: Processes) -> Sums:
        """The sums of all processes together."""
        if processes.world_size == 1:
            return self
        arrays = self.to_arrays()
        # An expert that got no token in one process has a sum in others only.
        shapes = {
            name: shape
            for found in processes.gather({n: a.shape for n, a in arrays.items()})
            for name, shape in found.items()
        }
        summed = {}
        for name in sorted(shapes):
            array = arrays.get(name)
            own = torch.zeros(shapes[name], dtype=torch.float64) if array is None else torch.tensor(array)
            summed[name] = processes.sum_(own).numpy()
        return Sums.from_arrays(summed)


# Forward hooks of one layer by the names of its modules; one function for each kind of layer.
OBSERVERS: Table[Callable[[Sums, int, LayerSpec, Modules], dict[str, Observe]]] = Table("observer", "observers")


def mean_size(x_BTU: torch.Tensor) -> torch.Tensor:
    """Mean over the sequence of the absolute value, in float32 at least."""
    return x_BTU.abs().mean(dim=1, dtype=torch.promote_types(x_BTU.dtype, torch.float32))


def mean_square(x_BTU: torch.Tensor) -> torch.Tensor:
    """Mean square over the sequence, in float32 at least."""
    return x_BTU.to(torch.promote_types(x_BTU.dtype, torch.float32)).square().mean(dim=1)


def observe_neurons(sums: Sums, axis: str, layer_idx: int) -> Observe:
    """Of the neurons at the input of a projection back."""

    def observe_down_proj(module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        size_BF = mean_size(args[0])
        sums.add(sums.squares, f"{axis}.{layer_idx}", size_BF.square())
        column_norms_F = module.get_parameter("weight").norm(dim=0)
        sums.add(sums.means, f"{axis}_contribution.{layer_idx}", size_BF * column_norms_F)

    return observe_down_proj


def observe_contributions(sums: Sums, shapes: Mapping[str, tuple[int, ...]]) -> Observe:
    """Of groups of inputs of a projection back, equal and side by side: the norm of what each adds through its columns.

    ``shapes``: of the units, by the key of their scores.
    """

    def observe_projection(module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        weight_HI = module.get_parameter("weight")
        for key, shape in shapes.items():
            width = weight_HI.shape[1] // prod(shape)
            sizes = [
                linear(input_BTW, weight_HW)
                .norm(dim=-1, dtype=torch.promote_types(input_BTW.dtype, torch.float32))
                .mean(1)
                for input_BTW, weight_HW in zip(args[0].split(width, -1), weight_HI.split(width, -1), strict=True)
            ]
            sums.add(sums.squares, key, torch.stack(sizes, dim=-1).square().unflatten(-1, shape))

    return observe_projection
