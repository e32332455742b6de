"""Guarantee: of a model that also sees, the language model goes through every command, and all else stays as it was.

Folders are written by transformers' ``save_pretrained``; what comes out loads strictly in its composite class and
computes there what it computes here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minipuzzle
from minipuzzle.architecture.families import read_architecture
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.cut.plan import KeptUnits, Plan, keep_everything
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint, read_config
from minipuzzle.search.space import parse_widths
from tests.support.cli import run_cli, run_json
from tests.support.composites import COMPOSITES, add_tensors, composite_logits, write_composite
from tests.support.text import random_tokens

PREDICTOR = {"mtp.fc.weight": torch.ones(32, 64), "mtp.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("composites")
    found = {name: write_composite(root / name, name) for name in COMPOSITES}
    add_tensors(found["qwen3_5"], PREDICTOR)
    config = json.loads((found["qwen3_5"] / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (found["qwen3_5"] / "config.json").write_text(json.dumps(config))
    return found


def carried(folder: Path) -> dict[str, torch.Tensor]:
    placed = Checkpoint.open(folder).architecture.carried
    stored = load_file(folder / "model.safetensors") if (folder / "model.safetensors").exists() else {}
    return {tensor.name: stored[tensor.name] for tensor in placed}


def log_probabilities_differ(folder: Path) -> float:
    """By how much ours differ from those of transformers' composite class, at most."""
    tokens = random_tokens()
    with torch.no_grad():
        ours = minipuzzle.load(folder)(tokens, use_cache=False).logits
    return float((ours.log_softmax(-1) - composite_logits(folder, tokens).log_softmax(-1)).abs().max())


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_language_model_computes_what_it_does_inside_the_composite(folders: dict[str, Path], name: str) -> None:
    assert log_probabilities_differ(folders[name]) < 1e-4


@pytest.mark.parametrize("name", ["qwen3_5", "mistral3"])
def test_every_command_takes_a_composite_and_leaves_what_sees_as_it_was(
    folders: dict[str, Path], name: str, tmp_path: Path, text_file: Path
) -> None:
    source, scores, pruned, recovered = folders[name], *(tmp_path / part for part in ("scores", "pruned", "recovered"))
    measured = ("--data", text_file, "--samples", 4, "--sequence-length", 16, "--device", "cpu")
    run_json("score", source, *measured, "-o", scores)
    cut = ("--keep-layers", "0", "--width", "ffn=24", "--width", "kv_group=1")
    assert run_json("search", source, "--scores", scores, *cut)["num_parameters"] > 0
    run_json("prune", source, "--scores", scores, *measured, *cut, "-o", pruned)
    trained = ("--data", text_file, "--tokens", 64, "--sequence-length", 16, "--batch", 2, "--device", "cpu")
    run_json("distill", pruned, *trained, "-o", recovered)
    for folder in (pruned, recovered):
        found = carried(folder)
        assert found.keys() == {tensor for tensor in carried(source) if not tensor.startswith("mtp.")}
        assert all(torch.equal(found[tensor], values) for tensor, values in carried(source).items() if tensor in found)
        assert log_probabilities_differ(folder) < 1e-4
    run_json("export", recovered, "--fp8", *measured, "-o", tmp_path / "fp8")
    assert run_json("verify", tmp_path / "fp8", "--against", recovered, "--device", "cpu")["verdict"] == "ok"
    shown = run_json("evaluate", tmp_path / "fp8", "--data", text_file, "--sequence-length", 16, "--device", "cpu")
    assert all(row["loss"] > 0 for row in shown.values())
    ignored = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["ignore"]
    matrices = {tensor.removesuffix(".weight") for tensor, values in carried(recovered).items() if values.ndim > 1}
    assert matrices <= set(ignored)


def test_blocks_go_and_all_that_is_carried_stays(folders: dict[str, Path], tmp_path: Path) -> None:
    source = Checkpoint.open(folders["qwen3_5"])
    plan = Plan(source_fingerprint=source.architecture.fingerprint(), kept_layers=(0, 1, 2, 3))
    (tmp_path / "plan.json").write_text(plan.to_json())
    run_json("prune", source.folder, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert carried(tmp_path / "out").keys() == carried(source.folder).keys() >= PREDICTOR.keys()
    assert read_config(tmp_path / "out")["text_config"]["mtp_num_hidden_layers"] == 1
    assert log_probabilities_differ(tmp_path / "out") < 1e-4


def test_a_predictor_of_widths_that_are_cut_is_left_out_and_named(folders: dict[str, Path], tmp_path: Path) -> None:
    source = Checkpoint.open(folders["qwen3_5"]).architecture
    kept: KeptUnits = {"ffn": dict.fromkeys((1, 3, 5), tuple(range(24)))}
    plan = Plan(source_fingerprint=source.fingerprint(), kept_layers=tuple(range(6)), kept_units=kept)
    (tmp_path / "plan.json").write_text(plan.to_json())
    result = run_cli("prune", folders["qwen3_5"], "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert "mtp.fc.weight" in result.output
    assert read_config(tmp_path / "out")["text_config"]["mtp_num_hidden_layers"] == 0


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("qwen3_5", "model.visual.merger.linear_fc2.bias"), ("mistral3", "multi_modal_projector.linear_1.weight")],
)
def test_a_cut_of_the_hidden_size_is_refused_with_the_tensor_that_has_it(
    folders: dict[str, Path], name: str, tensor: str
) -> None:
    source = Checkpoint.open(folders[name]).architecture
    plan = Plan(
        source_fingerprint=source.fingerprint(),
        kept_layers=tuple(range(len(source.layers))),
        kept_units={"hidden": {None: tuple(range(16))}},
    )
    with pytest.raises(MinipuzzleError, match=tensor):
        plan.check_against(source)
    with pytest.raises(MinipuzzleError, match=tensor):
        parse_widths(source, "hidden", "16", 8)


def test_blocks_of_unequal_widths_keep_what_sees(folders: dict[str, Path], tmp_path: Path) -> None:
    source = Checkpoint.open(folders["mistral3"])
    kept: KeptUnits = {"ffn": {3: tuple(range(24))}}
    plan = Plan(source_fingerprint=source.architecture.fingerprint(), kept_layers=(0, 1, 3, 4, 5), kept_units=kept)
    (tmp_path / "plan.json").write_text(plan.to_json())
    run_json("prune", source.folder, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    cut = Checkpoint.open(tmp_path / "out")
    assert cut.architecture == plan.apply(source.architecture)
    assert minipuzzle.load(tmp_path / "out")(random_tokens(), use_cache=False).logits.isfinite().all()


def test_memory_counts_what_is_carried_and_config_alone_does_not(folders: dict[str, Path]) -> None:
    source = Checkpoint.open(folders["mistral3"])
    terms = {term.name: term.num_bytes for term in memory_breakdown(source.architecture, Deployment()).terms}
    values = sum(tensor.numel() for tensor in carried(source.folder).values())
    assert terms["parts beside the language model"] == 2 * values
    shown = run_json("inspect", source.folder)
    assert shown["memory_bytes"] == sum(terms.values())
    assert keep_everything(source.architecture).apply(source.architecture) == source.architecture
    assert read_architecture(source.config).carried == ()


def test_a_composite_of_an_unknown_language_model_is_refused_by_its_name(folders: dict[str, Path]) -> None:
    config = read_config(folders["mistral3"])
    with pytest.raises(MinipuzzleError, match="'new_text'"):
        read_architecture({**config, "text_config": {**config["text_config"], "model_type": "new_text"}})
    with pytest.raises(MinipuzzleError, match="text_config"):
        read_architecture({**config, "text_config": None})
