"""Guarantee: on the embedded trained hybrid, exports cost what they should and others compute the same from them.

ModelOpt's own fake-quantised model is the reference for the first layout, plain transformers with the package
compressed-tensors for the second.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import minipuzzle
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import sample_windows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.formats.layout import export_layout
from minipuzzle.quality.evaluate import divergence_sums
from minipuzzle.runtime.meta_models import prepare_layers
from minipuzzle.runtime.models import load_model, load_tokenizer
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.oracles import logits_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_hybrid"


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return Checkpoint.open(EXAMPLE / "model")


def text_tokens(source: Checkpoint, file: str, num_samples: int) -> torch.Tensor:
    documents = read_documents([EXAMPLE / "text" / file])
    tokenizer = load_tokenizer(source.folder)
    return sample_windows(tokenizer, documents, num_samples=num_samples, sequence_length=250)


def loss_of(logits: torch.Tensor, token_ids: torch.Tensor) -> float:
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()))


def kl_between(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> float:
    teacher, student = teacher_logits.flatten(0, 1), student_logits.flatten(0, 1)
    return divergence_sums(teacher, student)[0] / len(teacher)


@pytest.fixture(scope="module")
def fp8_folder(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "fp8"
    calibration = text_tokens(source, "calibration.jsonl", 4)
    export_checkpoint(source, folder, ExportRequest(scheme="fp8", verifies=False), calibration_token_ids=calibration)
    return folder


@pytest.fixture
def modelopts_model(source: Checkpoint) -> nn.Module:
    """ModelOpt's fake-quantised model, calibrated by ModelOpt on the text that the export was calibrated on.

    It calibrates q, k and v one by one; engines need one weight scale for the three, so they get the largest.
    """
    import modelopt.torch.quantization as mtq

    model, calibration = load_model(source), text_tokens(source, "calibration.jsonl", 4)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(calibration, use_cache=False))
    for module in model.modules():
        if hasattr(module, "q_proj"):
            quantizers: list[Any] = [getattr(module, name).weight_quantizer for name in ("q_proj", "k_proj", "v_proj")]
            largest = max(quantizer.amax for quantizer in quantizers)
            for quantizer in quantizers:
                quantizer.amax = largest
    return model


def test_fp8_costs_at_most_a_hundredth_of_a_nat(source: Checkpoint, fp8_folder: Path) -> None:
    heldout = text_tokens(source, "heldout_code.jsonl", 4)
    before, after = (logits_of(model, heldout) for model in (load_model(source), minipuzzle.load(fp8_folder)))
    assert loss_of(after, heldout) - loss_of(before, heldout) <= 0.01


def test_each_fp8_layer_computes_what_modelopts_fake_quantised_layer_does_on_equal_inputs(
    source: Checkpoint, fp8_folder: Path, modelopts_model: nn.Module
) -> None:
    ours, heldout = minipuzzle.load(fp8_folder), text_tokens(source, "heldout_code.jsonl", 1)
    errors: dict[str, float] = {}

    def compare(linear: nn.Module, name: str, inputs: torch.Tensor, expected: torch.Tensor) -> None:
        errors[name] = float((linear(inputs) - expected).norm() / expected.norm())

    for module in export_layout(source.architecture, scheme="fp8").quantized:
        name = source.family.modules.module_name(module)
        linear = ours.get_submodule(name)
        modelopts_model.get_submodule(name).register_forward_hook(
            lambda _m, args, out, linear=linear, name=name: compare(linear, name, args[0], out)
        )
    logits_of(modelopts_model, heldout)
    assert len(errors) == 60
    # ModelOpt's kernel multiplies by 448 / amax, so values at a midpoint of two codes may fall to the other side.
    assert sum(error < 1e-6 for error in errors.values()) >= 50
    assert max(errors.values()) < 0.02, max(errors.items(), key=lambda item: item[1])


def test_the_whole_model_computes_what_modelopts_calibrated_model_does(
    source: Checkpoint, fp8_folder: Path, modelopts_model: nn.Module
) -> None:
    """KL below 1e-4 with ModelOpt's calibration, scales and model, and codes from one division as the export has them.

    ModelOpt's own kernel multiplies by 448 / amax instead, which rounds twice: 1 code of 10,000 differs, all at
    midpoints. No bound as tight can hold there, because 26 layers amplify any change: ModelOpt's model in float64 is as
    far from itself in float32 (7e-4 nats/token), with the same codes and scales.
    """
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import register_quant_backend, unregister_quant_backend

    heldout = text_tokens(source, "heldout_code.jsonl", 4)
    ours = logits_of(minipuzzle.load(fp8_folder), heldout)
    modelopts = logits_of(modelopts_model, heldout)
    in_float64 = logits_of(copy.deepcopy(modelopts_model).double(), heldout).float()
    assert kl_between(modelopts, ours) < 2 * kl_between(in_float64, modelopts) < 4e-3

    def one_division(values: torch.Tensor, quantizer: Any) -> torch.Tensor:
        scale = quantizer.amax.float() / 448
        codes = (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        rounded: torch.Tensor = codes.float() * scale
        return rounded.to(values.dtype)

    register_quant_backend("one_division", one_division)
    for module in modelopts_model.modules():
        if isinstance(module, TensorQuantizer):
            module.backend = "one_division"
    calibrated = logits_of(modelopts_model, heldout)
    unregister_quant_backend("one_division")
    assert kl_between(calibrated, ours) < 1e-4
    without = logits_of(minipuzzle.load(fp8_folder, rounds_activations=False), heldout)
    assert kl_between(calibrated, without) > 1e-3, "activations must matter here"


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8"])
def test_plain_transformers_loads_the_compressed_tensors_layout_and_agrees(
    source: Checkpoint, tmp_path: Path, scheme: str
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    calibration, heldout = text_tokens(source, "calibration.jsonl", 4), text_tokens(source, "heldout_speeches.jsonl", 8)
    request = ExportRequest(scheme=scheme, flavour="compressed-tensors", recipe="mamba-safe", verifies=False)
    export_checkpoint(source, tmp_path / "out", request, calibration_token_ids=calibration)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    nn.Module.float(theirs)  # in BF16 the noise of the arithmetic would hide a wrong rounding
    prepare_layers(theirs, source.config)
    expected = logits_of(theirs, heldout)
    assert heldout.numel() == 2000
    assert kl_between(expected, logits_of(minipuzzle.load(tmp_path / "out"), heldout)) < 1e-3
    without = minipuzzle.load(tmp_path / "out", rounds_activations=False)
    assert kl_between(expected, logits_of(without, heldout)) > 1e-3, "activations must matter here"


def test_plain_transformers_decompresses_nvfp4_to_our_weights(source: Checkpoint, tmp_path: Path) -> None:
    """Up to BF16, in which the package compressed-tensors keeps them; how it rounds inputs is its own."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    request = ExportRequest(scheme="nvfp4", flavour="compressed-tensors", verifies=False)
    calibration = text_tokens(source, "calibration.jsonl", 1)
    export_checkpoint(source, tmp_path / "out", request, calibration_token_ids=calibration)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        theirs(calibration[:, :4], use_cache=False)  # it decompresses on first use
    ours = minipuzzle.load(tmp_path / "out")
    for module in export_layout(source.architecture, scheme="nvfp4").quantized:
        name = source.family.modules.module_name(f"{module}.weight")
        found, expected = (nn.Module.get_parameter(model, name).detach().float() for model in (theirs, ours))
        assert torch.allclose(found, expected, rtol=2**-8, atol=0), name
