"""The proof that an FP8 folder computes what was calibrated: reload it, run it, compare with the source rounded alike.

Shape suffixes: B windows, T tokens of a window, N tokens of all windows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import MinipuzzleError
from minipuzzle.evaluate import divergence_sums, head_chunks
from minipuzzle.export.bf16 import deployed_architecture, read_source
from minipuzzle.export.e4m3 import fake_quantize
from minipuzzle.export.layout import WEIGHT, Fp8Layout
from minipuzzle.export.reader import load_any_model, round_activations
from minipuzzle.families import Family
from minipuzzle.models import parts_of

# Same codes, same scales and same kernels give the same states to the last bit. The room is for kernels that are not
# deterministic; a scale that is off by 1 % is already outside it.
_TOLERANCE = 1e-3
_SLICE_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class ExpectedStates:
    """What the LM head should see, ``[N, H]`` float32: in the source as it is, and rounded as the export rounds."""

    source: torch.Tensor
    rounded: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How an export compares with its source on a slice of the calibration tokens.

    ``relative_difference``: of the LM head's inputs, to the source rounded alike; 0 up to kernels' own noise.
    ``kl_from_source``: KL(source || export) in nats/token, the cost of FP8; ``agreement_with_source``: share of tokens.
    """

    relative_difference: float
    kl_from_source: float
    agreement_with_source: float
    num_tokens: int

    def to_json(self) -> dict[str, float | int]:
        """All figures by name."""
        return asdict(self)


def verification_slice(token_ids_BT: torch.Tensor) -> torch.Tensor:
    """The first windows of the calibration tokens, a few thousand tokens together."""
    num_windows = max(1, _SLICE_TOKENS // token_ids_BT.shape[1])
    return token_ids_BT[:num_windows, :_SLICE_TOKENS]


def expected_states(
    model: nn.Module,
    family: Family,
    layout: Fp8Layout,
    scales: Mapping[str, torch.Tensor],
    token_ids_BT: torch.Tensor,
    *,
    device: str = "cpu",
) -> ExpectedStates:
    """Run a source model on tokens, round its weights and activations in place as the export does, and run it again.

    Afterwards the model is the rounded one.
    """
    source_NH = _states(model, family, token_ids_BT, device)
    _round_model(model, family, layout, scales)
    return ExpectedStates(source=source_NH, rounded=_states(model, family, token_ids_BT, device))


@torch.no_grad()
def _round_model(model: nn.Module, family: Family, layout: Fp8Layout, scales: Mapping[str, torch.Tensor]) -> None:
    fp8_weights = {family.modules.module_name(module + WEIGHT): module for module in layout.quantized}
    for name, parameter in model.named_parameters():
        # Never in place: a float32 weight on a CPU is a view of the checkpoint's file in memory, which is read again.
        if module := fp8_weights.get(name):
            parameter.data = fake_quantize(parameter, scales[f"{module}.weight_scale"])
        else:
            parameter.data = parameter.to(torch.bfloat16).to(parameter.dtype)
    round_activations(model, family, layout, scales)


def verify_fp8(
    source: Checkpoint, folder: Path, token_ids_BT: torch.Tensor, expected: ExpectedStates, *, device: str = "cpu"
) -> Verification:
    """Load a written folder, run it on tokens, and compare.

    Raises: MinipuzzleError if it does not compute what was expected of it.
    """
    written = Checkpoint.open(folder)
    model = load_any_model(written, device=device)
    found_NH = _states(model, written.family, token_ids_BT, device)
    del model
    difference = float((found_NH - expected.rounded).norm() / expected.rounded.norm())
    if not difference <= _TOLERANCE:  # also true for NaN
        raise MinipuzzleError(
            f"{folder} does not compute what was calibrated: its states differ by {difference:.2%}",
            "do not deploy it; check the disk and run the command again",
        )
    kl, agreement = _divergence(source, written, expected.source, found_NH, device)
    return Verification(
        relative_difference=difference,
        kl_from_source=kl,
        agreement_with_source=agreement,
        num_tokens=len(found_NH),
    )


@torch.inference_mode()
def _states(model: nn.Module, family: Family, token_ids_BT: torch.Tensor, device: str) -> torch.Tensor:
    parts = parts_of(model, family)
    # One window at a time: the slice is small, and the memory of calibration's batch may be all there is.
    states = [parts.logits_input(window_T[None].to(device))[0].float().cpu() for window_T in token_ids_BT]
    return torch.cat(states)


@torch.inference_mode()
def _divergence(
    source: Checkpoint, written: Checkpoint, source_NH: torch.Tensor, found_NH: torch.Tensor, device: str
) -> tuple[float, float]:
    head = next(t for t in deployed_architecture(source.architecture).tensors() if t.part == "head")
    source_head_VH = read_source(source, head).to(device, torch.float32)
    written_head_VH = written.tensor(head.name).to(device, torch.float32)
    kl, num_agreed = 0.0, 0
    for chunk in head_chunks(len(found_NH), len(source_head_VH)):
        source_logits_CV = F.linear(source_NH[chunk].to(device), source_head_VH)
        written_logits_CV = F.linear(found_NH[chunk].to(device), written_head_VH)
        chunk_kl, chunk_agreed = divergence_sums(source_logits_CV, written_logits_CV)
        kl, num_agreed = kl + chunk_kl, num_agreed + chunk_agreed
    return kl / len(found_NH), num_agreed / len(found_NH)
