"""Guarantee: what a layer's output projections get is the float64 least-squares solution on what its cut form computes,
in layers of every kind, with and without biases; and routed experts make up for what the router's tokens lack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from importance.compensate import compensate
from importance.refits.experts import refit_experts
from importance.refits.streams import Streams
from importance.refits.work import expert_projections, output_projections
from minipuzzle.cut.compensation import RefitRows, refit
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import Plan
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.narrowed_layers import NarrowedLayers, layer_cut
from minipuzzle.runtime.processes import Processes
from tests.support.cuts import half_of_the_units, plan_keeping, some_tokens
from tests.support.tiny_models import write_family_checkpoint

FLOAT64 = Compute(dtype="float64")


def one_layer_cut(checkpoint: Checkpoint, layer_idx: int, axis: str) -> Plan:
    """Half of the units of one layer."""
    source = checkpoint.architecture
    plan = plan_keeping(source, axis, half_of_the_units(source, axis))
    in_layer = {tensor.name for tensor in source.layer_tensors(layer_idx)}
    return replace(
        plan,
        kept_units={axis: {layer_idx: plan.kept_units[axis][layer_idx]}},
        norm_scales={name: scales for name, scales in plan.norm_scales.items() if name in in_layer},
    )


def what_happens(
    checkpoint: Checkpoint, plan: Plan, layer_idx: int, token_ids: torch.Tensor, folder: Path
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """On all tokens, weighted: the inputs of the output projections of the written cut, and what its stream lacks."""
    folder.mkdir()
    write_pruned(checkpoint, plan, folder)
    source, cut = LayerStack(checkpoint, FLOAT64), LayerStack(Checkpoint.open(folder), FLOAT64)
    teacher, student = source.embed(token_ids), cut.embed(token_ids)
    seen: dict[str, torch.Tensor] = {}
    for idx in range(layer_idx + 1):
        teacher = source.apply(idx, teacher)
        module = cut.loaded_layer(idx)
        names = [cut.parameter_name(t).removesuffix(".weight") for t in output_projections(cut.architecture, idx)]

        def see(name: str) -> Any:
            def keep(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                seen[name] = args[0].reshape(token_ids.numel(), -1)

            return keep

        seen.clear()
        handles = [module.get_submodule(name).register_forward_pre_hook(see(name)) for name in names]
        with torch.no_grad():
            student = module(student)
        for handle in handles:
            handle.remove()
    roots = (1 / teacher.square().mean(-1)).sqrt().flatten()[:, None]
    scale = getattr(cut.layer(layer_idx), "residual_scale", 1.0)
    missing = ((teacher - student) / scale).flatten(0, 1)
    return (torch.cat([seen[name] for name in names], 1) * roots).numpy(), (missing * roots).numpy()


CASES = {
    "gated mlp": ("llama", "mlp", "ffn", {}),
    "fused mlp": ("phi3", "mlp", "ffn", {}),
    "attention": ("qwen3", "attention", "kv_group", {}),
    "scaled attention": ("granitemoehybrid", "attention", "kv_group", {}),
    "mamba heads": ("nemotron_h", "mamba", "ssm_head", {}),
    "mamba channels": ("nemotron_h", "mamba", "ssm_head_channel", {}),
    "mlp with biases": ("llama", "mlp", "ffn", {"mlp_bias": True}),
    "attention with biases": ("llama", "attention", "kv_group", {"attention_bias": True}),
    "mamba with biases": ("nemotron_h", "mamba", "ssm_head", {"use_bias": True, "mamba_proj_bias": True}),
    "shared expert and way out of the latent space": ("nemotron_h-moe", "moe", "shared_ffn", {}),
    "re-routed tokens": ("nemotron_h-moe", "moe", "expert", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_new_weights_are_the_least_squares_solution(tmp_path: Path, case: str) -> None:
    family, kind, axis, changes = CASES[case]
    checkpoint = Checkpoint.open(write_family_checkpoint(tmp_path / "model", family, **changes))
    layer_idx = checkpoint.architecture.layer_indices(kind)[0]
    plan, token_ids = one_layer_cut(checkpoint, layer_idx, axis), some_tokens(8)
    found = compensate(LayerStack(checkpoint, FLOAT64), plan, token_ids, may_choose=False)
    first = found.layers[0]
    assert first.layer_idx == layer_idx and first.ridge is not None
    inputs, missing = what_happens(checkpoint, plan, layer_idx, token_ids, tmp_path / "cut")
    # The ridge as further rows: a fraction of each input's own sum of squares.
    table = np.concatenate([inputs, np.diag(np.sqrt(first.ridge * np.square(inputs).sum(0)))])
    wanted = np.concatenate([missing, np.zeros((inputs.shape[1], missing.shape[1]))])
    solution = np.linalg.lstsq(table, wanted, rcond=None)[0].T
    plain = Checkpoint.open(tmp_path / "cut")
    names = [placed.name for placed in output_projections(plain.architecture, layer_idx)]
    change = np.concatenate([(found.weights[n].double() - plain.tensor(n).double()).numpy() for n in names], 1)
    np.testing.assert_allclose(change, solution, rtol=1e-3, atol=2e-6)  # weights are stored in float32


def mixture(folder: Path) -> Checkpoint:
    """Without a latent width, so that experts add to the stream themselves."""
    return Checkpoint.open(write_family_checkpoint(folder, "nemotron_h-moe", moe_latent_size=None))


def test_each_routed_expert_is_fitted_to_its_own_tokens(tmp_path: Path) -> None:
    """One expert a token: then no two make up for the same, and each one's change is that of its tokens alone."""
    folder = write_family_checkpoint(tmp_path / "model", "nemotron_h-moe", moe_latent_size=None, num_experts_per_tok=1)
    checkpoint = Checkpoint.open(folder)
    layer_idx = checkpoint.architecture.layer_indices("moe")[0]
    plan, token_ids = one_layer_cut(checkpoint, layer_idx, "expert_ffn"), some_tokens(32)
    stack = LayerStack(checkpoint, FLOAT64)
    is_held_out = torch.arange(32) % 4 == 3
    streams = Streams(stack, token_ids, is_held_out, None)
    streams.part()
    for idx in range(layer_idx):
        streams.advance_teacher(idx)
    before = streams.student_BTH = streams.teacher_BTH.clone()
    streams.advance_teacher(layer_idx)
    names = [stack.parameter_name(t).removesuffix(".weight") for t in expert_projections(stack.architecture, layer_idx)]
    seen: dict[int, torch.Tensor] = {}
    with NarrowedLayers(stack).modules([layer_cut(stack.architecture, plan, layer_idx)]) as (module,), torch.no_grad():
        found = refit_experts(streams, layer_idx, module, names, Processes())
        for name in names:
            number = int(name.split(".")[-2])
            module.get_submodule(name).register_forward_pre_hook(
                lambda _module, args, number=number: seen.update({number: args[0]})
            )
        experts = module.get_submodule(names[0].rsplit(".", 2)[0])
        routing: list[torch.Tensor] = []
        experts.register_forward_pre_hook(lambda _module, args: routing.extend(args[1:]))
        student = module(before)
    chosen, strengths = routing[0][:, 0], routing[1][:, 0]
    teacher = streams.teacher_BTH
    missing, weights = (teacher - student).flatten(0, 1), 1 / teacher.square().mean(-1).flatten()
    held = is_held_out.repeat_interleave(token_ids.shape[1])
    factors = []
    for number, name in enumerate(names):
        if number not in seen:
            assert name not in found.changes
            continue
        parts = []
        for among in (~held, held):
            tokens = (chosen == number) & among
            rows = RefitRows()
            rows.add(
                (seen[number] * strengths[chosen == number, None])[among[chosen == number]],
                missing[tokens],
                weights[tokens],
            )
            parts.append(rows)
        alone = refit(parts[0], parts[1])
        assert (alone.change is None) == (name not in found.changes)
        if alone.change is not None:
            factors.append(float((found.changes[name] * alone.change).sum() / alone.change.square().sum()))
            torch.testing.assert_close(found.changes[name], factors[-1] * alone.change, rtol=1e-4, atol=1e-7)
    assert len(factors) > 2
    assert max(factors) == pytest.approx(min(factors)) and 0 < factors[0] <= 1
    assert found.gain > 0


@pytest.mark.parametrize("axis", ["expert", "expert_ffn"])
def test_cut_mixtures_of_experts_are_mended_by_their_experts_too(tmp_path: Path, axis: str) -> None:
    checkpoint, token_ids = mixture(tmp_path / "model"), some_tokens(24)
    plan = plan_keeping(checkpoint.architecture, axis, half_of_the_units(checkpoint.architecture, axis))
    stack = LayerStack(checkpoint)
    found = compensate(stack, plan, token_ids)
    layers = [layer for layer in found.layers if layer.experts_refitted]
    assert layers and all(layer.missing_after < layer.missing_before for layer in layers)
    target = {tensor.name: tensor.shape for tensor in found.plan.apply(checkpoint.architecture).tensors()}
    routed = [name for name in found.weights if ".experts." in name]
    assert len(routed) == sum(layer.experts_refitted for layer in found.layers)
    assert all(tuple(found.weights[name].shape) == target[name] for name in found.weights)


def test_few_experts_at_a_time_mend_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory has no room for the sums of all: one group after another, each on what the others left."""
    checkpoint, token_ids = mixture(tmp_path / "model"), some_tokens(24)
    plan = plan_keeping(checkpoint.architecture, "expert_ffn", half_of_the_units(checkpoint.architecture, "expert_ffn"))
    roomy, tight = LayerStack(checkpoint), LayerStack(checkpoint)
    tight.reserved_bytes = tight.free_bytes
    first, second = (compensate(stack, plan, token_ids) for stack in (roomy, tight))
    assert tight.counters.layer_applications > roomy.counters.layer_applications
    for one, other in zip(first.layers, second.layers, strict=True):
        assert other.missing_after <= other.missing_before
        assert bool(one.experts_refitted) == bool(other.experts_refitted)
