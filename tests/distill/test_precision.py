"""FP8 in training: FP8 compute keeps the ends of the model precise and never stops a run on other devices; training
through an export's rounding computes with the very weights that the export stores.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from distill.engine import EngineSettings
from distill.objective.pair import HiddenStates
from distill.scale.low_precision import UNCONVERTED_GEMMS, float8_obstacle, train_through_fp8, use_float8_compute
from minipuzzle.devices import Device
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.formats.e4m3 import decode, fake_quantize, scale_of
from minipuzzle.runtime.models import load_model
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.cli import run_cli
from tests.support.tiny_models import write_tiny_checkpoint

TOKENS_BT = torch.arange(64).reshape(2, 32) % 250 + 5


@pytest.fixture(scope="module")
def stored_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("bf16") / "model"
    return Checkpoint.open(write_tiny_checkpoint(folder, pattern="M-*M-*M-", dtype="bfloat16"))


def hidden_states(checkpoint: Checkpoint) -> HiddenStates:
    return HiddenStates(load_model(checkpoint).requires_grad_(True), checkpoint.family)


def linears_to_convert(model: nn.Module) -> set[str]:
    """Linear layers apart from the head, the first and the last few, and those with a size that 16 does not divide."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = [name for name in linears if name != "lm_head"][UNCONVERTED_GEMMS:-UNCONVERTED_GEMMS]
    return {name for name in inside if not any(size % 16 for size in linears[name].weight.shape)}


def gradients_of(part: HiddenStates, names: Iterable[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What a model computes, and the gradients that its square sum gives some of its weights."""
    output = part(TOKENS_BT)
    output.square().sum().backward()
    found = {name: part.model.get_submodule(name).weight.grad for name in names}
    assert all(isinstance(gradient, torch.Tensor) for gradient in found.values())
    return output.detach(), found  # type: ignore[return-value]


def test_fp8_compute_spares_both_ends_and_odd_shapes_and_still_learns(stored_in_bf16: Checkpoint) -> None:
    pytest.importorskip("torchao")
    part, exact = hidden_states(stored_in_bf16), hidden_states(stored_in_bf16)
    shapes, wanted_names = shapes_of(part), linears_to_convert(part.model)
    converted = use_float8_compute(part.model, part.layers, emulate=True)
    assert converted and set(converted) == wanted_names
    assert shapes_of(part) == shapes
    (rounded, gradients), (wanted, exact_gradients) = (gradients_of(p, converted) for p in (part, exact))
    assert 1e-4 < float((rounded - wanted).norm() / wanted.norm()) < 0.2
    for name in converted:
        cosine = F.cosine_similarity(gradients[name].flatten(), exact_gradients[name].flatten(), dim=0)
        assert cosine > 0.9, name


def shapes_of(part: HiddenStates) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in part.named_parameters()}


def test_fp8_compute_is_declined_aloud_where_there_is_none(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    assert float8_obstacle(Device("cpu")) is not None
    outs = [tmp_path / "plain", tmp_path / "fp8"]
    for out, more in zip(outs, ([], ["--fp8"]), strict=True):
        arguments = [str(tiny_folder), "--teacher", str(tiny_folder), "--data", str(text_file), "-o", str(out)]
        options = ["--tokens", "64", "--sequence-length", "32", "--batch", "1", "--device", "cpu", *more]
        result = run_cli("distill", *arguments, *options)
        assert result.exit_code == 0, result.output
        assert ("--fp8 is ignored: the device is cpu" in result.stderr) == bool(more)
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()


def test_fp8_compute_and_qat_exclude_each_other() -> None:
    with pytest.raises(MinipuzzleError, match="both"):
        EngineSettings(fp8=True, qat="fp8")
    with pytest.raises(MinipuzzleError, match="qat is 'int4'"):
        EngineSettings(qat="int4")


def test_qat_computes_with_the_weights_that_the_export_stores(stored_in_bf16: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(
        stored_in_bf16, tmp_path / "fp8", ExportRequest(scheme="fp8", verifies=False), calibration_token_ids=TOKENS_BT
    )
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    part = hidden_states(stored_in_bf16)
    changed = train_through_fp8(part.model, stored_in_bf16)
    in_memory = stored_in_bf16.family.modules.module_name
    codes = {name: tensor for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {in_memory(name) for name in codes} == {f"{module}.weight" for module in changed}
    for name, code in codes.items():
        linear = part.model.get_submodule(in_memory(name).removesuffix(".weight"))
        weight = decode(code, stored[f"{name}_scale"])
        inputs = torch.randn(5, weight.shape[1], requires_grad=True)
        rounded_inputs = fake_quantize(inputs.detach(), scale_of(inputs.detach().abs().amax()))
        found = linear(inputs)
        assert torch.equal(found, F.linear(rounded_inputs, weight)), name
        found.sum().backward()
        # Straight through: what the inputs get is the gradient of the product with the rounded weight.
        torch.testing.assert_close(inputs.grad, weight.sum(0).expand_as(inputs))
        assert linear.weight.grad is not None
        torch.testing.assert_close(linear.weight.grad, rounded_inputs.sum(0).expand_as(weight))
