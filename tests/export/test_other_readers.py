"""Guarantee: FP8 and NVFP4 exports of every family, with a head of its own or a tied one, are right in readers that are
not ours.

Plain transformers with the package compressed-tensors reads its layout and computes what our emulation computes.
ModelOpt's layout is read by engines only: its lists and scales are checked by the rules that those go by.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minipuzzle
from minipuzzle.architecture.families import read_architecture
from minipuzzle.export.digests import DIGESTS_FILE
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import SINGLE_FILE
from minipuzzle.formats.choices import SCHEMES
from minipuzzle.formats.flavours import FLAVOURS, HF_QUANT_CONFIG
from minipuzzle.quality.evaluate import divergence_sums
from minipuzzle.runtime.meta_models import prepare_layers
from minipuzzle.runtime.rounded_linear import RoundedLinear
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.cli import run_cli
from tests.support.text import random_tokens
from tests.support.tiny_models import EVERY_CONFIG, TINY_CONFIGS, change_tensors, write_family_checkpoint

TOKEN_IDS = random_tokens(4, 24, first=3)
# Experts of whole blocks, so that NVFP4 can hold them.
WIDTHS = {"nemotron_h-moe": {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48}}


def export(folder: Path, name: str, *, tied: bool, **settings: Any) -> tuple[Checkpoint, Path]:
    """A source and its export."""
    widths = WIDTHS.get(name, {})
    source = Checkpoint.open(write_family_checkpoint(folder / "source", name, tie_word_embeddings=tied, **widths))
    request = ExportRequest(**settings, verifies=False)
    export_checkpoint(source, folder / "out", request, calibration_token_ids=TOKEN_IDS)
    return source, folder / "out"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():  # inference mode would mark what is decoded in it
        found: torch.Tensor = model(TOKEN_IDS, use_cache=False).logits
    return found.flatten(0, 1)


def read_by_transformers(source: Checkpoint, folder: Path) -> nn.Module:
    """In float32, where nothing but the format rounds; it decodes NVFP4 to BF16 whatever it is told."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from transformers import AutoModelForCausalLM

    model: Any
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    # It joins experts in one tensor and rounds no inputs of theirs.
    unread = {name for names in info.values() for name in names}
    assert all(".experts." in name and ".input_" in name for name in unread), unread
    for module in model.modules():  # as at its first use
        if hasattr(module, "quantization_scheme"):
            compressors.decompress_module(module)
    model.ct_decompress_hook.remove()
    widened: nn.Module = nn.Module.float(model)
    prepare_layers(widened, source.config)
    return widened


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", EVERY_CONFIG)
def test_plain_transformers_computes_what_our_emulation_computes(
    name: str, scheme: str, tied: bool, tmp_path: Path
) -> None:
    architecture = read_architecture(TINY_CONFIGS[name])
    if "moe" in architecture.layer_counts and scheme == "nvfp4":
        pytest.skip("transformers 5.23 forgets the scale of whole tensors in experts; the model card says so")
    if "moe" in architecture.layer_counts and architecture.names.is_always_fused:
        pytest.skip("transformers reads no tensors of single experts of this family, and one for all has one scale")
    source, folder = export(tmp_path, name, tied=tied, scheme=scheme, flavour="compressed-tensors")
    theirs, ours = read_by_transformers(source, folder), minipuzzle.load(folder)
    for path, module in list(ours.named_modules()):
        if isinstance(module, RoundedLinear):
            weight = theirs.get_parameter(f"{path}.weight")
            assert torch.allclose(weight, module.weight, rtol=2**-7, atol=0), path
            module.weight = nn.Parameter(weight)
            if ".experts." in path:
                ours.set_submodule(path, RoundedLinear(module, round_inputs=lambda values: values))
    kl = divergence_sums(logits(theirs), logits(ours))[0] / TOKEN_IDS.numel()
    # Also false for NaN. Where it sees tokens in one row, as in MoE, it gives them all one scale.
    assert kl < (1e-5 if source.architecture.layer_counts.get("moe") else 1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", EVERY_CONFIG)
def test_the_lists_of_modelopts_layout_name_what_is_plain_and_nothing_else(
    name: str, scheme: str, tied: bool, tmp_path: Path
) -> None:
    """An engine quantises each linear module unless an entry is its name, or a part of it."""
    source, folder = export(tmp_path, name, tied=tied, scheme=scheme, flavour="modelopt")
    stored = load_file(folder / SINGLE_FILE)
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert json.loads((folder / HF_QUANT_CONFIG).read_text())["quantization"]["exclude_modules"] == ignored
    modules = {stem: tensor for path, tensor in stored.items() if (stem := path.removesuffix(".weight")) != path}
    for module, tensor in modules.items():
        is_plain = tensor.dtype == torch.bfloat16
        assert is_plain or not any(entry in module for entry in ignored), module
        assert not is_plain or tensor.ndim < 2 or module in ignored, module
    assert "lm_head" in ignored
    assert ("lm_head" in modules) is not source.architecture.deployed.tied_embeddings
    scales = [tensor.float() for path, tensor in stored.items() if "_scale" in path]
    assert scales and all(bool((scale > 0).all() and scale.isfinite().all()) for scale in scales)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_tied_head_stays_as_it_is_even_when_all_is_asked_for_and_that_is_said(flavour: str, tmp_path: Path) -> None:
    source = write_family_checkpoint(tmp_path / "source", "llama")
    (tmp_path / "text.txt").write_text("Words like those that will be read. " * 40)
    measured = ("--data", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 16)
    asked = ("--nvfp4", "--recipe", "all", "--flavour", flavour)
    result = run_cli("export", source, *asked, *measured, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "the LM head is tied to the embeddings and stays BF16" in " ".join(result.output.split())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "lm_head" in config["quantization_config"]["ignore"]
    # Exports of earlier versions list no head.
    config["quantization_config"]["ignore"].remove("lm_head")
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    (tmp_path / "out" / HF_QUANT_CONFIG).unlink(missing_ok=True)
    minipuzzle.load(tmp_path / "out")


FOREIGN = {
    "modelopt": ("fp8", "modelopt", {"ignore": ["lm_head"], "kv_cache_scheme": None}),
    "llm-compressor": (
        "nvfp4",
        "compressed-tensors",
        {"ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}},
    ),
}


@pytest.mark.parametrize("program", FOREIGN)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lists_that_other_programs_write_are_read(program: str, tied: bool, tmp_path: Path) -> None:
    """They list linear layers only, and null for what there is none of; older ones give block scales no precision."""
    scheme, flavour, fields = FOREIGN[program]
    _, folder = export(tmp_path, "llama", tied=tied, scheme=scheme, flavour=flavour)
    expected = logits(minipuzzle.load(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"].pop("scale_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    if (folder / HF_QUANT_CONFIG).is_file():
        quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
        (folder / HF_QUANT_CONFIG).write_text(json.dumps({"quantization": quantization}))
    for name in ("minipuzzle.json", DIGESTS_FILE):
        (folder / name).unlink()
    assert torch.equal(logits(minipuzzle.load(folder)), expected)
    found = run_cli("verify", folder, "--against", tmp_path / "source", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["verdict"] == "ok", found.output


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_of_zeros_and_experts_that_nothing_reaches_get_finite_scales(
    scheme: str, flavour: str, tmp_path: Path
) -> None:
    folder = write_family_checkpoint(tmp_path / "source", "nemotron_h-moe", **WIDTHS["nemotron_h-moe"])

    def kill(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".experts." in name or ".q_proj" in name or name.endswith("shared_experts.up_proj.weight"):
                tensor.zero_()

    source = Checkpoint.open(change_tensors(folder, kill))
    request = ExportRequest(scheme=scheme, flavour=flavour)
    export_checkpoint(source, tmp_path / "out", request, calibration_token_ids=TOKEN_IDS)
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    scales = {path: tensor.float() for path, tensor in stored.items() if "_scale" in path}
    assert all(bool((scale > 0).all() and scale.isfinite().all()) for scale in scales.values())
    codes = [stored[path] for path in stored if ".experts.0.up_proj.weight" in path and "scale" not in path]
    assert codes and not any(bool(found.view(torch.uint8).any()) for found in codes)
    assert logits(minipuzzle.load(tmp_path / "out")).isfinite().all()
