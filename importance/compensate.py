"""Mending a cut without training: each kept layer's output projection refitted to the teacher's residual stream.

The calibration tokens pass the layers of the source model and of its cut form side by side, from first to last. Behind
each layer that stays, from the first cut on, the student's stream differs from the teacher's; the layer's output
projection takes the change that makes up most of the difference (``minipuzzle.cut.compensation``), errors of all layers
below included, then its routed experts what is left (``importance.refits.experts``), and the student's stream moves on
through the new weights. One layer is in memory at a time.

A part of the windows is held out of the fits: it chooses each layer's ridge, and a layer whose refit it does not gain
from keeps its plain weights.

Shape suffixes: B windows of a batch, T tokens, H hidden, N tokens of a batch in one list, I inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch
from torch import nn

from importance.candidates import add_up, compare_streams, quality_of
from importance.refits.experts import refit_experts
from importance.refits.results import Compensation, LayerRefit, MendedLayer, MendedLayers
from importance.refits.streams import Streams, at_least_float32, summed_over
from importance.refits.work import expert_bytes, expert_projections, output_projections, sums_bytes
from minipuzzle.cut.compensation import Refit, RefitRows, RefitSums, Tokens, cheapest_to_keep, refit
from minipuzzle.cut.plan import Plan, Units, keep_everything
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.safetensors_files import torch_dtype
from minipuzzle.quality.evaluate import TokenSums
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.narrowed_layers import LayerCut, NarrowedLayers, layer_cut, prefix_axes

HELD_OUT_EVERY = 4  # of the windows, one
RIDGE_OF_REMOVAL = 0.1
_ROWS_AT_ONCE = 64


@torch.no_grad()
def compensate(
    stack: LayerStack,
    plan: Plan,
    token_ids_BT: torch.Tensor,
    *,
    may_choose: bool = True,
    unfinished: Path | None = None,
) -> Compensation:
    """Refit what a plan leaves of the stack's model. Each of several processes takes a share of the windows.

    ``may_choose``: a layer may keep other neurons or key-value groups than planned, equally many, if held-out tokens
    gain. Then the choice is that of Optimal Brain Surgeon (``cheapest_to_keep``) on the student's own activations.
    ``unfinished``: a folder that keeps each finished layer, so that an interrupted run continues with the same result;
    the new weights are then read from there, and are in memory no longer than a layer is.

    Shapes: ``token_ids_BT`` ``[windows, tokens]``.
    Raises: MinipuzzleError for fewer than two windows, or values that are not finite.
    """
    walk = _Walk(stack, plan, token_ids_BT, may_choose=may_choose)
    if unfinished is not None:
        walk.finished = MendedLayers.of(unfinished, plan, token_ids_BT, may_choose=may_choose)
    if walk.finished is None or not walk.processes.is_first:
        walk.weights = {}
    with stack.compute.progress("compensating", stack.num_layers) as advance:
        for layer_idx in range(stack.num_layers):
            walk.take(layer_idx)
            advance(1)
    weights: Mapping[str, torch.Tensor] | None = walk.weights
    if weights is None and walk.finished is not None:
        weights = walk.finished.weights(walk.new_names)
    return Compensation(
        plan=replace(plan, kept_units=walk.kept_units),
        num_tokens=token_ids_BT.numel(),
        weights=weights or {},
        layers=walk.layers,
    )


@torch.no_grad()
def mended_quality(
    stack: LayerStack,
    plan: Plan,
    token_ids_BT: torch.Tensor,
    windows: EvaluationWindows,
    *,
    may_choose: bool = True,
) -> Quality:
    """What a plan is like on other text once it is mended as ``compensate`` does. No weights are kept.

    Raises: as ``compensate``.
    """
    walk = _Walk(stack, plan, token_ids_BT, may_choose=may_choose)
    walk.watch(windows)
    for layer_idx in range(stack.num_layers):
        walk.take(layer_idx)
    return walk.quality()


@torch.no_grad()
def mended_states(
    stack: LayerStack, plan: Plan, token_ids_BT: torch.Tensor, other_ids_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states behind the last layer, of the source and of a plan that is mended on some text, on other text.

    Returns the token ids of this process's windows of the other text, and the states of both ``[windows, tokens,
    hidden]``.
    """
    walk = _Walk(stack, plan, token_ids_BT, may_choose=False)
    walk.watch(EvaluationWindows(token_ids=other_ids_BT, labels=other_ids_BT, num_bytes=0))
    for layer_idx in range(stack.num_layers):
        walk.take(layer_idx)
    states, own = walk.all_streams[-1], list(walk.processes.share(range(len(other_ids_BT))))
    return other_ids_BT[own], states.teacher_BTH, states.student_BTH


class _Walk:
    """The teacher's stream and the student's behind the same layer, and what was found so far."""

    def __init__(self, stack: LayerStack, plan: Plan, token_ids_BT: torch.Tensor, *, may_choose: bool) -> None:
        if len(token_ids_BT) < 2 * stack.compute.processes.world_size:
            raise MinipuzzleError(
                f"{len(token_ids_BT)} windows of text cannot be divided into some to fit and some to check the fit",
                "give more text, or ‹no_compensate›",
            )
        self.stack, self.plan, self.may_choose, self.processes = stack, plan, may_choose, stack.compute.processes
        self.kept_units = {axis: dict(by_layer) for axis, by_layer in plan.kept_units.items()}
        self.narrowed, self.target = NarrowedLayers(stack), plan.apply(stack.architecture)
        self.new_names: dict[
            int, dict[str, str]
        ] = {}  # by layer: of new weights in its module, by those in the cut model
        self.weights: dict[str, torch.Tensor] | None = None
        self.layers: list[LayerRefit] = []
        self.finished: MendedLayers | None = None
        every = min(HELD_OUT_EVERY, len(token_ids_BT))
        own = list(self.processes.share(range(len(token_ids_BT))))
        is_held_out_B = torch.tensor([window % every == every - 1 for window in own])
        self.num_tokens = token_ids_BT.numel()
        self.num_fitted_tokens = len(token_ids_BT) * token_ids_BT.shape[1] * (every - 1) // every
        self.streams = Streams(stack, token_ids_BT[own], is_held_out_B, plan.units("hidden", None))
        self.all_streams = [self.streams]

    def watch(self, windows: EvaluationWindows) -> None:
        """Take other text along."""
        own = list(self.processes.share(range(len(windows.token_ids))))
        token_ids_BT, self.labels_BT = windows.token_ids[own], windows.labels[own].to(self.stack.device)
        nothing = torch.zeros(len(own), dtype=torch.bool)
        self.all_streams.append(Streams(self.stack, token_ids_BT, nothing, self.plan.units("hidden", None)))

    def quality(self) -> Quality:
        """What the mended model is like on the watched text."""
        plans, sums = (keep_everything(self.stack.architecture), self.plan), (TokenSums(), TokenSums())
        watched = self.all_streams[-1]
        compare_streams(self.narrowed, plans, [watched.teacher_BTH, watched.student_BTH], self.labels_BT, sums)
        add_up(sums, self.processes)
        return quality_of(self.plan, sums[1])

    def take(self, layer_idx: int) -> None:
        """Bring all streams behind a layer."""
        source = self.stack.architecture
        is_kept, cut = layer_idx in self.plan.kept_layers, layer_cut(source, self.plan, layer_idx)
        is_first_cut = self.streams.are_one and not (is_kept and cut == LayerCut(layer_idx=layer_idx))
        for streams in self.all_streams:
            if is_first_cut:
                streams.part()
            streams.advance_teacher(layer_idx)
        if self.streams.are_one or not is_kept:
            return
        mended = self._mended(cut)
        self._note(mended)
        with self.narrowed.modules([replace(cut, kept_units=mended.kept_units)]) as (module,):
            _put(module, mended.weights)
            for streams in self.all_streams:
                streams.advance_student(layer_idx, module)

    def _mended(self, cut: LayerCut) -> MendedLayer:
        """What becomes of a layer: as an interrupted run left it, or found now."""
        writes = self.finished is not None and self.processes.is_first
        earlier: MendedLayer | None = self.processes.broadcast(
            self.finished.read(cut.layer_idx) if self.finished and writes else None
        )
        if earlier is not None:
            return earlier
        # All processes have the same sums; that their solvers agree to the last bit is not certain.
        mended: MendedLayer = self.processes.broadcast(self._mend(cut))
        if self.finished is not None and writes:
            self.finished.write(mended)
        return mended

    def _mend(self, planned: LayerCut) -> MendedLayer:
        """Refit a layer: its units and output projections, then its routed experts."""
        found, cut = self._found(planned)
        with self.narrowed.modules([cut]) as (module,):
            changes: dict[str, torch.Tensor] = {}
            if found.change is not None:
                linears = self._linears(cut.layer_idx, module)
                widths = [linear.get_parameter("weight").shape[1] for linear in linears.values()]
                changes = dict(zip(linears, found.change.split(widths, dim=1), strict=True))
            weights = self._changed(cut, module, changes)
            _put(module, weights)
            gain, num_experts = 0.0, 0
            for names in self._experts(cut, module):
                experts = refit_experts(self.streams, cut.layer_idx, module, names, self.processes)
                gain, num_experts = gain + experts.gain, num_experts + len(experts.changes)
                changed = self._changed(cut, module, experts.changes)
                _put(module, changed)
                weights |= changed
        left = found.loss_before if found.change is None else found.loss_after
        record = LayerRefit(
            layer_idx=cut.layer_idx,
            ridge=found.ridge if found.change is not None else None,
            missing_before=found.loss_before,
            missing_after=left - gain,
            has_other_units=dict(cut.kept_units) != dict(planned.kept_units),
            experts_refitted=num_experts,
        )
        return MendedLayer(record=record, kept_units=cut.kept_units, weights=weights)

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
        projections = output_projections(self.stack.architecture, cut.layer_idx)
        if len(projections) != 1 or not self.may_choose:
            return None
        placed = projections[0]
        ((axis, *_),) = placed.spec.dims[1]
        can_move = axis in prefix_axes(self.stack.architecture.layers[cut.layer_idx])
        is_cut = axis in dict(cut.kept_units)
        return axis if can_move and is_cut and self.num_fitted_tokens >= placed.shape[1] else None

    def _refit(self, layer_idx: int, module: nn.Module) -> Refit:
        """The change of a layer's output projections, from the smaller of its Gram matrices."""
        linears = list(self._linears(layer_idx, module).values())
        width = sum(linear.get_parameter("weight").shape[1] for linear in linears)
        if not linears:  # all that the layer adds comes from routed experts
            _, held_out = self._collect(layer_idx, module, [], *self._no_sums(0))
            return Refit(change=None, ridge=0.0, loss_before=held_out.loss(), loss_after=held_out.loss())
        if self.num_fitted_tokens < width:
            return refit(*self._collect(layer_idx, module, linears, RefitRows(), RefitRows()))
        return refit(*self._collect(layer_idx, module, linears, *self._no_sums(width)))

    def _choose(self, layer_idx: int, module: nn.Module, axis: str, planned: Units) -> tuple[Refit, Units]:
        """The refit of those units of a whole layer, the planned ones or the cheapest to keep, that leaves least
        missing of held-out tokens."""
        (linear,) = self._linears(layer_idx, module).values()
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
        hidden, device = self.target.hidden, self.streams.student_BTH.device
        return RefitSums.zeros(width, hidden, device), RefitSums.zeros(width, hidden, device)

    def _collect(
        self, layer_idx: int, module: nn.Module, linears: Sequence[nn.Module], fitted: Tokens, held_out: Tokens
    ) -> tuple[Tokens, Tokens]:
        """What the student's stream lacks behind a layer, and the inputs of the projections that could add it."""
        with _inputs_of(linears) as inputs:
            for part in self.streams.missing(layer_idx, module):
                shape = part.weights.shape
                columns: list[torch.Tensor] = [at_least_float32(inputs[linear]).view(*shape, -1) for linear in linears]
                inputs_BTI = torch.cat([part.missing[..., :0], *columns], dim=-1)
                for tokens, rows_B in ((fitted, ~part.held_out), (held_out, part.held_out)):
                    if rows_B.any():
                        inputs_NI, missing_NH = (t[rows_B].flatten(0, 1) for t in (inputs_BTI, part.missing))
                        tokens.add(inputs_NI, missing_NH, part.weights[rows_B].flatten())
        return summed_over(self.processes, fitted), summed_over(self.processes, held_out)

    def _note(self, mended: MendedLayer) -> None:
        layer_idx = mended.record.layer_idx
        for axis, units in mended.kept_units:
            if layer_idx in self.kept_units[axis]:  # rather than the model as a whole
                self.kept_units[axis][layer_idx] = units
        if not isfinite(mended.record.missing_before):
            raise MinipuzzleError(f"layer {layer_idx} computes values that are not finite", "use ‹dtype› float32")
        self.layers.append(mended.record)
        disk_names = self._disk_names(layer_cut(self.stack.architecture, self.plan, layer_idx))
        self.new_names[layer_idx] = {disk_names[name]: name for name in mended.weights}
        if self.weights is not None:
            self.weights |= {disk_names[name]: weight for name, weight in mended.weights.items()}

    def _disk_names(self, cut: LayerCut) -> dict[str, str]:
        """Names in the cut checkpoint by those in the module of a cut layer."""
        layers = list(self.stack.architecture.layers)
        layers[cut.layer_idx] = cut.resized(layers[cut.layer_idx])
        here = replace(self.stack.architecture, layers=tuple(layers)).layer_tensors(cut.layer_idx)
        there = self.target.layer_tensors(self.plan.kept_layers.index(cut.layer_idx))
        return {self.stack.parameter_name(t): new.name for t, new in zip(here, there, strict=True)}

    def _changed(
        self, cut: LayerCut, module: nn.Module, changes: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """New weights of some modules by the names of these weights in the cut layer's module, in the precision of the
        source."""
        entries = self.stack.checkpoint.entries
        stored = {
            self.stack.parameter_name(placed): torch_dtype(entries[placed.name].dtype)
            for placed in self.stack.architecture.layer_tensors(cut.layer_idx)
        }
        found = {}
        for name, change_HI in changes.items():
            plain_HI = module.get_parameter(weight := f"{name}.weight")
            # The device has one layer; and the rows go by parts, because they may be all that there is room for.
            found[weight] = torch.empty(plain_HI.shape, dtype=stored[weight])
            parts = zip(*(rows.split(_ROWS_AT_ONCE) for rows in (found[weight], plain_HI, change_HI)), strict=True)
            for new_RI, plain_RI, change_RI in parts:
                new_RI.copy_(plain_RI.double() + change_RI)
        return found

    def _linears(self, layer_idx: int, module: nn.Module) -> dict[str, nn.Module]:
        """The output projections of a layer as they run, by name."""
        placed = output_projections(self.stack.architecture, layer_idx)
        names = [self.stack.parameter_name(t).removesuffix(".weight") for t in placed]
        return {name: module.get_submodule(name) for name in names}

    def _experts(self, cut: LayerCut, module: nn.Module) -> list[list[str]]:
        """The names of the routed experts' projections in a cut layer's module, as many together as the memory takes
        the sums of."""
        placed = expert_projections(self.stack.architecture, cut.layer_idx)
        if not placed:
            return []
        names = [self.stack.parameter_name(t).removesuffix(".weight") for t in placed]
        names = names[: cut.resized(self.stack.architecture.layers[cut.layer_idx]).sizes["expert"]]
        hidden, width = module.get_submodule(names[0]).get_parameter("weight").shape
        stack = self.stack
        room = sums_bytes(stack.architecture, self.num_tokens) + stack.free_bytes - stack.reserved_bytes
        at_once = max(1, room // expert_bytes(width, hidden))
        return [names[start : start + at_once] for start in range(0, len(names), at_once)]


def _put(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a module new weights, in the precision and place of those it has."""
    for name, weight in weights.items():
        owner, _, last = name.rpartition(".")
        plain = module.get_parameter(name)
        module.get_submodule(owner).register_parameter(last, nn.Parameter(weight.to(plain), False))


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
