"""Guarantee: checkpoints that other programs quantised read as the numbers that those programs say they hold, shard by
shard and aloud, in every command that measures, cuts, trains or exports; what cannot be decoded is refused by name.

The files are written by ModelOpt, by compressed-tensors and by transformers' own quantiser, whose arithmetic is the
oracle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipuzzle.errors import MinipuzzleError, MinipuzzleWarning
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import SINGLE_FILE
from minipuzzle.formats.decoding import decoded
from tests.support.cli import run_cli
from tests.support.tiny_models import change_config, write_family_checkpoint

# Widths of more than a block, and of no whole number of them.
WIDE = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 32, "num_hidden_layers": 1}
LINEAR = ("q_proj.weight", "o_proj.weight", "down_proj.weight")
Tensors = dict[str, torch.Tensor]


def plain_model(folder: Path, **changes: Any) -> Path:
    return write_family_checkpoint(folder, "llama", dtype="bfloat16", **{**WIDE, **changes})


def quantized(folder: Path, settings: dict[str, Any], quantize: Callable[[str, torch.Tensor], Tensors]) -> Path:
    """Put each linear weight into the form that a quantiser gives it."""
    found: Tensors = {}
    for name, tensor in load_file(folder / SINGLE_FILE).items():
        found |= quantize(name, tensor) if name.endswith("_proj.weight") else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / SINGLE_FILE)
    return change_config(folder, quantization_config=settings)


def read(folder: Path) -> Checkpoint:
    with pytest.warns(MinipuzzleWarning, match="decoded to BF16 as they are read"):
        checkpoint = decoded(Checkpoint.open(folder))
    checkpoint.require_plain_weights()
    return checkpoint


# By ModelOpt's configuration: the format, ModelOpt's own class for it, and its blocks.
MODELOPT: dict[str, tuple[str, str, dict[int, int] | None]] = {
    "FP8_DEFAULT_CFG": ("FP8", "FP8QTensor", None),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": ("FP8", "FP8QTensor", None),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": ("FP8", "FP8QTensor", {-1: 128, -2: 128}),
    "MXFP8_DEFAULT_CFG": ("FP8", "MXFP8QTensor", {-1: 32}),
    "NVFP4_DEFAULT_CFG": ("NVFP4", "NVFP4QTensor", {-1: 16}),
    "MXFP4_DEFAULT_CFG": ("MXFP4", "MXFP4QTensor", {-1: 32}),
}


@pytest.mark.parametrize("name", MODELOPT)
def test_what_modelopt_exports_is_what_modelopt_decodes(name: str, tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization import qtensor
    from transformers import AutoModelForCausalLM

    title, tensor_class, blocks = MODELOPT[name]
    widths = {"hidden_size": 256, "intermediate_size": 384} if "BLOCKWISE" in name else {}
    source = plain_model(tmp_path / "source", **widths)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    mtq.quantize(model, getattr(mtq, name), lambda it: it(torch.arange(64)[None]))
    export_hf_checkpoint(model, export_dir=tmp_path / "out")
    checkpoint, stored = read(tmp_path / "out"), load_file(tmp_path / "out" / SINGLE_FILE)
    found = {path: tensor for path, tensor in stored.items() if path.endswith("_proj.weight")}
    assert len(found) == 7 and title in str(getattr(checkpoint, "note", ""))
    for path, codes in found.items():
        scale = stored[path + "_scale"]
        scale = scale[:, None] if scale.ndim == 1 else scale.reshape(scale.shape[::2]) if scale.ndim == 4 else scale
        arguments = {"scale": scale, "double_scale": stored.get(path + "_scale_2"), "block_sizes": blocks}
        shape = checkpoint.entries[path].shape
        expected = getattr(qtensor, tensor_class)(shape, torch.float32, codes).dequantize(torch.float32, **arguments)
        assert torch.equal(checkpoint.tensor(path), expected.bfloat16()), path


def by_compressed_tensors(scheme: dict[str, Any], form: str) -> tuple[dict[str, Any], Any, Any]:
    """Its config, and the compressor and the arguments that do it."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    group = {"targets": ["Linear"], "weights": scheme}
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**group, "format": form}},
    }
    return settings, compressors.BaseCompressor.get_value_from_registry(form), quantization.QuantizationScheme(**group)


_FLOAT = {"type": "float", "symmetric": True}
COMPRESSED = {
    "float-quantized": {**_FLOAT, "num_bits": 8, "strategy": "block", "block_structure": [64, 32]},
    "naive-quantized": {**_FLOAT, "num_bits": 8, "strategy": "channel"},
    "nvfp4-pack-quantized": {**_FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16},
    "mxfp4-pack-quantized": {**_FLOAT, "num_bits": 4, "strategy": "group", "group_size": 32},
}


@pytest.mark.parametrize("form", COMPRESSED)
def test_what_compressed_tensors_packs_is_what_it_unpacks(form: str, tmp_path: Path) -> None:
    settings, compressor, scheme = by_compressed_tensors(COMPRESSED[form], form)
    expected: Tensors = {}

    def quantize(name: str, weight: torch.Tensor) -> Tensors:
        parts: Tensors = {"weight": weight.float(), **scales_of(weight.float(), form)}
        with torch.compiler.set_stance("force_eager"):  # a minute of compilation else
            packed = compressor.compress(parts, scheme)
            expected[name] = compressor.decompress(dict(packed), scheme)["weight"]
        return {name.removesuffix("weight") + part: tensor for part, tensor in packed.items()}

    checkpoint = read(quantized(plain_model(tmp_path / "model"), settings, quantize))
    assert len(expected) == 7
    for name, tensor in expected.items():
        assert torch.allclose(checkpoint.tensor(name).float(), tensor.float(), rtol=2**-7, atol=1e-30), name


def scales_of(weight: torch.Tensor, form: str) -> Tensors:
    """Scales as its observers find them."""
    rows, columns = weight.shape
    if form == "float-quantized":
        return {"weight_scale": weight.view(rows // 64, 64, columns // 32, 32).abs().amax((1, 3)) / 448}
    if form == "naive-quantized":
        return {"weight_scale": weight.abs().amax(1, keepdim=True) / 448}
    if form == "mxfp4-pack-quantized":
        return {"weight_scale": torch.exp2((weight.unflatten(1, (-1, 32)).abs().amax(-1) / 6).log2().ceil())}
    whole = 448 * 6 / weight.abs().amax().reshape(1)
    blocks = (weight.unflatten(1, (-1, 16)).abs().amax(-1) * whole / 6).to(torch.float8_e4m3fn).float()
    return {"weight_scale": blocks, "weight_global_scale": whole}


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
def test_fp8_in_blocks_as_deepseek_stores_it_is_what_transformers_makes_of_it(
    scale_format: str | None, tmp_path: Path
) -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=(64, 32), scale_fmt=scale_format or "float")

    quantizer: Any = Quantizer()
    expected: Tensors = {}

    def quantize(name: str, weight: torch.Tensor) -> Tensors:
        stored: Tensors = Fp8Quantize(quantizer).convert({name: weight})
        codes, scales = stored[name], stored[name + "_scale_inv"]
        expected[name] = Fp8Dequantize(quantizer)._dequantize_one(codes, scales, torch.bfloat16)
        return stored

    settings = {"quant_method": "fp8", "weight_block_size": [64, 32], "activation_scheme": "dynamic"}
    checkpoint = read(quantized(plain_model(tmp_path / "model"), settings, quantize))
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
        assert torch.equal(checkpoint.rows(name, 3, 70), tensor[3:70]), name


def test_blocks_that_end_before_they_are_full_have_their_own_scale(tmp_path: Path) -> None:
    """192 x 320 in blocks of 128: transformers refuses it, DeepSeek's own files have it."""

    def quantize(name: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        of_blocks = torch.arange(1.0, 1 + -(-rows // 128) * -(-columns // 128)).view(-(-rows // 128), -1)
        return {name: weight.to(torch.float8_e4m3fn), name + "_scale_inv": of_blocks}

    folder = plain_model(tmp_path / "model")
    source = load_file(folder / SINGLE_FILE)
    checkpoint = read(quantized(folder, {"quant_method": "fp8", "weight_block_size": [128, 128]}, quantize))
    for name in checkpoint.entries:
        if name.endswith("_proj.weight"):
            rows, columns = source[name].shape
            for row, column in ((0, 0), (rows - 1, 0), (0, columns - 1), (rows - 1, columns - 1)):
                factor = 1 + (row // 128) * -(-columns // 128) + column // 128
                stored = source[name][row, column].to(torch.float8_e4m3fn).float()
                assert float(checkpoint.tensor(name)[row, column]) == float((stored * factor).bfloat16()), name


def test_mxfp4_experts_of_gpt_oss_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 24, 5, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 134, (3, 24, 5), dtype=torch.uint8, generator=generator)
    folder = plain_model(tmp_path / "model")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {**load_file(folder / SINGLE_FILE), name + "_blocks": blocks, name + "_scales": scales}
    save_file(stored, folder / SINGLE_FILE)
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.warns(MinipuzzleWarning, match="1 tensors are stored in MXFP4"):
        checkpoint = decoded(Checkpoint.open(folder))
    expected = convert_moe_packed_tensors(blocks, scales)
    assert checkpoint.entries[name].shape == (3, 160, 24)
    assert torch.equal(checkpoint.tensor(name), expected)
    assert torch.equal(checkpoint.rows(name, 1, 2), expected[1:2])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "packed integers"),
    ],
)
@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_what_cannot_be_decoded_is_refused_by_name(
    command: str, settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = change_config(plain_model(tmp_path / "model"), quantization_config=settings)
    (tmp_path / "text.txt").write_text("Nothing of this is read.")
    out = ("-o", tmp_path / "s.safetensors") if command == "score" else ()
    result = run_cli(command, folder, "--data", tmp_path / "text.txt", *out)
    assert result.exit_code == 1 and named in result.output and "hint:" in result.output, result.output


def test_integers_are_refused_with_the_tensor_that_holds_them(tmp_path: Path) -> None:
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}

    def quantize(name: str, weight: torch.Tensor) -> Tensors:
        return {name: weight.to(torch.int8), name + "_scale": torch.ones(len(weight), 1)}

    folder = quantized(plain_model(tmp_path / "model"), settings, quantize)
    with pytest.raises(MinipuzzleError, match=r"compressed-tensors/int-quantized cannot be decoded: .* stored as I8"):
        decoded(Checkpoint.open(folder))


def test_every_command_takes_a_quantised_model_and_says_so(tmp_path: Path) -> None:
    def quantize(name: str, weight: torch.Tensor) -> Tensors:
        scale = weight.float().abs().amax() / 448
        return {name: (weight.float() / scale).to(torch.float8_e4m3fn), name + "_scale_inv": scale.reshape(1)}

    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    folder = quantized(plain_model(tmp_path / "model", num_hidden_layers=3), settings, quantize)
    (text := tmp_path / "text.txt").write_text("Words like those that will be read. " * 60)
    small = ("--data", text, "--samples", 2, "--sequence-length", 16)
    pruned, distilled = tmp_path / "pruned", tmp_path / "distilled"
    training = ("--tokens", 64, "--sequence-length", 16, "--batch", 2, "--dry-run")
    for arguments in (
        ("score", folder, *small, "--layers", 1, "-o", tmp_path / "scores.safetensors"),
        ("prune", folder, *small, "--keep", "attention=2", "--no-compensate", "-o", pruned),
        ("distill", pruned, "--data", text, *training, "-o", distilled),
        ("evaluate", folder, "--against", folder, "--data", text, "--sequence-length", 16, "--max-tokens", 64),
        ("export", folder, "--fp8", *small, "--dry-run", "-o", tmp_path / "out"),
    ):
        result = run_cli(*arguments)
        assert result.exit_code == 0, result.output
        assert "stored in FP8 and decoded to BF16 as they are read" in " ".join(result.output.split()), result.output
    assert "quantization_config" not in json.loads((pruned / "config.json").read_text())
    assert load_file(pruned / SINGLE_FILE)["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
