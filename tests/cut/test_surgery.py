"""Guarantee: a cut removes exactly what the plan says and nothing else changes.

Units whose output is exactly zero can be removed on every axis without changing the logits (float64, 1e-9, judged by
formulas written independently of transformers); cutting nothing gives the same bytes; what is cut loads strictly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import Plan, Units, keep_everything, read_plan
from minipuzzle.cut.scores import Scores
from minipuzzle.cut.selection import keep_best_units, norm_scales
from minipuzzle.cut.surgery import cut_tensors
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import ShardWriter
from tests.support.cuts import owners_of
from tests.support.ranking import figures_with
from tests.support.reference_nemotron_h import reference_forward
from tests.support.tiny_models import write_tiny_checkpoint

Tensors = dict[str, torch.Tensor]
TOKENS_BT = torch.tensor([[1, 7, 100, 33, 250, 8, 9, 61, 17, 4, 90, 5], [1, 3, 3, 77, 12, 200, 45, 6, 8, 130, 2, 9]])

# Axis -> units that are silenced, and thus may go. The tiny model has 4 SSM heads in 2 groups.
SILENT_UNITS = {
    "ffn": (0, 7, 31, 47),
    "ssm_head": (1, 2),
    "ssm_head_channel": (0, 5, 6),
    "kv_group": (1,),
    "hidden": (3, 4, 30),
}


def silence(tensors: Tensors, config: dict[str, Any], axis: str, units: tuple[int, ...]) -> None:
    """Make the output of some units exactly zero in every layer that has them."""
    heads, channels = config["mamba_num_heads"], config["mamba_head_dim"]
    for name, tensor in tensors.items():
        if axis == "ffn" and name.endswith("up_proj.weight"):
            tensor[list(units)] = 0
        elif axis == "ssm_head" and name.endswith("in_proj.weight"):
            # silu(0) = 0: a zero gate closes the head.
            tensor[: heads * channels].view(heads, channels, -1)[list(units)] = 0
        elif axis == "ssm_head_channel" and name.endswith("in_proj.weight"):
            tensor[: heads * channels].view(heads, channels, -1)[:, list(units)] = 0
        elif axis == "kv_group" and name.endswith("v_proj.weight"):
            tensor.view(config["num_key_value_heads"], config["head_dim"], -1)[list(units)] = 0
        elif axis == "hidden" and name.endswith(("embeddings.weight",)):
            tensor[:, list(units)] = 0
        elif axis == "hidden" and name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            tensor[list(units)] = 0


@pytest.fixture
def silenced(tmp_path: Path) -> Callable[[str], Checkpoint]:
    def make(axis: str) -> Checkpoint:
        # An epsilon in the norm would not scale along; 1e-30 leaves the exact statement.
        folder = write_tiny_checkpoint(tmp_path / "source", dtype="float64", layer_norm_epsilon=1e-30)
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        silence(tensors, config, axis, SILENT_UNITS[axis])
        save_file(tensors, folder / "model.safetensors")
        return Checkpoint.open(folder)

    return make


def plan_without(checkpoint: Checkpoint, axis: str, silent: tuple[int, ...], *, correct_norms: bool = True) -> Plan:
    """The plan that drops silent units, with energies that are zero exactly there."""
    source = checkpoint.architecture
    size = source.width(axis)
    assert size is not None
    kept = tuple(unit for unit in range(size) if unit not in silent)
    plan = replace(keep_everything(source), kept_units={axis: dict.fromkeys(owners_of(source, axis), kept)})
    heads, channels = source.width("ssm_head") or 0, source.width("ssm_head_channel") or 0
    inner = np.ones((heads, channels))
    if axis == "ssm_head":
        inner[list(silent)] = 0
    if axis == "ssm_head_channel":
        inner[:, list(silent)] = 0
    hidden = np.ones(source.hidden)
    if axis == "hidden":
        hidden[list(silent)] = 0
    energies = {f"ssm.{idx}": inner.ravel() for idx in range(len(source.layers))}
    energies |= {f"hidden.{idx}": hidden for idx in (*range(len(source.layers)), "final")}
    if not correct_norms:
        return plan
    return replace(plan, norm_scales=norm_scales(source, Scores(layer={}, energies=energies), plan))


def reference_logits(config: Any, tensors: Tensors) -> torch.Tensor:
    logits_BTV, _ = reference_forward(dict(config), tensors, TOKENS_BT)
    return logits_BTV


def logits_before_and_after(checkpoint: Checkpoint, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    before = reference_logits(checkpoint.config, {name: checkpoint.tensor(name) for name in checkpoint.entries})
    config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
    return before, reference_logits(config, dict(cut_tensors(checkpoint, plan)))


@pytest.mark.parametrize("axis", sorted(SILENT_UNITS))
def test_removing_silent_units_keeps_the_logits(silenced: Callable[[str], Checkpoint], axis: str) -> None:
    checkpoint = silenced(axis)
    before, after = logits_before_and_after(checkpoint, plan_without(checkpoint, axis, SILENT_UNITS[axis]))
    assert (before - after).abs().max() < 1e-9 * before.abs().max()
    assert before.std() > 0.1


@pytest.mark.parametrize("axis", ["ssm_head", "ssm_head_channel", "hidden"])
def test_without_the_norm_correction_the_logits_change(silenced: Callable[[str], Checkpoint], axis: str) -> None:
    checkpoint = silenced(axis)
    plan = plan_without(checkpoint, axis, SILENT_UNITS[axis], correct_norms=False)
    before, after = logits_before_and_after(checkpoint, plan)
    assert (before - after).abs().max() > 1e-3 * before.abs().max()


def test_removing_a_unit_that_speaks_changes_the_logits(silenced: Callable[[str], Checkpoint]) -> None:
    """The tests above would pass for a cut that removes nothing."""
    checkpoint = silenced("ffn")
    before, after = logits_before_and_after(checkpoint, plan_without(checkpoint, "ffn", (1,)))
    assert (before - after).abs().max() > 1e-6


def test_removing_silent_layers_keeps_the_logits(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "source", dtype="float64", pattern="M---MM*-M")
    tensors = load_file(folder / "model.safetensors")
    silent_layers = {1, 4, 6}
    for layer_idx, output in ((1, "down_proj"), (4, "out_proj"), (6, "o_proj")):
        tensors[f"backbone.layers.{layer_idx}.mixer.{output}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    kept = tuple(idx for idx in range(9) if idx not in silent_layers)
    plan = replace(keep_everything(checkpoint.architecture), kept_layers=kept)
    assert plan.apply(checkpoint.architecture).pattern == "M--M-M"
    before, after = logits_before_and_after(checkpoint, plan)
    assert (before - after).abs().max() < 1e-9


def test_cutting_nothing_is_byte_identical(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_pruned(tiny_checkpoint, keep_everything(tiny_checkpoint.architecture), tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tiny_checkpoint.folder / name).read_bytes()


def test_cutting_nothing_is_byte_identical_through_shards(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=20_000)
    for name, tensor in cut_tensors(tiny_checkpoint, keep_everything(tiny_checkpoint.architecture)):
        writer.add(name, tensor)
    writer.finish()
    (tmp_path / "config.json").write_bytes((tiny_checkpoint.folder / "config.json").read_bytes())
    sharded = Checkpoint.open(tmp_path)
    assert len({entry.shard for entry in sharded.entries.values()}) > 1
    for name in tiny_checkpoint.entries:
        assert torch.equal(sharded.tensor(name), tiny_checkpoint.tensor(name))


def narrow_plan(checkpoint: Checkpoint) -> Plan:
    """Some of everything: layers, FFN, heads, channels, groups and hidden."""
    source = checkpoint.architecture
    kept_layers = tuple(idx for idx in range(len(source.layers)) if idx not in (1, 5))
    generator = np.random.default_rng(0)
    widths = {"ffn": 32, "ssm_head": 2, "ssm_head_channel": 4, "kv_group": 1, "hidden": 24}
    kept_units: dict[str, dict[int | None, Units]] = {}
    for axis, width in widths.items():
        size = source.width(axis)
        assert size is not None
        groups = 2 if axis == "ssm_head" else 1
        owners = [idx for idx in owners_of(source, axis) if idx is None or idx in kept_layers]
        kept_units[axis] = {idx: keep_best_units(generator.random(size), width, groups) for idx in owners}
    plan = replace(keep_everything(source), kept_layers=kept_layers, kept_units=kept_units)
    energies = {f"ssm.{idx}": generator.random(32) for idx in kept_layers}
    energies |= {f"hidden.{idx}": generator.random(32) for idx in (*kept_layers, "final")}
    return replace(plan, norm_scales=norm_scales(source, Scores(layer={}, energies=energies), plan))


def test_a_cut_on_all_axes_loads_strictly_and_generates_with_cache_as_without(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    plan = narrow_plan(tiny_checkpoint)
    write_pruned(tiny_checkpoint, plan, tmp_path)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == plan.apply(tiny_checkpoint.architecture).num_parameters
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = model.generate(TOKENS_BT, use_cache=True, **settings)
    without_cache = model.generate(TOKENS_BT, use_cache=False, **settings)
    assert torch.equal(with_cache, without_cache)


def test_a_cut_tensor_is_the_indexed_source(tiny_checkpoint: Checkpoint) -> None:
    """in_proj row by row, indices written out by hand: z, x, B, C and dt rows of heads 0 and 3, columns of hidden."""
    source = tiny_checkpoint.architecture
    kept_units: dict[str, dict[int | None, Units]] = {
        "ssm_head": {0: (0, 3)},
        "hidden": {None: tuple(range(0, 32, 2))},
    }
    plan = replace(keep_everything(source), kept_units=kept_units)
    cut = dict(cut_tensors(tiny_checkpoint, plan))["backbone.layers.0.mixer.in_proj.weight"]
    head_rows = [*range(8), *range(24, 32)]
    rows = [*head_rows, *(32 + row for row in head_rows), *range(64, 128), 128, 131]
    expected = tiny_checkpoint.tensor("backbone.layers.0.mixer.in_proj.weight")[rows][:, ::2]
    assert torch.equal(cut, expected)


def test_a_plan_survives_its_file(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = replace(narrow_plan(tiny_checkpoint), figures=figures_with("M-*", 0.5), notes={"by": "someone"})
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert read_plan(path) == plan


def test_a_plan_of_the_first_version_is_read_with_its_figures(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = replace(narrow_plan(tiny_checkpoint), figures=figures_with("M-*", 0.5))
    record = json.loads(plan.to_json())
    del record["checksum"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**record, "schema_version": 1, "notes": record.pop("figures")}))
    assert read_plan(path) == plan


@pytest.mark.parametrize(
    "changes",
    [
        {"source_fingerprint": "0" * 16},
        {"kept_layers": (0, 9)},
        {"kept_layers": (3, 1)},
        {"kept_layers": ()},
        {"kept_units": {"ffn": {1: (0, 48)}}},
        {"kept_units": {"ffn": {0: (0, 1)}}},
        {"kept_units": {"ffn": {-6: (0, 1)}}},
        {"kept_units": {"hidden": {1: (0, 1)}}},
        {"kept_units": {"ssm_head": {0: (0, 1)}}},
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tiny_checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
    plan = replace(keep_everything(tiny_checkpoint.architecture), **changes)
    with pytest.raises(MinipuzzleError):
        next(cut_tensors(tiny_checkpoint, plan))
