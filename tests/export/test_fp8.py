"""Guarantee: an FP8 export holds exactly the codes, scales and configuration that engines of ModelOpt's layout expect,
and our reader computes from it what ModelOpt's own quantiser computes from the source.

The reference for codes is a table of all E4M3 values, made from the format's definition; torch's cast is not used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.calibration import ActivationAmax, calibration_bytes
from minipuzzle.export.reader import load_any_model
from minipuzzle.export.verify import ExpectedStates, verify_against
from minipuzzle.export.write import ExportTensors
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.files.safetensors_files import SINGLE_FILE
from minipuzzle.formats.e4m3 import encode, fake_quantize, scale_of
from minipuzzle.formats.layout import ExportLayout, export_layout
from minipuzzle.quality.evaluate import divergence_sums
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import largest_part_bytes
from minipuzzle.runtime.models import load_model
from minipuzzle.workflows.export import ExportedFolder, ExportRequest, export_checkpoint
from tests.support.oracles import e4m3_table, reference_codes
from tests.support.text import random_tokens
from tests.support.tiny_models import VOCABULARY, write_tiny_checkpoint

PATTERN = "M-M*-M-"
ATTENTION = "backbone.layers.3.mixer"
LINEAR = ("in_proj", "out_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")


TOKEN_IDS = random_tokens(6, 24, first=3)


def export_fp8(
    source: Checkpoint, token_ids: torch.Tensor, out: Path, compute: Compute = Compute(), **settings: Any
) -> ExportedFolder:
    request = ExportRequest(scheme="fp8", **settings)
    return export_checkpoint(source, out, request, compute, calibration_token_ids=token_ids)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "source", pattern=PATTERN))


@pytest.fixture(scope="module")
def exported(source: Checkpoint) -> Path:
    out = source.folder.parent / "fp8"
    export_fp8(source, TOKEN_IDS, out)
    return out


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_every_e4m3_value_encodes_to_its_own_code() -> None:
    values = torch.from_numpy(e4m3_table()).float()
    assert encode(values, torch.tensor(1.0)).view(torch.uint8).tolist() == list(range(127))


def test_midpoints_between_codes_round_to_the_even_code() -> None:
    table = e4m3_table()
    midpoints = (table[1:] + table[:-1]) / 2
    codes = encode(torch.from_numpy(midpoints).float(), torch.tensor(1.0)).view(torch.uint8)
    assert all(code % 2 == 0 for code in codes.tolist())


def test_values_beyond_448_scales_saturate_and_never_become_nan() -> None:
    codes = encode(torch.tensor([1e30, -1e30, 449.0, 480.0]), torch.tensor(1.0)).view(torch.uint8)
    assert codes.tolist() == [126, 254, 126, 126]


def test_a_tensor_of_zeros_gets_scale_one_and_codes_zero() -> None:
    scale = scale_of(0.0)
    assert scale.item() == 1.0
    assert fake_quantize(torch.zeros(3), scale).tolist() == [0.0, 0.0, 0.0]


def test_codes_equal_a_single_rounding_in_float64(source: Checkpoint, exported: Path) -> None:
    stored = load_file(exported / SINGLE_FILE)
    num_checked = 0
    for name, codes in stored.items():
        if codes.dtype == torch.float8_e4m3fn:
            scale = stored[name.replace(".weight", ".weight_scale")].item()
            expected = reference_codes(source.tensor(name).numpy(), scale)
            np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), expected, err_msg=name)
            num_checked += 1
    assert num_checked == 3 * 2 + 3 * 2 + 4


def test_weight_scales_are_amax_over_448_and_shared_by_query_key_and_value(source: Checkpoint, exported: Path) -> None:
    stored = load_file(exported / SINGLE_FILE)
    fused = [f"{ATTENTION}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    fused_amax = max(source.tensor(f"{module}.weight").abs().max().item() for module in fused)
    assert {stored[f"{module}.weight_scale"].item() for module in fused} == {
        float(np.float32(fused_amax) / np.float32(448))
    }
    assert len({stored[f"{module}.input_scale"].item() for module in fused}) == 1
    for name, scale in stored.items():
        if name.endswith("weight_scale") and name.removesuffix(".weight_scale") not in fused:
            amax = source.tensor(name.removesuffix("_scale")).abs().max().numpy()
            assert scale.item() == float(amax / np.float32(448)), name


def test_input_scales_are_the_largest_calibrated_input_over_448(source: Checkpoint, exported: Path) -> None:
    inputs: dict[str, torch.Tensor] = {}
    model = load_model(source)
    for name, module in model.named_modules():
        if name.endswith(LINEAR):
            module.register_forward_hook(lambda _m, args, _out, name=name: inputs.update({name: args[0]}))
    with torch.inference_mode():
        model(TOKEN_IDS, use_cache=False)
    stored = load_file(exported / SINGLE_FILE)
    for name, values in inputs.items():
        scale = stored[name.replace("model.", "backbone.") + ".input_scale"]
        # Batches of other sizes may round matrix products differently.
        assert scale.item() == pytest.approx(values.abs().max().item() / 448, rel=1e-5), name


def test_every_tensor_has_its_specified_precision_and_nothing_else_is_stored(exported: Path) -> None:
    linear = {name for name in load_file(exported / SINGLE_FILE) if name.split(".")[-2] in LINEAR}
    for name, tensor in load_file(exported / SINGLE_FILE).items():
        if name not in linear:
            assert tensor.dtype == torch.bfloat16, name
        elif name.endswith("_scale"):
            assert tensor.dtype == torch.float32 and tensor.shape == (), name
        else:
            assert tensor.dtype == torch.float8_e4m3fn, name
    assert not any(name.endswith(("k_scale", "v_scale")) for name in linear)


def test_both_configs_name_the_same_unquantised_modules(exported: Path) -> None:
    ignored = json.loads((exported / "config.json").read_text())["quantization_config"]["ignore"]
    excluded = json.loads((exported / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    convolutions = {f"backbone.layers.{layer_idx}.mixer.conv1d" for layer_idx in (0, 2, 5)}
    assert set(ignored) == {"lm_head", "backbone.embeddings", *convolutions}
    assert excluded == ignored
    assert not any("\0" in name for name in ignored)


def test_no_ignored_name_is_part_of_a_quantised_one_even_with_many_layers(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, pattern="M*" * 11)
    layout = export_layout(Checkpoint.open(folder).architecture, scheme="fp8", recipe="mamba-safe")
    assert not any(ignored in module for ignored in layout.ignored for module in layout.quantized)
    with pytest.raises(AssertionError, match="would also catch"):
        ExportLayout(quantized=("backbone.layers.10.mixer.in_proj",), ignored=("backbone.layers.1",))
    with pytest.raises(AssertionError, match="unprintable"):
        ExportLayout(quantized=(), ignored=("lm_head.\0backbone",))


def test_mamba_safe_leaves_all_of_attention_in_bf16_and_lists_it(source: Checkpoint, tmp_path: Path) -> None:
    export_fp8(source, TOKEN_IDS, tmp_path / "out", recipe="mamba-safe")
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert stored[f"{ATTENTION}.{name}.weight"].dtype == torch.bfloat16
        assert f"{ATTENTION}.{name}" in ignored
        assert f"{ATTENTION}.{name}.input_scale" not in stored
    assert stored["backbone.layers.0.mixer.in_proj.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("recipe", ["default", "mamba-safe"])
def test_an_fp8_cache_stores_the_scales_of_keys_and_values(source: Checkpoint, tmp_path: Path, recipe: str) -> None:
    export_fp8(source, TOKEN_IDS, tmp_path / "out", recipe=recipe, fp8_kv_cache=True)
    outputs: dict[str, torch.Tensor] = {}
    model = load_model(source)
    for name in ("k_proj", "v_proj"):
        linear = model.get_submodule(f"model.layers.3.mixer.{name}")
        linear.register_forward_hook(lambda _m, _args, out, name=name: outputs.update({name: out}))
    with torch.inference_mode():
        model(TOKEN_IDS, use_cache=False)
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    for name, scale_name in (("k_proj", "k_scale"), ("v_proj", "v_scale")):
        scale = stored[f"{ATTENTION}.{name}.{scale_name}"]
        assert scale.item() == pytest.approx(outputs[name].abs().max().item() / 448, rel=1e-5)
    quantization = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert quantization["kv_cache_quant_algo"] == "FP8"


def test_the_written_config_is_portable_strict_json_that_transformers_reads(exported: Path) -> None:
    from transformers import AutoConfig

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    config = json.loads((exported / "config.json").read_text(), parse_constant=refuse)
    forbidden = {
        "layers_block_type",
        "layer_types",
        "num_experts_per_tok",
        "n_routed_experts",
        "time_step_limit",
        "auto_map",
    }
    assert not forbidden & config.keys()
    assert config["hybrid_override_pattern"] == PATTERN and config["num_hidden_layers"] == len(PATTERN)
    assert config["tie_word_embeddings"] is False
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(exported).num_hidden_layers == len(PATTERN)


def test_our_reader_computes_what_modelopt_computes_from_the_source(source: Checkpoint, tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq

    # ModelOpt gives q, k and v scales of their own: equal largest weights make them the shared one. It leaves the
    # rest of the model in float32: values that BF16 holds exactly are the same in both.
    tensors = {name: source.tensor(name).clone() for name in source.entries}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensor[0, 0] = 1.1
        elif name.split(".")[-2] not in LINEAR:
            tensor.copy_(tensor.to(torch.bfloat16))
    folder = write_tiny_checkpoint(tmp_path / "source", pattern=PATTERN)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    export_fp8(checkpoint, TOKEN_IDS, tmp_path / "out")

    reference = load_model(checkpoint)
    mtq.quantize(reference, mtq.FP8_DEFAULT_CFG, lambda model: model(TOKEN_IDS, use_cache=False))
    token_ids = TOKEN_IDS
    with torch.inference_mode():
        expected = reference(token_ids, use_cache=False).logits
        found = load_any_model(tmp_path / "out")(token_ids, use_cache=False).logits
        unquantised = load_model(checkpoint)(token_ids, use_cache=False).logits
    error = (found - expected).norm() / expected.norm()
    cost = (unquantised - expected).norm() / expected.norm()
    assert cost > 0.02, "the model must feel FP8, or the comparison proves nothing"
    assert error < 0.02 * cost
    assert divergence_sums(expected.flatten(0, 1), found.flatten(0, 1))[0] / token_ids.numel() < 1e-4


def test_verification_refuses_a_folder_with_one_scale_slightly_off(source: Checkpoint, copied: Path) -> None:
    token_ids = TOKEN_IDS
    model = load_any_model(copied)
    with torch.inference_mode():
        states = torch.cat([model.get_submodule("model")(window[None], use_cache=False)[0][0] for window in token_ids])
    expected = ExpectedStates(source=states, rounded=states)
    tensors_of_export = ExportTensors(source, export_layout(source.architecture, scheme="fp8"), ActivationAmax())
    found = verify_against(tensors_of_export, copied, token_ids, expected)
    assert found.relative_difference == pytest.approx(0, abs=1e-5)
    tensors = load_file(copied / SINGLE_FILE)
    tensors[f"{ATTENTION}.o_proj.weight_scale"] *= 1.02
    save_file(tensors, copied / SINGLE_FILE)
    with pytest.raises(MinipuzzleError, match="does not compute what was calibrated"):
        verify_against(tensors_of_export, copied, token_ids, expected)


def test_the_source_is_untouched_and_the_export_measures_its_own_cost(source: Checkpoint, tmp_path: Path) -> None:
    before = (source.folder / SINGLE_FILE).read_bytes()
    found = export_fp8(source, TOKEN_IDS, tmp_path / "out").verification
    assert (source.folder / SINGLE_FILE).read_bytes() == before
    assert found is not None and found.relative_difference == 0.0
    assert 0 < (found.after.kl or 0) < 1
    assert found.after.num_tokens == TOKEN_IDS.numel()


def test_exporting_twice_gives_the_same_bytes(source: Checkpoint, exported: Path, tmp_path: Path) -> None:
    export_fp8(source, TOKEN_IDS, tmp_path / "again")
    for file in exported.iterdir():
        if file.name != "report.html":  # is headed by the folder's name
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_shards_hold_the_same_tensors_as_one_file(source: Checkpoint, exported: Path, tmp_path: Path) -> None:
    export_fp8(source, TOKEN_IDS, tmp_path / "out", max_shard_bytes=20_000)
    sharded, single = Checkpoint.open(tmp_path / "out"), Checkpoint.open(exported)
    assert len({entry.shard for entry in sharded.entries.values()}) > 2
    assert sharded.entries.keys() == single.entries.keys()
    assert sharded.architecture == single.architecture


def test_a_tied_model_is_exported_with_a_head_of_its_own(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(folder / SINGLE_FILE)
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    export_fp8(Checkpoint.open(folder), TOKEN_IDS, tmp_path / "out")
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    assert torch.equal(stored["lm_head.weight"], stored["backbone.embeddings.weight"])


@pytest.mark.parametrize("suffix", ["weight_scale", "input_scale", "weight"])
def test_the_reader_refuses_a_missing_tensor(copied: Path, suffix: str) -> None:
    tensors = load_file(copied / SINGLE_FILE)
    del tensors[f"{ATTENTION}.o_proj.{suffix}"]
    save_file(tensors, copied / SINGLE_FILE)
    with pytest.raises(MinipuzzleError, match=f"o_proj.{suffix} is missing"):
        load_any_model(copied)


def test_the_reader_refuses_unexpected_tensors_and_wrong_precisions_and_shapes(copied: Path) -> None:
    whole = load_file(copied / SINGLE_FILE)
    damages = (
        ("k_proj.k_scale", torch.tensor(1.0), "is unexpected"),
        ("o_proj.weight", whole[f"{ATTENTION}.o_proj.weight"].to(torch.bfloat16), "is stored as BF16, not F8_E4M3"),
        ("o_proj.weight_scale", torch.ones(1), r"has shape \[1\], not \[\]"),
        ("o_proj.weight_scale", torch.tensor(0.0), "must be positive"),
        ("o_proj.weight", torch.full_like(whole[f"{ATTENTION}.o_proj.weight"], torch.nan), "not numbers"),
    )
    for name, tensor, problem in damages:
        save_file({**whole, f"{ATTENTION}.{name}": tensor}, copied / SINGLE_FILE)
        with pytest.raises(MinipuzzleError, match=problem):
            load_any_model(copied)


def test_the_reader_refuses_a_truncated_file(copied: Path) -> None:
    content = (copied / SINGLE_FILE).read_bytes()
    (copied / SINGLE_FILE).write_bytes(content[:-10])
    with pytest.raises(MinipuzzleError, match="truncated"):
        load_any_model(copied)


def test_the_reader_refuses_other_quantisation_formats_and_contradicting_configs(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    fp8 = config["quantization_config"]
    for changes, problem in (
        ({"quant_method": "awq"}, "awq/FP8 cannot be decoded, which is AWQ"),
        ({"ignore": ["lm_head.\0sentinel"]}, "ignore list"),
        ({"ignore": ["lm_head"]}, "exclude_modules is not ignore"),
    ):
        write_json(copied / "config.json", {**config, "quantization_config": {**fp8, **changes}})
        with pytest.raises(MinipuzzleError, match=problem):
            load_any_model(copied)


def test_exports_are_not_exported_again_and_unknown_tokens_are_refused(
    source: Checkpoint, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(MinipuzzleError, match="was not decoded"):
        export_fp8(Checkpoint.open(exported), TOKEN_IDS, tmp_path / "out")
    with pytest.raises(MinipuzzleError, match=f"token id {VOCABULARY}"):
        export_fp8(source, torch.tensor([[1, VOCABULARY]]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_memory_for_one_layer_at_a_time_is_enough(source: Checkpoint, exported: Path, tmp_path: Path) -> None:
    needed = calibration_bytes(source, TOKEN_IDS) + largest_part_bytes(source.architecture, torch.float32)
    export_fp8(source, TOKEN_IDS, tmp_path / "out", Compute(memory_bytes=needed))
    found, expected = load_file(tmp_path / "out" / SINGLE_FILE), load_file(exported / SINGLE_FILE)
    for name, tensor in expected.items():
        # Other batch sizes may round matrix products, and so measured inputs, differently.
        assert torch.allclose(found[name].float(), tensor.float(), rtol=1e-5, atol=0), name
    with pytest.raises(MinipuzzleError, match="may be used"):
        export_fp8(source, TOKEN_IDS, tmp_path / "small", Compute(memory_bytes=needed - 1))
    assert not list(tmp_path.glob("small*"))
