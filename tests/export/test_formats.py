"""Guarantee: every format and layout holds the codes and scales of its published rule, computed once from the source,
and our reader computes the same from either layout.

References: the rule of NVFP4 in float64 from its definition, and ModelOpt's own packing; a table of E4M3 values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import minipuzzle
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.algorithms import CalibrationMethod
from minipuzzle.export.calibration import calibrated_amax, measure_amax, new_quantizer, open_stack
from minipuzzle.export.reader import QuantizedCheckpoint, open_any
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import SINGLE_FILE
from minipuzzle.formats.e2m1 import block_scales, decode_blocks, encode_blocks
from minipuzzle.formats.layout import export_layout
from minipuzzle.quality.evaluate import evaluate
from minipuzzle.runtime.models import load_model
from minipuzzle.runtime.rounded_linear import RoundedLinear
from minipuzzle.workflows.export import ExportedFolder, ExportRequest, export_checkpoint
from tests.support.cli import run_cli
from tests.support.oracles import e4m3_table, nearest, reference_codes, reference_nvfp4
from tests.support.text import random_tokens
from tests.support.tiny_models import write_tiny_checkpoint

PATTERN = "M-*-"
EVERY_LAYOUT = [
    {"scheme": "fp8", "flavour": "modelopt"},
    {"scheme": "fp8", "flavour": "compressed-tensors"},
    {"scheme": "fp8-dynamic", "flavour": "modelopt"},
    {"scheme": "fp8-dynamic", "flavour": "compressed-tensors"},
    {"scheme": "nvfp4", "flavour": "modelopt"},
    {"scheme": "nvfp4", "flavour": "compressed-tensors"},
]


TOKEN_IDS = random_tokens(4, 24, first=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model") / "source"
    return Checkpoint.open(write_tiny_checkpoint(folder, pattern=PATTERN))


def export(source: Checkpoint, out: Path, **settings: Any) -> ExportedFolder:
    return export_checkpoint(source, out, ExportRequest(**settings), calibration_token_ids=TOKEN_IDS)


@pytest.fixture(scope="module")
def exported(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("exports")
    folders = {}
    for settings in EVERY_LAYOUT:
        out = root / "-".join(settings.values())
        found = export(source, out, **settings).verification
        assert found is not None and found.relative_difference == 0.0, settings
        folders[settings["scheme"], settings["flavour"]] = out
    return folders


def unpack(packed: torch.Tensor) -> np.ndarray:
    low_and_high = np.stack([packed.numpy() & 15, packed.numpy() >> 4], axis=-1)
    flat: np.ndarray[Any, Any] = low_and_high.reshape(len(packed), -1)
    return flat


def test_nvfp4_codes_and_block_scales_equal_the_published_rule_in_float64(
    source: Checkpoint, exported: dict[tuple[str, str], Path]
) -> None:
    stored = load_file(exported["nvfp4", "modelopt"] / SINGLE_FILE)
    modules = [name.removesuffix(".weight_scale_2") for name in stored if name.endswith("weight_scale_2")]
    assert len(modules) == 2 + 4 + 2 * 2
    for module in modules:
        weight = source.tensor(f"{module}.weight").numpy()
        scale = stored[f"{module}.weight_scale_2"].item()
        codes, scales = reference_nvfp4(weight, scale)
        np.testing.assert_array_equal(stored[f"{module}.weight_scale"].float().numpy(), scales, err_msg=module)
        np.testing.assert_array_equal(unpack(stored[f"{module}.weight"]), codes, err_msg=module)
        if "q_proj" not in module and "k_proj" not in module and "v_proj" not in module:
            assert scale == float(np.abs(weight).max() / np.float32(2688)), module
    fused = {stored[f"backbone.layers.2.mixer.{name}_proj.weight_scale_2"].item() for name in "qkv"}
    assert len(fused) == 1


def test_nvfp4_agrees_with_modelopts_packing_on_many_values_and_on_every_midpoint() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator) * torch.logspace(-6, 2, 64)[:, None]
    weight[5, 32:48] = 0.0
    weight[6, 16:32] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 2)
    scale = weight.abs().max() / 2688
    found_scales = block_scales(weight, scale)
    packed, modelopt_scales, _ = NVFP4QTensor.quantize(weight.clone(), 16, None, scale)
    assert torch.equal(found_scales.float(), modelopt_scales.float())
    found = encode_blocks(weight, found_scales, scale)
    differing = (unpack(found) != unpack(packed._quantized_data)).mean()
    # ModelOpt divides in float32, whose quotient may land on a midpoint that the exact one only approaches.
    assert differing < 1e-4
    restored = decode_blocks(found, found_scales, scale)
    assert (
        torch.allclose(
            restored,
            packed.dequantize(torch.float32, block_sizes={-1: 16}, scale=modelopt_scales, double_scale=scale),
            rtol=1e-6,
        )
        or differing > 0
    )
    assert restored[5, 32:48].abs().max() == 0
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2)[None]
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    assert unpack(encode_blocks(midpoints, one, torch.tensor(1.0)))[0, :8].tolist() == [0, 2, 2, 4, 4, 6, 6, 7]


def test_both_layouts_hold_the_same_nvfp4_weights(exported: dict[tuple[str, str], Path]) -> None:
    first, second = (
        load_file(exported["nvfp4", flavour] / SINGLE_FILE) for flavour in ("modelopt", "compressed-tensors")
    )
    differing = total = 0
    for name, packed in second.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            differing += int((unpack(packed) != unpack(first[f"{module}.weight"])).sum())
            total += 2 * packed.numel()
            product = second[f"{module}.weight_global_scale"] * first[f"{module}.weight_scale_2"]
            assert product.item() == pytest.approx(1.0, abs=1e-6)
            assert second[f"{module}.weight_global_scale"].shape == (1,)
    assert total and differing <= 1e-4 * total


def test_several_threads_write_the_same_bytes(
    exported: dict[tuple[str, str], Path], source: Checkpoint, tmp_path: Path
) -> None:
    export(source, tmp_path / "out", scheme="nvfp4", workers=3)
    one = exported["nvfp4", "modelopt"]
    assert (tmp_path / "out" / SINGLE_FILE).read_bytes() == (one / SINGLE_FILE).read_bytes()


def test_block_scales_of_the_least_error_are_verified_and_bring_weights_nearer(
    exported: dict[tuple[str, str], Path], source: Checkpoint, tmp_path: Path
) -> None:
    export(source, tmp_path / "out", scheme="nvfp4", block_scales="mse")
    result = run_cli("verify", tmp_path / "out", "--against", source.folder, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["verdict"] == "ok", result.output
    by_error, by_largest = (open_any(folder) for folder in (tmp_path / "out", exported["nvfp4", "modelopt"]))
    assert isinstance(by_error, QuantizedCheckpoint)
    for module in by_error.layout.quantized:
        weight = source.tensor(module + ".weight").float()
        near, far = ((checkpoint.tensor(module + ".weight") - weight).norm() for checkpoint in (by_error, by_largest))
        assert near < far, module


def test_dynamic_fp8_codes_equal_one_rounding_by_the_stored_row_scale(
    source: Checkpoint, exported: dict[tuple[str, str], Path]
) -> None:
    for flavour, dtype in (("modelopt", torch.float32), ("compressed-tensors", torch.bfloat16)):
        stored = load_file(exported["fp8-dynamic", flavour] / SINGLE_FILE)
        names = [name for name in stored if name.endswith(".weight_scale")]
        assert names and not any("input" in name for name in stored)
        for name in names:
            weight, scales = source.tensor(name.removesuffix("_scale")), stored[name]
            assert scales.dtype == dtype
            amax = weight.abs().amax(-1) / 448
            assert torch.equal(scales.flatten(), amax.to(dtype)), name
            codes = stored[name.removesuffix("_scale")].view(torch.uint8).numpy()
            for row, scale in enumerate(scales.flatten().tolist()):
                np.testing.assert_array_equal(codes[row], reference_codes(weight[row].numpy(), scale))


@pytest.mark.parametrize("settings", EVERY_LAYOUT, ids=lambda settings: "-".join(settings.values()))
def test_load_gives_a_model_from_every_layout_that_rounds_activations_unless_told_not_to(
    source: Checkpoint, exported: dict[tuple[str, str], Path], settings: dict[str, str]
) -> None:
    folder = exported[settings["scheme"], settings["flavour"]]
    with torch.inference_mode():
        rounded = minipuzzle.load(folder)(TOKEN_IDS, use_cache=False).logits
        exact = minipuzzle.load(str(folder), rounds_activations=False)(TOKEN_IDS, use_cache=False).logits
        original = load_model(source)(TOKEN_IDS, use_cache=False).logits
    assert 0 < (exact - original).norm() < (rounded - original).norm() < original.norm()


def test_evaluation_rounds_what_a_quantised_head_sees(source: Checkpoint, tmp_path: Path) -> None:
    """Against whole forward passes of transformers' model, whose head is called."""
    export(source, tmp_path / "out", scheme="nvfp4", recipe="all", verifies=False)
    model, without = minipuzzle.load(tmp_path / "out"), minipuzzle.load(tmp_path / "out")
    head = without.get_submodule("lm_head")
    without.set_submodule("lm_head", RoundedLinear(head, round_inputs=lambda values: values))
    windows = EvaluationWindows(token_ids=TOKEN_IDS[:, :-1], labels=TOKEN_IDS[:, 1:], num_bytes=100)
    with torch.inference_mode():
        logits = model(windows.token_ids, use_cache=False).logits
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.labels.flatten()))
    assert evaluate(model, source.family, windows).loss == pytest.approx(expected, rel=1e-6)
    assert evaluate(without, source.family, windows).loss != pytest.approx(expected, rel=1e-5)


def test_importing_minipuzzle_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, minipuzzle; minipuzzle.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_overrides_change_single_layers_and_are_written_to_both_configs(source: Checkpoint, tmp_path: Path) -> None:
    overrides = (("backbone.layers.1.*", "bf16"), ("*.mixer.[qkv]_proj", "bf16"), ("lm_head", "fp8"))
    export(source, tmp_path / "out", scheme="fp8", overrides=overrides)
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    for name, dtype in (
        ("backbone.layers.1.mixer.up_proj.weight", torch.bfloat16),
        ("backbone.layers.3.mixer.up_proj.weight", torch.float8_e4m3fn),
        ("backbone.layers.2.mixer.k_proj.weight", torch.bfloat16),
        ("backbone.layers.2.mixer.o_proj.weight", torch.float8_e4m3fn),
        ("lm_head.weight", torch.float8_e4m3fn),
    ):
        assert stored[name].dtype == dtype, name
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert "backbone.layers.1.mixer.up_proj" in ignored and "lm_head" not in ignored


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ((("*.mixer.k_proj", "bf16"),), "engines fuse them"),
        ((("*.nothing", "bf16"),), "matches no linear layer"),
        ((("*.up_proj", "int4"),), "one folder holds one format"),
        ((("*", "bf16"),), "leave nothing to quantise"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(
    source: Checkpoint, overrides: tuple[tuple[str, str], ...], problem: str
) -> None:
    with pytest.raises(MinipuzzleError, match=problem):
        export_layout(source.architecture, scheme="fp8", overrides=overrides)


def test_widths_that_blocks_do_not_divide_are_refused_with_the_way_out(tmp_path: Path) -> None:
    odd = Checkpoint.open(write_tiny_checkpoint(tmp_path, pattern="M-", intermediate_size=40))
    with pytest.raises(MinipuzzleError, match=r"down_proj has 40 inputs; nvfp4 needs a multiple of 16"):
        export_layout(odd.architecture, scheme="nvfp4")
    layout = export_layout(odd.architecture, scheme="nvfp4", overrides=(("*.down_proj", "bf16"),))
    assert "backbone.layers.1.mixer.up_proj" in layout.quantized


def test_an_fp8_cache_is_refused_where_nothing_measures_or_reads_its_scales(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(MinipuzzleError, match="no place for cache scales"):
        export_layout(source.architecture, scheme="fp8-dynamic", flavour="compressed-tensors", fp8_kv_cache=True)


@pytest.mark.parametrize("algorithm", ["max", "percentile", "mse"])
def test_streamed_calibration_finds_what_modelopts_calibrator_finds_in_the_whole_model(
    source: Checkpoint, algorithm: str
) -> None:
    """``max`` against mtq.quantize; the histogram methods against a calibrator that saw the same batches at once."""
    import modelopt.torch.quantization as mtq

    method = CalibrationMethod(algorithm=algorithm, percentile=99.0)
    module = "backbone.layers.3.mixer.down_proj"
    stack = open_stack(source, TOKEN_IDS)
    found = measure_amax(stack, TOKEN_IDS, input_modules=[module], method=method).inputs[module]
    model = load_model(source)
    if algorithm == "max":
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(TOKEN_IDS, use_cache=False))
        quantizer = model.get_submodule("model.layers.3.mixer.down_proj.input_quantizer")
        assert isinstance(quantizer, torch.nn.Module)
        amax: Any = quantizer.amax
        assert found == pytest.approx(float(amax), rel=1e-5)
        return
    inputs: list[torch.Tensor] = []
    model.get_submodule("model.layers.3.mixer.down_proj").register_forward_pre_hook(
        lambda _module, args: inputs.append(args[0])
    )
    with torch.inference_mode():
        model(TOKEN_IDS, use_cache=False)
    reference = new_quantizer(method)
    reference(inputs[0])
    assert found == pytest.approx(calibrated_amax(reference, method), rel=0.01)
    values = inputs[0].abs().flatten()
    if algorithm == "percentile":
        assert found == pytest.approx(float(values.quantile(0.99)), rel=0.02)
    else:
        largest = values.max()
        candidates = torch.linspace(0.1, 1.0, 400) * largest
        table = torch.from_numpy(e4m3_table()).float()
        errors = [
            float(
                (
                    (
                        table[nearest((values / (amax / 448)).clamp(max=448).double().numpy(), table.double().numpy())]
                        * (amax / 448)
                        - values
                    )
                    ** 2
                ).sum()
            )
            for amax in candidates
        ]
        ours = float(
            (
                (
                    table[nearest((values / (found / 448)).clamp(max=448).double().numpy(), table.double().numpy())]
                    * (found / 448)
                    - values
                )
                ** 2
            ).sum()
        )
        assert ours <= 1.05 * min(errors)


def test_the_reader_refuses_damage_in_every_layout_and_names_the_tensor(
    exported: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    for folder in exported.values():
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        for extra in {file.name for file in tmp_path.iterdir()} - {file.name for file in folder.iterdir()}:
            (tmp_path / extra).unlink()
        whole = load_file(folder / SINGLE_FILE)
        scale = next(name for name in whole if name.endswith("down_proj.weight_scale"))
        broken = whole[scale].clone().float().reshape(-1)
        for value, problem in ((0.0, "a scale must be positive"), (float("nan"), "")):
            broken[-1] = value
            damaged = broken.view(whole[scale].shape).to(whole[scale].dtype)
            save_file({**whole, scale: damaged}, tmp_path / SINGLE_FILE)
            with pytest.raises(MinipuzzleError, match=f"{scale}.*{problem}"):
                minipuzzle.load(tmp_path)
        without = {name: tensor for name, tensor in whole.items() if name != scale}
        save_file(without, tmp_path / SINGLE_FILE)
        with pytest.raises(MinipuzzleError, match=f"{scale} is missing"):
            minipuzzle.load(tmp_path)
        save_file({**whole, scale: whole[scale].reshape(-1)[:1].reshape(1, 1, 1).clone()}, tmp_path / SINGLE_FILE)
        with pytest.raises(MinipuzzleError, match=f"{scale} has shape"):
            minipuzzle.load(tmp_path)
        save_file({**whole, "stowaway": torch.ones(1)}, tmp_path / SINGLE_FILE)
        with pytest.raises(MinipuzzleError, match="stowaway is unexpected"):
            minipuzzle.load(tmp_path)
