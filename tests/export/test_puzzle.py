"""Guarantee: a hybrid whose layers differ in width is exported with ``block_configs`` when asked, every layer with its
own fields, and computes the same when it is read back; what that form cannot say is refused with the layer named.

The bundled configuration class is the one that engines run; here it is asked as vLLM asks it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minipuzzle
from minipuzzle.architecture.configs.puzzle import without_blocks
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import Plan, Units, keep_everything
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint, read_config
from minipuzzle.files.json_files import write_json
from minipuzzle.files.safetensors_files import SINGLE_FILE
from minipuzzle.quality.evaluate import divergence_sums
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.cli import run_cli
from tests.support.text import random_tokens
from tests.support.tiny_models import write_family_checkpoint, write_tiny_checkpoint

PATTERN = "M-*M-*-"  # MLP in layers 1, 4 and 6, attention in 2 and 5


TOKEN_IDS = random_tokens(3, 24, first=3)


def prune_unevenly(source: Path, out: Path, **kept_units: Mapping[int | None, Units]) -> Checkpoint:
    """Cut single layers to some of their units."""
    checkpoint = Checkpoint.open(source)
    plan: Plan = replace(keep_everything(checkpoint.architecture), kept_units=kept_units)
    out.mkdir()
    write_pruned(checkpoint, plan, out)
    return Checkpoint.open(out)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("models")
    write_tiny_checkpoint(root / "source", pattern=PATTERN)
    ffn: dict[int | None, Units] = {1: tuple(range(16)), 6: tuple(range(32))}
    return prune_unevenly(root / "source", root / "uneven", ffn=ffn, kv_group={5: (1,)})


@pytest.fixture(scope="module")
def exported(uneven: Checkpoint) -> Path:
    out = uneven.folder.parent / "puzzle"
    result = run_cli("export", uneven.folder, "--bf16", "--puzzle", "-o", out)
    assert result.exit_code == 0, result.output
    return out


def bundled_module(folder: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The class that config.json names, from the folder itself."""
    module_name, _ = config["auto_map"]["AutoConfig"].split(".")
    spec = importlib.util.spec_from_file_location(module_name, folder / f"{module_name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module_name, module)
    spec.loader.exec_module(module)
    return module


def test_each_layer_has_its_own_widths_in_config_json_and_in_the_bundled_class(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["NemotronHPuzzleForCausalLM"] and config["model_type"] == "nemotron_h_puzzle"
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (48, 4, 2)
    assert "layers" not in config and "base_model_type" not in config
    hf_config = bundled_module(exported, config, monkeypatch).NemotronHPuzzleConfig(**config)
    assert hf_config.hybrid_override_pattern == PATTERN and hf_config.num_hidden_layers == len(PATTERN)
    stored = load_file(exported / SINGLE_FILE)
    for layer_idx, symbol in enumerate(PATTERN):
        layer, mixer = hf_config.get_nemotron_h_config_for_layer(layer_idx), f"backbone.layers.{layer_idx}.mixer"
        if symbol == "-":
            assert layer.intermediate_size == len(stored[f"{mixer}.up_proj.weight"])
        if symbol == "*":
            assert layer.num_attention_heads * layer.head_dim == len(stored[f"{mixer}.q_proj.weight"])
            assert layer.num_key_value_heads * layer.head_dim == len(stored[f"{mixer}.k_proj.weight"])
        assert layer.hidden_size == 32 and layer.mamba_num_heads == 4
    assert [hf_config.get_nemotron_h_config_for_layer(idx).intermediate_size for idx in (1, 4, 6)] == [16, 48, 32]
    assert hf_config.intermediate_size == 48, "asking for one layer must not change the model"


def test_it_reads_back_as_the_same_model_and_verifies(uneven: Checkpoint, exported: Path) -> None:
    written = Checkpoint.open(exported)
    assert written.architecture.fingerprint() == uneven.architecture.fingerprint()
    source = {name: uneven.tensor(name).to(torch.bfloat16) for name in uneven.entries}
    assert all(torch.equal(tensor, source[name]) for name, tensor in load_file(exported / SINGLE_FILE).items())
    with torch.inference_mode():
        expected = minipuzzle.load(uneven.folder)(TOKEN_IDS, use_cache=False).logits
        found = minipuzzle.load(exported)(TOKEN_IDS, use_cache=False).logits
    kl, _ = divergence_sums(expected.flatten(0, 1), found.flatten(0, 1))
    assert kl / TOKEN_IDS.numel() < 1e-3  # BF16 weights against float32 ones
    assert run_cli("verify", exported, "--against", uneven.folder).exit_code == 0
    assert run_cli("inspect", exported / "config.json").exit_code == 0
    again = dict(read_config(exported))
    assert again["layers"] == uneven.config["layers"] and again["base_model_type"] == "nemotron_h"


def test_fp8_exports_and_the_card_say_which_engines_read_them(uneven: Checkpoint, tmp_path: Path) -> None:
    for name, request in (
        ("puzzle", ExportRequest(scheme="fp8", is_puzzle=True)),
        ("own", ExportRequest(scheme="fp8")),
    ):
        found = export_checkpoint(uneven, tmp_path / name, request, calibration_token_ids=TOKEN_IDS)
        assert found.verification is not None and found.verification.relative_difference == 0.0
        assert any("only minipuzzle reads" in warning for warning in found.warnings) == (name == "own")
    card = (tmp_path / "puzzle" / "README.md").read_text()
    assert "--trust-remote-code" in card and "NemotronHPuzzleForCausalLM" in card
    own = (tmp_path / "own" / "README.md").read_text()
    assert "vllm serve" not in own and "minipuzzle.load" in own
    assert not list((tmp_path / "own").glob("*.py"))


def refusal(checkpoint: Checkpoint, out: Path) -> str:
    with pytest.raises(MinipuzzleError) as error:
        export_checkpoint(checkpoint, out, ExportRequest(is_puzzle=True))
    assert not list(out.parent.glob(f"{out.name}*"))
    return str(error.value)


def test_mamba_layers_that_differ_are_refused_by_name(uneven: Checkpoint, tmp_path: Path) -> None:
    source = uneven.folder.parent / "source"
    checkpoint = prune_unevenly(source, tmp_path / "uneven", ssm_head={3: (0, 2)})
    assert "layer 3 (mamba) has 2 heads" in refusal(checkpoint, tmp_path / "out")


def test_models_that_do_not_need_it_and_other_families_are_refused(uneven: Checkpoint, tmp_path: Path) -> None:
    assert "do not differ" in refusal(Checkpoint.open(uneven.folder.parent / "source"), tmp_path / "out")
    llama = Checkpoint.open(write_family_checkpoint(tmp_path / "llama", "llama"))
    assert "not for llama" in refusal(llama, tmp_path / "out")


@pytest.mark.parametrize(
    ("block", "word"),
    [
        ({"block_type": "rwkv"}, "'rwkv'"),
        ({"block_type": "attention", "sliding_window": 16}, "sliding_window"),
        ({"block_type": "attention", "num_attention_heads": 2, "num_key_value_heads": 2}, "queries"),
        ({"block_type": "mlp", "intermediate_size": 0}, "intermediate_size"),
        ("mlp", "block_configs"),
    ],
)
def test_blocks_that_are_damaged_or_unknown_are_refused(exported: Path, tmp_path: Path, block: Any, word: str) -> None:
    config = json.loads((exported / "config.json").read_text())
    write_json(tmp_path / "config.json", {**config, "block_configs": [block, *config["block_configs"][1:]]})
    with pytest.raises(MinipuzzleError, match=word):
        Checkpoint.open(tmp_path)


def test_experts_of_a_layers_own_number_survive_the_way_there_and_back(tmp_path: Path) -> None:
    source = write_family_checkpoint(tmp_path / "source", "nemotron_h-moe")
    checkpoint = prune_unevenly(source, tmp_path / "uneven", expert={3: (0, 1, 2, 4, 5, 6)})
    export_checkpoint(checkpoint, tmp_path / "out", ExportRequest(is_puzzle=True))
    written: Architecture = Checkpoint.open(tmp_path / "out").architecture
    assert written.fingerprint() == checkpoint.architecture.fingerprint()
    blocks = json.loads((tmp_path / "out" / "config.json").read_text())["block_configs"]
    assert [block.get("n_routed_experts") for block in blocks] == [None, 8, None, 6, None]


def test_any_other_config_stays_as_it_is(uneven: Checkpoint) -> None:
    assert without_blocks(uneven.config) is uneven.config
