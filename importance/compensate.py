"""Mending a cut without training: each kept layer's output projection refitted to the teacher's residual stream.

The calibration tokens pass the layers of the source model and of its cut form side by side, from first to last. Behind
each layer that stays, from the first cut on, the student's stream differs from the teacher's; the layer's output
projection takes the change that makes up most of the difference (``minipuzzle.cut.compensation``), errors of all layers
below included, and the student's stream moves on through the new weights. One layer is in memory at a time.

A part of the windows is held out of the fits: it chooses each layer's ridge, and a layer whose refit it does not gain
from keeps its plain weights.

Shape suffixes: B windows of a batch, T tokens, H hidden, N tokens of a batch in one list, I inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import nn

from minipuzzle.architecture.layers import HIDDEN
from minipuzzle.architecture.model import Architecture, PlacedTensor
from minipuzzle.cut.compensation import RIDGES, Refit, RefitRows, RefitSums, Tokens, cheapest_to_keep, refit
from minipuzzle.cut.plan import Plan, Units
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import torch_dtype
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack, WorkingSet, largest_layer_bytes
from minipuzzle.runtime.narrowed_layers import LayerCut, NarrowedLayers, layer_cut, prefix_axes
from minipuzzle.runtime.processes import Processes

HELD_OUT_EVERY = 4  # of the windows, one
RIDGE_OF_REMOVAL = 0.1
_SUMS_AT_ONCE = 6  # of fitted and held-out tokens, both, with a ridge, its Cholesky factor and room to work


@dataclass(frozen=True, kw_only=True)
class LayerRefit:
    """What was done to the output projection of one layer of the source model.

    ``ridge``: None where the plain weights stayed. ``has_other_units``: than planned. ``missing_before`` and
    ``missing_after`` are of held-out tokens: the squared distance of the student's stream from the teacher's, in mean
    squares of the teacher's, summed.
    """

    layer_idx: int
    ridge: float | None
    missing_before: float
    missing_after: float
    has_other_units: bool


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """The plan with the units that were chosen, new weights by their names in the cut checkpoint and in its precision,
    and what was done to each layer."""

    plan: Plan
    num_tokens: int
    weights: Mapping[str, torch.Tensor]
    layers: Sequence[LayerRefit]

    @property
    def num_refitted(self) -> int:
        """Layers with new weights; the others gained nothing on held-out text."""
        return sum(layer.ridge is not None for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """A record of the run."""
        return {
            "tokens": self.num_tokens,
            "layers_refitted": self.num_refitted,
            "layers_left_plain": len(self.layers) - self.num_refitted,
            "layers": [asdict(layer) for layer in self.layers],
        }


def output_projections(architecture: Architecture, layer_idx: int) -> tuple[PlacedTensor, ...]:
    """The linear weights through which a layer adds to the stream for every token: all but routed experts'."""
    return tuple(
        placed
        for placed in architecture.layer_tensors(layer_idx)
        if len(placed.spec.dims) == 2 and placed.spec.dims[0] == HIDDEN and not placed.spec.routed
    )


def open_stack(checkpoint: Checkpoint, num_windows: int, num_tokens: int, compute: Compute) -> LayerStack:
    """A layer stack with room for both streams of all windows, and for one layer's sums and their solution.

    Raises: MinipuzzleError if the memory is too small, with the amount that is needed.
    """
    per_process = -(-num_windows // compute.processes.world_size)
    working_set = WorkingSet(num_tokens=num_tokens, num_copies=2 * per_process)
    widest = max(_num_inputs(checkpoint.architecture, idx) for idx, _ in checkpoint.architecture.distinct_layers())
    sums_bytes = 8 * _SUMS_AT_ONCE * widest * min(widest, num_windows * num_tokens)
    # A layer as it is cut may be a copy of its own.
    copy_bytes = largest_layer_bytes(checkpoint.architecture, compute.torch_dtype)
    return working_set.open_stack(checkpoint, compute, extra_bytes=sums_bytes + copy_bytes)


def predict_flops(source: Architecture, num_tokens: int) -> int:
    """What compensation computes at most, if nothing is dropped: three passes, the sums, and a solution for each ridge.

    Attention's scores and Mamba's scans are not counted.
    """
    flops = 0
    for layer_idx, times in source.distinct_layers():
        num_weights = sum(tensor.num_active_elements for tensor in source.layer_tensors(layer_idx))
        width, size = (count := _num_inputs(source, layer_idx)), min(count, num_tokens)
        summing = num_tokens * width * (size + source.hidden)
        solving = (len(RIDGES) + 1) * size * size * (size // 3 + 2 * source.hidden)
        flops += times * 2 * (3 * num_tokens * num_weights + summing + solving)
    return flops


def _num_inputs(architecture: Architecture, layer_idx: int) -> int:
    return sum(placed.shape[1] for placed in output_projections(architecture, layer_idx))


@torch.no_grad()
def compensate(stack: LayerStack, plan: Plan, token_ids_BT: torch.Tensor, *, may_choose: bool = True) -> Compensation:
    """Refit what a plan leaves of the stack's model. Each of several processes takes a share of the windows.

    ``may_choose``: a layer may keep other neurons or key-value groups than planned, equally many, if held-out tokens
    gain. Then the choice is that of Optimal Brain Surgeon (``cheapest_to_keep``) on the student's own activations.
    Routed experts keep their weights.

    Shapes: ``token_ids_BT`` ``[windows, tokens]``.
    Raises: MinipuzzleError for fewer than two windows, or values that are not finite.
    """
    if len(token_ids_BT) < 2 * stack.compute.processes.world_size:
        raise MinipuzzleError(
            f"{len(token_ids_BT)} windows of text cannot be divided into some to fit and some to check the fit",
            "give more text, or ‹no_compensate›",
        )
    walk = _Walk(stack, plan, token_ids_BT, may_choose=may_choose)
    with stack.compute.progress("compensating", stack.num_layers) as advance:
        for layer_idx in range(stack.num_layers):
            walk.take(layer_idx)
            advance(1)
    return Compensation(
        plan=replace(plan, kept_units=walk.kept_units),
        num_tokens=token_ids_BT.numel(),
        weights=walk.weights,
        layers=walk.layers,
    )


class _Walk:
    """The teacher's stream and the student's behind the same layer, and what was found so far."""

    def __init__(self, stack: LayerStack, plan: Plan, token_ids_BT: torch.Tensor, *, may_choose: bool) -> None:
        self.stack, self.plan, self.may_choose, self.processes = stack, plan, may_choose, stack.compute.processes
        self.kept_units = {axis: dict(by_layer) for axis, by_layer in plan.kept_units.items()}
        self.narrowed, self.target = NarrowedLayers(stack), plan.apply(stack.architecture)
        self.weights: dict[str, torch.Tensor] = {}
        self.layers: list[LayerRefit] = []
        every = min(HELD_OUT_EVERY, len(token_ids_BT))
        own = list(self.processes.share(range(len(token_ids_BT))))
        self.is_held_out_B = torch.tensor([window % every == every - 1 for window in own])
        self.num_fitted_tokens = len(token_ids_BT) * token_ids_BT.shape[1] * (every - 1) // every
        self.teacher_BTH = stack.embed(token_ids_BT[own])
        hidden_units = plan.units("hidden", None)
        self.columns = slice(None) if hidden_units is None else list(hidden_units)
        self.student_BTH = self.teacher_BTH if hidden_units is None else self.teacher_BTH[..., self.columns]

    def take(self, layer_idx: int) -> None:
        """Bring both streams behind a layer."""
        source, is_kept = self.stack.architecture, layer_idx in self.plan.kept_layers
        cut = layer_cut(source, self.plan, layer_idx)
        if self.student_BTH is self.teacher_BTH:
            if is_kept and cut == LayerCut(layer_idx=layer_idx):  # nothing was cut so far
                self.stack.apply(layer_idx, self.teacher_BTH, out=self.teacher_BTH)
                return
            self.student_BTH = self.teacher_BTH.clone()
        self.stack.apply(layer_idx, self.teacher_BTH, out=self.teacher_BTH)
        if not is_kept:
            return
        # All processes have the same sums; that their solvers agree to the last bit is not certain.
        found, cut = self.processes.broadcast(self._found(cut))
        self._note(found, cut)
        with self.narrowed.modules([cut]) as (module,):
            if found.change is not None:
                self._change(layer_idx, module, found.change)
            self.stack.apply(layer_idx, self.student_BTH, out=self.student_BTH, module=module)

    def _found(self, cut: LayerCut) -> tuple[Refit, LayerCut]:
        """The refit of a layer, and its cut with the units that were chosen."""
        axis = self._free_axis(cut)
        whole = replace(cut, kept_units=tuple(kept for kept in cut.kept_units if kept[0] != axis))
        with self.narrowed.modules([whole]) as (module,):
            if axis is None:
                return self._refit(cut.layer_idx, module), cut
            found, units = self._choose(cut.layer_idx, module, axis, dict(cut.kept_units)[axis])
        return found, replace(whole, kept_units=(*whole.kept_units, (axis, units)))

    def _free_axis(self, cut: LayerCut) -> str | None:
        """The axis of a layer whose units may be chosen anew: each of them enters the output projection on its own."""
        placed, *others = output_projections(self.stack.architecture, cut.layer_idx)
        ((axis, *_),) = placed.spec.dims[1]
        can_move = axis in prefix_axes(self.stack.architecture.layers[cut.layer_idx])
        if others or not self.may_choose or not can_move or axis not in dict(cut.kept_units):
            return None
        return axis if self.num_fitted_tokens >= placed.shape[1] else None

    def _refit(self, layer_idx: int, module: nn.Module) -> Refit:
        """The change of a layer's output projections, from the smaller of its Gram matrices."""
        linears = self._linears(layer_idx, module)
        width = sum(linear.get_parameter("weight").shape[1] for linear in linears)
        if self.num_fitted_tokens < width:
            return refit(*self._collect(layer_idx, module, linears, RefitRows(), RefitRows()))
        return refit(*self._collect(layer_idx, module, linears, *self._no_sums(width)))

    def _choose(self, layer_idx: int, module: nn.Module, axis: str, planned: Units) -> tuple[Refit, Units]:
        """The refit of those units of a whole layer, the planned ones or the cheapest to keep, that leaves least
        missing of held-out tokens."""
        (linear,) = self._linears(layer_idx, module)
        weight_HI = linear.get_parameter("weight").detach()
        fitted, held_out = self._collect(layer_idx, module, [linear], *self._no_sums(weight_HI.shape[1]))
        num_units = self.stack.architecture.layers[layer_idx].sizes[axis]
        cheapest = cheapest_to_keep(
            fitted, weight_HI, num_units=num_units, num_kept=len(planned), ridge=RIDGE_OF_REMOVAL
        )
        inputs_UW = torch.arange(weight_HI.shape[1]).view(num_units, -1)
        found = []
        for units in dict.fromkeys((planned, cheapest)):
            kept = inputs_UW[list(units)].flatten().tolist()
            found.append((refit(fitted.keeping(kept, weight_HI), held_out.keeping(kept, weight_HI)), units))
        return min(found, key=lambda item: min(item[0].loss_before, item[0].loss_after))

    def _no_sums(self, width: int) -> tuple[RefitSums, RefitSums]:
        """Sums over no tokens: to fit, and held out."""
        hidden, device = self.target.hidden, self.student_BTH.device
        return RefitSums.zeros(width, hidden, device), RefitSums.zeros(width, hidden, device)

    def _collect(
        self, layer_idx: int, module: nn.Module, linears: Sequence[nn.Module], fitted: Tokens, held_out: Tokens
    ) -> tuple[Tokens, Tokens]:
        """What the student's stream lacks behind a layer, and the inputs of the projections that could add it."""
        residual_scale = getattr(module, "residual_scale", 1.0)
        size = self.stack.sequences_at_once(layer_idx, self.student_BTH.shape[1])
        with _inputs_of(linears) as inputs:
            for start in range(0, len(self.student_BTH), size):
                batch = slice(start, start + size)
                teacher_BTH = self.teacher_BTH[batch][..., self.columns].float()
                missing_BTH = (teacher_BTH - module(self.student_BTH[batch])) / residual_scale
                weights_BT = 1 / teacher_BTH.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
                inputs_BTI = torch.cat(
                    [inputs[linear].float().view(*weights_BT.shape, -1) for linear in linears], dim=-1
                )
                held_B = self.is_held_out_B[batch]
                for tokens, rows_B in ((fitted, ~held_B), (held_out, held_B)):
                    if rows_B.any():
                        inputs_NI, missing_NH = (t[rows_B].flatten(0, 1) for t in (inputs_BTI, missing_BTH))
                        tokens.add(inputs_NI, missing_NH, weights_BT[rows_B].flatten())
        self.stack.counters.layer_applications += 1
        return _summed_over(self.processes, fitted), _summed_over(self.processes, held_out)

    def _note(self, found: Refit, cut: LayerCut) -> None:
        for axis, units in cut.kept_units:
            if cut.layer_idx in self.kept_units[axis]:  # rather than the model as a whole
                self.kept_units[axis][cut.layer_idx] = units
        helps, before, after = found.change is not None, found.loss_before, found.loss_after
        if not isfinite(before):
            raise MinipuzzleError(f"layer {cut.layer_idx} computes values that are not finite", "use ‹dtype› float32")
        self.layers.append(
            LayerRefit(
                layer_idx=cut.layer_idx,
                ridge=found.ridge if helps else None,
                missing_before=before,
                missing_after=after if helps else before,
                has_other_units=cut != layer_cut(self.stack.architecture, self.plan, cut.layer_idx),
            )
        )

    def _change(self, layer_idx: int, module: nn.Module, change_HI: torch.Tensor) -> None:
        """Give the module of a cut layer its new output projections, and keep them under their names in the cut model,
        in the precision of the source."""
        linears = self._linears(layer_idx, module)
        changes = change_HI.split([linear.get_parameter("weight").shape[1] for linear in linears], dim=1)
        olds = output_projections(self.stack.architecture, layer_idx)
        news = output_projections(self.target, self.plan.kept_layers.index(layer_idx))
        for old, new, linear, part_HI in zip(olds, news, linears, changes, strict=True):
            plain = linear.get_parameter("weight")
            stored = torch_dtype(self.stack.checkpoint.entries[old.name].dtype)
            self.weights[new.name] = weight = (plain.double() + part_HI).to("cpu", stored)  # the device has one layer
            linear.register_parameter("weight", nn.Parameter(weight.to(plain), False))

    def _linears(self, layer_idx: int, module: nn.Module) -> list[nn.Module]:
        """The output projections of a layer as they run."""
        placed = output_projections(self.stack.architecture, layer_idx)
        return [module.get_submodule(self.stack.parameter_name(t).removesuffix(".weight")) for t in placed]


@contextmanager
def _inputs_of(linears: Sequence[nn.Module]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """The latest input of each of some modules, while they run."""
    latest: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        latest[module] = args[0]

    handles = [linear.register_forward_pre_hook(keep) for linear in linears]
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()


def _summed_over(processes: Processes, own: Tokens) -> Tokens:
    """What the tokens of all processes say."""
    if isinstance(own, RefitRows):
        return RefitRows(parts=[part for parts in processes.gather(own.parts) for part in parts])
    for total in (own.gram, own.cross, own.energy):
        processes.sum_(total)
    return own
