"""Guarantee: gated delta nets lose heads exactly, each key head those value heads that it chose, as in Qwen3.5's files.

What holds for every family is in ``test_families.py``; sizes of published models are in ``PUBLISHED`` here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from importance.channels import score_channels
from minipuzzle.architecture.families import read_architecture
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.cut.plan import Plan
from minipuzzle.cut.scores import Scores
from minipuzzle.cut.selection import make_plan
from minipuzzle.cut.surgery import cut_tensors
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import build_model, load_model
from minipuzzle.runtime.narrowed_layers import NarrowedLayers, layer_cut
from tests.support.oracles import exact_logits_of
from tests.support.text import random_tokens
from tests.support.tiny_models import write_family_checkpoint

DELTA_NETS, KEY_HEADS, VALUE_HEADS, CHANNELS = (0, 4), 4, 2, 16
MIXER = "model.layers.{}.linear_attn."
# Blocks, hidden, ffn, query heads, key-value heads, value heads of delta nets, whether the head is tied; parameters.
PUBLISHED: dict[str, tuple[tuple[Any, ...], int]] = {
    "Qwen3.5-0.8B": ((24, 1024, 3584, 8, 2, 16, True), 752_393_024),
    "Qwen3.5-2B": ((24, 2048, 6144, 8, 2, 16, True), 1_881_825_088),
    "Qwen3.5-4B": ((32, 2560, 9216, 16, 4, 32, True), 4_205_751_296),
    "Qwen3.5-9B": ((32, 4096, 12288, 16, 4, 32, False), 8_953_803_264),
    "Qwen3.5-27B": ((64, 5120, 17408, 24, 4, 48, False), 26_895_998_464),
}


def published(sizes: Any) -> dict[str, Any]:
    fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    values = dict(zip((*fields, "linear_num_value_heads", "tie_word_embeddings"), sizes, strict=True))
    return {"model_type": "qwen3_5_text", "vocab_size": 248320, **values}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_checkpoint(tmp_path_factory.mktemp("qwen3_5"), "qwen3_5_text")


def plan_of_own_heads(checkpoint: Checkpoint) -> Plan:
    """Three of four key heads in each layer, and one of two value heads in each of them, chosen by random scores."""
    generator = np.random.default_rng(3)
    units = {f"gdn_key_group.{idx}": generator.random(KEY_HEADS, np.float32) for idx in DELTA_NETS}
    units |= {f"gdn_value_head.{i}": generator.random((KEY_HEADS, VALUE_HEADS), np.float32) for i in DELTA_NETS}
    return make_plan(
        checkpoint.architecture,
        Scores(layer={}, units=units),
        kept_layers=range(len(checkpoint.architecture.layers)),
        widths={idx: {"gdn_key_group": 3, "gdn_value_head": 1} for idx in DELTA_NETS},
    )


def silence_what_goes(folder: Path, plan: Plan) -> None:
    tensors = load_file(folder / "model.safetensors")
    for idx in DELTA_NETS:
        mixer = MIXER.format(idx // 2)
        kept, own = plan.units("gdn_key_group", idx), plan.chosen_units["gdn_value_head"][idx]
        assert kept is not None
        heads = {(key, value) for key in kept for value in own[key]}
        values = KEY_HEADS * 8 * 2 + np.arange(KEY_HEADS * VALUE_HEADS * CHANNELS).reshape(KEY_HEADS, VALUE_HEADS, -1)
        for key, value in np.ndindex(KEY_HEADS, VALUE_HEADS):
            if (key, value) not in heads:
                tensors[f"{mixer}in_proj_qkv.weight"][values[key, value]] = 0
    save_file(tensors, folder / "model.safetensors")


def test_removing_silent_value_heads_of_each_key_head_keeps_the_logits(tmp_path: Path) -> None:
    folder = write_family_checkpoint(tmp_path, "qwen3_5_text", dtype="float64", rms_norm_eps=1e-30)
    plan = plan_of_own_heads(Checkpoint.open(folder))
    assert len(set(plan.chosen_units["gdn_value_head"][0])) > 1  # different ones
    silence_what_goes(folder, plan)
    checkpoint, tokens = Checkpoint.open(folder), random_tokens()
    config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
    assert (config["linear_num_key_heads"], config["linear_num_value_heads"]) == (3, 3)
    before = exact_logits_of(load_model(checkpoint, Compute(dtype="float64")), tokens)
    after = exact_logits_of(build_model(config, cut_tensors(checkpoint, plan), Compute(dtype="float64")), tokens)
    assert (before - after).abs().max() < 1e-9 * before.abs().max()


def test_a_narrowed_layer_computes_what_the_cut_model_does(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    plan = plan_of_own_heads(checkpoint)
    config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
    cut = build_model(config, cut_tensors(checkpoint, plan))
    stack = LayerStack(checkpoint)
    hidden_BTH = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    with NarrowedLayers(stack).modules([layer_cut(checkpoint.architecture, plan, 4)]) as (module,):
        found = stack.apply(4, hidden_BTH, module=module)
    block = cut.get_submodule("model.layers.2")
    with torch.no_grad():
        wanted = hidden_BTH + block.linear_attn(block.input_layernorm(hidden_BTH))  # type: ignore[operator]
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_scores_of_heads_are_the_norms_of_what_they_add(folder: Path) -> None:
    checkpoint, tokens = Checkpoint.open(folder), random_tokens()
    model = load_model(checkpoint)
    inputs: list[torch.Tensor] = []
    projection = model.get_submodule("model.layers.2.linear_attn.out_proj")
    projection.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    units, _ = score_channels(LayerStack(checkpoint), tokens)
    for shape in ((KEY_HEADS,), (KEY_HEADS, VALUE_HEADS)):
        heads_BTUW = inputs[0].double().unflatten(-1, (np.prod(shape), -1))
        weight_HUW = projection.get_parameter("weight").detach().double().unflatten(-1, (np.prod(shape), -1))
        added = torch.einsum("btuw,huw->btuh", heads_BTUW, weight_HUW).norm(dim=-1).mean(1)
        name = "gdn_key_group.4" if len(shape) == 1 else "gdn_value_head.4"
        np.testing.assert_allclose(units[name], added.square().sum(0).sqrt().view(shape), rtol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameter_counts(name: str) -> None:
    sizes, total = PUBLISHED[name]
    assert read_architecture(published(sizes)).num_parameters == total


def test_memory_of_the_27b_model_counts_states_and_caches() -> None:
    terms = {
        term.name: term.num_bytes
        for term in memory_breakdown(
            read_architecture(published(PUBLISHED["Qwen3.5-27B"][0])), Deployment(context_tokens=1000)
        ).terms
    }
    assert terms["KV cache"] == 16 * 1000 * 4096  # 16 layers, two bytes, keys and values of four heads of 256
    assert terms["SSM state"] == 48 * 3_145_728  # float32
    assert terms["convolution state"] == 48 * 61_440


def test_config_says_which_blocks_are_left(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    config = {**checkpoint.config, "full_attention_interval": 2}
    config.pop("layer_types")
    source = checkpoint.family.read(config)
    assert [layer.kind for layer in source.layers[::2]] == ["gated_delta_net", "attention", "gated_delta_net"]
    plan = Plan(source_fingerprint=source.fingerprint(), kept_layers=(2, 3, 4, 5))
    written = checkpoint.family.write(config, plan.apply(source))
    assert written["layer_types"] == ["full_attention", "linear_attention"]
    assert "full_attention_interval" not in written
