"""Guarantee: a narrowed layer computes what that layer of the pruned checkpoint computes, on every axis.

Widths of one ranking share the layer's own weights; what the stack computes is left as it was; work is counted.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.cut.plan import Plan, keep_everything
from minipuzzle.cut.surgery import cut_tensors
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack, largest_part_bytes
from minipuzzle.runtime.models import build_model, parts_of
from minipuzzle.runtime.narrowed_layers import LayerCut, NarrowedLayers, layer_cut, unit_orders
from tests.support.cuts import plan_with
from tests.support.tiny_models import write_tiny_checkpoint

MLP, ATTENTION = 1, 3  # of the pattern M-M*-M-
WIDTHS = {
    "ffn": (17, 48, 30),
    "kv_group": (1, 2),
    "ssm_head": (2,),
    "ssm_head_channel": (5, 3),
    "hidden": (20, 28),
}


@pytest.fixture(params=[True, False], ids=["resident", "streamed"])
def stack(request: pytest.FixtureRequest, tiny_checkpoint: Checkpoint) -> LayerStack:
    if request.param:
        return LayerStack(tiny_checkpoint)
    least_bytes = largest_part_bytes(tiny_checkpoint.architecture, torch.float32)
    streamed = LayerStack(tiny_checkpoint, Compute(memory_bytes=least_bytes))
    assert not streamed.is_resident
    return streamed


def pruned_layers(checkpoint: Checkpoint, plan: Plan) -> nn.ModuleList:
    """The layers of the model that transformers loads from the pruned checkpoint."""
    config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
    return parts_of(build_model(config, cut_tensors(checkpoint, plan)), checkpoint.family).layers


def random_hidden(width: int = 32) -> torch.Tensor:
    return torch.randn(2, 21, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("axis", WIDTHS)
@torch.no_grad()
def test_a_narrowed_layer_is_the_layer_of_the_pruned_checkpoint(stack: LayerStack, axis: str) -> None:
    checkpoint, source = stack.checkpoint, stack.architecture
    plans = [plan_with(checkpoint, **{axis: width}) for width in WIDTHS[axis]]
    for layer_idx, layer in enumerate(source.layers):
        if axis not in layer.sizes:
            continue
        cuts = [layer_cut(source, plan, layer_idx) for plan in plans]
        with NarrowedLayers(stack).modules(cuts) as modules:
            for plan, module in zip(plans, modules, strict=True):
                hidden = random_hidden(plan.apply(source).hidden)
                wanted = pruned_layers(checkpoint, plan)[layer_idx](hidden)
                torch.testing.assert_close(stack.apply(layer_idx, hidden, module=module), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_several_axes_are_cut_together(tiny_checkpoint: Checkpoint) -> None:
    plans = [
        plan_with(tiny_checkpoint, hidden=24, ffn=ffn, kv_group=1, ssm_head=2, ssm_head_channel=5) for ffn in (16, 40)
    ]
    stack = LayerStack(tiny_checkpoint)
    narrowed = NarrowedLayers(stack)
    for layer_idx in range(stack.num_layers):
        cuts = [layer_cut(stack.architecture, plan, layer_idx) for plan in plans]
        with narrowed.modules(cuts) as modules:
            for plan, module in zip(plans, modules, strict=True):
                wanted = pruned_layers(tiny_checkpoint, plan)[layer_idx](random_hidden(24))
                torch.testing.assert_close(module(random_hidden(24)), wanted, rtol=1e-5, atol=1e-5)


def test_widths_of_one_ranking_are_views_of_the_layers_own_weights(stack: LayerStack) -> None:
    cuts = [layer_cut(stack.architecture, plan_with(stack.checkpoint, ffn=width), MLP) for width in (8, 30, 17)]
    with NarrowedLayers(stack).modules(cuts) as modules:
        own = {tensor.data_ptr() for tensor in stack.layer(MLP).state_dict().values()}
        for module in modules:
            assert {tensor.data_ptr() for tensor in module.state_dict().values()} == own
    attention_cut = layer_cut(stack.architecture, plan_with(stack.checkpoint, kv_group=1), ATTENTION)
    with NarrowedLayers(stack).modules([attention_cut]) as (module,):
        own = {tensor.data_ptr() for tensor in stack.layer(ATTENTION).state_dict().values()}
        assert {tensor.data_ptr() for tensor in module.state_dict().values()} == own


@torch.no_grad()
def test_widths_of_different_rankings_are_right_too(tiny_checkpoint: Checkpoint) -> None:
    stack = LayerStack(tiny_checkpoint)
    kept = [(0, 1, 2, 3, 4, 5), (3, 4), (5, 7, 9, 40), tuple(range(0, 48, 2))]
    cuts = [LayerCut(layer_idx=MLP, kept_units=(("ffn", units),)) for units in kept]
    with NarrowedLayers(stack).modules(cuts) as modules:
        found = [module(random_hidden()) for module in modules]
    for units, output in zip(kept, found, strict=True):
        plan = replace(keep_everything(stack.architecture), kept_units={"ffn": {1: units, 4: units, 6: units}})
        wanted = pruned_layers(tiny_checkpoint, plan)[MLP](random_hidden())
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)


def test_the_order_begins_with_each_nested_set() -> None:
    mlp = LayerSpec(kind="mlp", sizes={"hidden": 4, "ffn": 6})
    cuts = [LayerCut(layer_idx=0, kept_units=(("ffn", units),)) for units in ((4,), (1, 4, 5))]
    order = unit_orders(mlp, cuts)["ffn"]
    assert (order[:1], set(order[:3]), sorted(order)) == ((4,), {1, 4, 5}, list(range(6)))


def test_the_stack_is_left_as_it_was(stack: LayerStack) -> None:
    before = stack.apply(MLP, random_hidden())
    with NarrowedLayers(stack).modules([layer_cut(stack.architecture, plan_with(stack.checkpoint, ffn=9), MLP)]):
        inside = stack.apply(MLP, random_hidden())
    assert torch.equal(stack.apply(MLP, random_hidden()), before)
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=1e-5)


def test_work_is_counted_and_weights_are_read_once(tiny_checkpoint: Checkpoint) -> None:
    stack = LayerStack(tiny_checkpoint)
    cuts = [layer_cut(stack.architecture, plan_with(tiny_checkpoint, ffn=width), MLP) for width in (9, 20)]
    with NarrowedLayers(stack).modules(cuts) as modules:
        for module in modules:
            stack.apply(MLP, random_hidden().expand(3, 2, 21, 32), module=module)
    assert stack.counters.layer_applications == 6
    assert stack.counters.weight_bytes_read == stack.stored_bytes(MLP)


@torch.no_grad()
def test_the_final_norm_is_cut_with_the_hidden_axis(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path))
    plan = plan_with(checkpoint, hidden=20)
    config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
    wanted = parts_of(build_model(config, cut_tensors(checkpoint, plan)), checkpoint.family).final_norm
    found = NarrowedLayers(LayerStack(checkpoint)).final_norm(plan)
    torch.testing.assert_close(found(random_hidden(20)), wanted(random_hidden(20)))


@given(st.lists(st.sets(st.integers(0, 7), min_size=1).map(lambda units: tuple(sorted(units))), max_size=6))
def test_an_order_holds_every_unit_once_and_begins_with_those_of_nested_cuts(cuts: list[tuple[int, ...]]) -> None:
    layer = LayerSpec(kind="mlp", sizes={"hidden": 4, "ffn": 8})
    orders = unit_orders(layer, [LayerCut(layer_idx=0, kept_units=(("ffn", units),)) for units in cuts])
    assert orders.keys() == ({"ffn"} if cuts else set())
    if cuts:
        order = orders["ffn"]
        assert sorted(order) == list(range(8))
        widest_first = sorted({*cuts}, key=len, reverse=True)
        assert set(order[: len(widest_first[0])]) == set(widest_first[0])
        if all(set(inner) <= set(outer) for outer, inner in itertools.pairwise(widest_first)):
            assert all(set(order[: len(units)]) == set(units) for units in cuts)
