"""Guarantee: on the embedded trained hybrid, exports cost what they should and others compute the same from them.

ModelOpt's own fake-quantised model is the reference for the first layout, plain transformers with the package
compressed-tensors for the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import minipuzzle
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.corpus import read_documents, sample_windows
from minipuzzle.evaluate import divergence_sums
from minipuzzle.export.layout import export_layout
from minipuzzle.export.run import ExportRequest, export_checkpoint
from minipuzzle.models import load_model, load_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_hybrid"


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return Checkpoint.open(EXAMPLE / "model")


def text_tokens(source: Checkpoint, file: str, num_samples: int) -> torch.Tensor:
    documents = read_documents([EXAMPLE / "text" / file])
    tokenizer = load_tokenizer(source.folder)
    return sample_windows(tokenizer, documents, num_samples=num_samples, sequence_length=250)


@torch.inference_mode()
def logits_of(model: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(token_ids, use_cache=False).logits
    return logits.float()


def loss_of(logits: torch.Tensor, token_ids: torch.Tensor) -> float:
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()))


def kl_between(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> float:
    teacher, student = teacher_logits.flatten(0, 1), student_logits.flatten(0, 1)
    return divergence_sums(teacher, student)[0] / len(teacher)


def test_each_fp8_layer_computes_what_modelopts_fake_quantised_layer_does_and_the_export_costs_little(
    source: Checkpoint, tmp_path: Path
) -> None:
    """Layer by layer on equal inputs: through 26 layers, single roundings that fall to the other side add up."""
    import modelopt.torch.quantization as mtq

    calibration, heldout = text_tokens(source, "calibration.jsonl", 4), text_tokens(source, "heldout_code.jsonl", 4)
    request = ExportRequest(scheme="fp8", verifies=False)
    export_checkpoint(source, tmp_path / "fp8", request, calibration_token_ids=calibration)
    ours: Any = minipuzzle.load(tmp_path / "fp8")
    assert loss_of(logits_of(ours, heldout), heldout) - loss_of(logits_of(load_model(source), heldout), heldout) <= 0.01
    reference: Any = load_model(source)
    mtq.quantize(reference, mtq.FP8_DEFAULT_CFG, lambda model: model(calibration, use_cache=False))
    errors: dict[str, float] = {}

    def compare(linear: nn.Module, name: str, inputs: torch.Tensor, expected: torch.Tensor) -> None:
        errors[name] = float((linear(inputs) - expected).norm() / expected.norm())

    for module in export_layout(source.architecture, scheme="fp8").quantized:
        name = source.family.modules.module_name(module)
        linear = ours.get_submodule(name)
        reference.get_submodule(name).register_forward_hook(
            lambda _m, args, out, linear=linear, name=name: compare(linear, name, args[0], out)
        )
    logits_of(reference, heldout[:1])
    assert len(errors) == 60
    # ModelOpt calibrates q, k and v one by one; engines need one scale for the three, and so does the export.
    alone = {name: error for name, error in errors.items() if not name.endswith(("q_proj", "k_proj", "v_proj"))}
    assert max(alone.values()) < 1e-3, max(alone.items(), key=lambda item: item[1])
    assert max(errors.values()) < 0.06


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
    source.family.prepare(theirs)
    expected = logits_of(theirs, heldout)
    assert heldout.numel() == 2000
    assert kl_between(expected, logits_of(minipuzzle.load(tmp_path / "out"), heldout)) < 1e-3
    without = minipuzzle.load(tmp_path / "out", rounds_activations=False)
    assert kl_between(expected, logits_of(without, heldout)) > 1e-3, "activations must matter here"
