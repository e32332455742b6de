"""Refitting routed experts: each on the tokens that the student's router gives it, several side by side.

The inputs of an expert's projection count times the weight that the router gives them. Experts that share tokens would
each make up for the same missing part, so what all of them found is taken with one common factor: the one that leaves
least missing of held-out tokens, at most 1.

Shape suffixes: N tokens of a batch, R those of one expert, F its neurons, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from importance.refits.streams import Streams, at_least_float32, summed_over
from minipuzzle.cut.compensation import RefitSums, refit
from minipuzzle.runtime.processes import Processes


@dataclass(frozen=True, kw_only=True)
class ExpertsRefit:
    """Changes ``[H, F]`` by the names of the experts' projections, and how much less is missing of held-out tokens."""

    changes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gain: float = 0.0


def refit_experts(
    streams: Streams, layer_idx: int, module: nn.Module, names: Sequence[str], processes: Processes
) -> ExpertsRefit:
    """The changes of some experts of a layer. ``names``: of their projections in its module, in the experts' order."""
    weights = {name: module.get_submodule(name).get_parameter("weight") for name in names}
    sums = {
        name: [RefitSums.zeros(weight_HF.shape[1], len(weight_HF), weight_HF.device) for _ in range(2)]
        for name, weight_HF in weights.items()
    }
    with _tokens_of(module, names) as routed:
        for part in streams.missing(layer_idx, module):
            missing_NH, weights_N = part.missing.flatten(0, 1), part.weights.flatten()
            held_N = part.held_out.to(weights_N.device).repeat_interleave(part.weights.shape[1])
            for name, (tokens_R, inputs_RF) in routed.items():
                for tokens, is_own_R in zip(sums[name], (~held_N[tokens_R], held_N[tokens_R]), strict=True):
                    rows_R = tokens_R[is_own_R]
                    tokens.add(inputs_RF[is_own_R], missing_NH[rows_R], weights_N[rows_R])
    fitted_changes, changes = {}, {}
    for name, (fitted, held_out) in sums.items():
        found = refit(summed_over(processes, fitted), summed_over(processes, held_out))
        if found.change is not None:
            changes[name], fitted_changes[name] = found.change, fitted.change(found.ridge)
    factor, gain = _common_factor(streams, layer_idx, module, fitted_changes, processes)
    return ExpertsRefit(changes={name: factor * change for name, change in changes.items()} if gain else {}, gain=gain)


def _common_factor(
    streams: Streams, layer_idx: int, module: nn.Module, changes: Mapping[str, torch.Tensor], processes: Processes
) -> tuple[float, float]:
    """The share of all changes at once that leaves least missing of held-out tokens, and how much less that is."""
    along, square = (torch.zeros((), dtype=torch.float64, device=streams.student_BTH.device) for _ in range(2))
    held_out = streams.is_held_out_B.nonzero()[:, 0].tolist()
    with _tokens_of(module, list(changes)) as routed:
        for part in streams.missing(layer_idx, module, held_out) if changes else ():
            missing_NH, weights_N1 = part.missing.flatten(0, 1).double(), part.weights.flatten()[:, None]
            added_NH = torch.zeros_like(missing_NH)
            for name, (tokens_R, inputs_RF) in routed.items():
                added_NH.index_add_(0, tokens_R, inputs_RF.double() @ changes[name].T)
            along += (weights_N1 * missing_NH * added_NH).sum()
            square += (weights_N1 * added_NH.square()).sum()
    dot, norm = (float(processes.sum_(value)) for value in (along, square))
    if dot <= 0 or norm == 0:
        return 0.0, 0.0
    factor = min(1.0, dot / norm)
    return factor, factor * (2 * dot - factor * norm)


@contextmanager
def _tokens_of(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """For each of some experts, by the name of its projection: which tokens it has been given of the latest batch, and
    the inputs of its projection times the routing weight of each. Experts without tokens are missing."""
    routed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    given: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []

    def see_batch(_experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        _tokens, experts_NK, weights_NK = args
        routed.clear()
        for name in names:
            tokens_R, places_R = torch.where(experts_NK == int(name.split(".")[-2]))
            given[name] = tokens_R, weights_NK[tokens_R, places_R, None]

    def see_inputs(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def see(_projection: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tokens_R, weights_R1 = given[name]
            routed[name] = tokens_R, at_least_float32(args[0] * weights_R1)

        return see

    if names:
        parent = module.get_submodule(names[0].rsplit(".", 2)[0])
        handles.append(parent.register_forward_pre_hook(see_batch))
    handles += [module.get_submodule(name).register_forward_pre_hook(see_inputs(name)) for name in names]
    try:
        yield routed
    finally:
        for handle in handles:
            handle.remove()
