"""Guarantee: a model whose layers differ in width, or whose blocks lack a layer, is written, loaded and run as planned.

For every family: removing a silent layer of a block and silent units of one layer alone keeps the logits (float64,
1e-9, judged by transformers' own code); what is written loads by ``minipuzzle.load`` and in no other way by mistake.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import minipuzzle
from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import HIDDEN
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import Plan, Units, keep_everything
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import load_model, parts_of
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.cuts import half_of_the_units, plan_keeping
from tests.support.oracles import exact_logits_of, silence
from tests.support.text import random_tokens
from tests.support.tiny_models import EVERY_CONFIG, NORM_EPSILONS, TINY_CONFIGS, save_tensors, write_family_checkpoint

PAIRED = [name for name in EVERY_CONFIG if "nemotron_h" not in name]


def cut_into(source: Checkpoint, plan: Plan, folder: Path) -> None:
    folder.mkdir()
    write_pruned(source, plan, folder)


def last_axis(source: Architecture, layer_idx: int) -> str:
    """The last of those that a layer can be cut on."""
    kind = LAYER_KINDS[source.layers[layer_idx].kind]
    return [axis for axis in kind.prunable_axes if axis in source.layers[layer_idx].sizes][-1]


def uneven_plan(source: Architecture) -> Plan:
    """A plan that narrows the last layer of each kind on its last axis, and drops the second layer."""
    plan = keep_everything(source)
    for kind in source.layer_counts:
        layer_idx = source.layer_indices(kind)[-1]
        axis = last_axis(source, layer_idx)
        cut = plan_keeping(source, axis, half_of_the_units(source, axis))
        names = {placed.name for placed in source.layer_tensors(layer_idx)}
        scales = {name: factors for name, factors in cut.norm_scales.items() if name in names}
        narrowed: dict[int | None, Units] = {layer_idx: cut.kept_units[axis][layer_idx]}
        kept_units = {**plan.kept_units, axis: narrowed}
        plan = replace(plan, kept_units=kept_units, norm_scales={**plan.norm_scales, **scales})
    return replace(plan, kept_layers=tuple(idx for idx in plan.kept_layers if idx != 1))


def silenced(folder: Path, name: str) -> Checkpoint:
    """A random model in which everything that ``uneven_plan`` drops is silent."""
    epsilons: dict[str, Any] = {field: 1e-30 for field in NORM_EPSILONS if field in TINY_CONFIGS[name]}
    write_family_checkpoint(folder, name, dtype="float64", **epsilons)
    checkpoint = Checkpoint.open(folder)
    source, tensors = checkpoint.architecture, {name: checkpoint.tensor(name) for name in checkpoint.entries}
    for placed in source.layer_tensors(1):
        if placed.spec.dims[0] == HIDDEN and not placed.spec.rms_groups:
            tensors[placed.name].zero_()
    for kind in source.layer_counts:
        layer_idx = source.layer_indices(kind)[-1]
        axis = last_axis(source, layer_idx)
        for placed in source.layer_tensors(layer_idx):
            silence(tensors[placed.name], placed, axis, half_of_the_units(source, axis), to_mean=False)
    save_tensors(folder, dict(checkpoint.config), tensors)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("name", EVERY_CONFIG)
def test_removing_a_silent_layer_and_silent_units_of_one_layer_keeps_the_logits(tmp_path: Path, name: str) -> None:
    checkpoint = silenced(tmp_path / "source", name)
    plan = uneven_plan(checkpoint.architecture)
    cut_into(checkpoint, plan, tmp_path / "pruned")
    written = Checkpoint.open(tmp_path / "pruned")
    assert written.architecture.fingerprint() == plan.apply(checkpoint.architecture).fingerprint()
    before = exact_logits_of(load_model(checkpoint, Compute(dtype="float64")), random_tokens())
    after = exact_logits_of(minipuzzle.load(tmp_path / "pruned", dtype=torch.float64), random_tokens())
    assert (before - after).abs().max() < 1e-9 * before.abs().max()
    assert before.std() > 0.1


@pytest.mark.parametrize("name", PAIRED)
def test_attention_and_mlp_go_independently_and_everything_else_works_on_what_is_left(
    tmp_path: Path, name: str
) -> None:
    checkpoint = Checkpoint.open(write_family_checkpoint(tmp_path / "source", name))
    kept = tuple(idx for idx in range(len(checkpoint.architecture.layers)) if idx not in (0, 3))
    cut_into(checkpoint, replace(keep_everything(checkpoint.architecture), kept_layers=kept), tmp_path / "pruned")
    pruned = Checkpoint.open(tmp_path / "pruned")
    assert [len(block) for block in pruned.architecture.blocks][:2] == [1, 1]
    model, stack = minipuzzle.load(tmp_path / "pruned"), LayerStack(pruned)
    source, hidden_BTH = parts_of(load_model(checkpoint), checkpoint.family), stack.embed(random_tokens())
    expected_BTH = source.embeddings(random_tokens())
    with torch.no_grad():
        for new_idx, old_idx in enumerate(kept):
            expected_BTH = source.layers[old_idx](expected_BTH)
            stack.apply(new_idx, hidden_BTH, out=hidden_BTH)
        assert torch.allclose(hidden_BTH, expected_BTH, rtol=1e-4, atol=1e-5)
        logits_BTV = source.head(source.final_norm(expected_BTH))
        assert torch.allclose(model(random_tokens()).logits, logits_BTV, rtol=1e-4, atol=1e-4)
    exported = export_checkpoint(
        pruned, tmp_path / "fp8", ExportRequest(scheme="fp8"), calibration_token_ids=random_tokens()
    )
    assert exported.verification is not None
    assert exported.verification.relative_difference == pytest.approx(0, abs=1e-5)
    again = replace(keep_everything(pruned.architecture), kept_layers=tuple(range(len(kept)))[2:])
    cut_into(pruned, again, tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").config["model_type"] == checkpoint.config["model_type"]


@pytest.mark.parametrize("name", ["qwen2", "smollm3"])
def test_narrowed_layers_keep_their_own_window_and_rotation(tmp_path: Path, name: str) -> None:
    """Run one by one as in transformers' whole model, whatever the first layer of their kind has."""
    source = Checkpoint.open(write_family_checkpoint(tmp_path / "source", name))
    cut_into(source, uneven_plan(source.architecture), tmp_path / "cut")
    checkpoint = Checkpoint.open(tmp_path / "cut")
    model = load_model(checkpoint)
    with torch.no_grad():
        parts = parts_of(model, checkpoint.family)
        found, wanted = parts.head(parts.logits_input(random_tokens())), model(random_tokens(), use_cache=False).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_other_loaders_refuse_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(write_family_checkpoint(tmp_path / "source", "llama"))
    cut_into(checkpoint, uneven_plan(checkpoint.architecture), tmp_path / "pruned")
    with pytest.raises(ValueError, match="minipuzzle_per_layer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        ({"block": 7, "kind": "mlp", "ffn": 8}, "block 7"),
        ({"block": 0, "kind": "mamba", "ffn": 8}, "'mamba'"),
        ({"block": 0, "kind": "mlp"}, "ffn"),
        ("mlp", "layers"),
    ],
)
def test_a_damaged_list_of_layers_is_refused(tmp_path: Path, layer: Any, word: str) -> None:
    checkpoint = Checkpoint.open(write_family_checkpoint(tmp_path / "source", "llama"))
    cut_into(checkpoint, uneven_plan(checkpoint.architecture), tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    (tmp_path / "pruned" / "config.json").write_text(json.dumps({**config, "layers": [layer]}))
    with pytest.raises(MinipuzzleError, match=word):
        Checkpoint.open(tmp_path / "pruned")
