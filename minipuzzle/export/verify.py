"""The proof that an FP8 folder computes what was calibrated: reload it, run it, compare with the source rounded alike.

Shape suffixes: B windows, T tokens of a window, N tokens of all windows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import MinipuzzleError
from minipuzzle.evaluate import divergence_sums, head_chunks
from minipuzzle.export.bf16 import deployed_architecture, portable_config, read_source
from minipuzzle.export.calibration import open_stack
from minipuzzle.export.e4m3 import fake_quantize
from minipuzzle.export.layout import WEIGHT, Fp8Layout
from minipuzzle.export.reader import Fp8Checkpoint, round_activations
from minipuzzle.streaming import LayerStack

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


class RoundedSource(Checkpoint):
    """A source checkpoint that reads as its export should: E4M3 values for quantised weights, BF16 for the rest.

    It is computed from the source alone, not from anything written.
    """

    def __init__(self, source: Checkpoint, layout: Fp8Layout, scales: Mapping[str, torch.Tensor]) -> None:
        tensors = {tensor.name: tensor for tensor in deployed_architecture(source.architecture).tensors()}
        embeddings = source.entries[source.architecture.names.embeddings]
        entries = {name: source.entries.get(name, embeddings) for name in tensors}
        super().__init__(source.folder, portable_config(source), entries)
        self._source = source
        self._tensors = tensors
        self._weight_scales = {module + WEIGHT: scales[f"{module}.weight_scale"] for module in layout.quantized}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the source after the rounding that the export gives it, in float32."""
        values = read_source(self._source, self._tensors[name]).float()
        scale = self._weight_scales.get(name)
        return values.to(torch.bfloat16).float() if scale is None else fake_quantize(values, scale)


def expected_states(
    source: Checkpoint,
    layout: Fp8Layout,
    scales: Mapping[str, torch.Tensor],
    token_ids_BT: torch.Tensor,
    *,
    device: str = "cpu",
    device_memory_bytes: int | None = None,
) -> ExpectedStates:
    """Run a source on tokens as it is, and with weights and activations rounded as its export rounds them."""
    plain = open_stack(source, token_ids_BT, device=device, device_memory_bytes=device_memory_bytes)
    source_NH = _states(plain, token_ids_BT)
    del plain
    rounded_source = RoundedSource(source, layout, scales)
    rounded = open_stack(rounded_source, token_ids_BT, device=device, device_memory_bytes=device_memory_bytes)
    return ExpectedStates(source=source_NH, rounded=_rounded_states(rounded, layout, scales, token_ids_BT))


def verify_fp8(
    source: Checkpoint,
    folder: Path,
    token_ids_BT: torch.Tensor,
    expected: ExpectedStates,
    *,
    device: str = "cpu",
    device_memory_bytes: int | None = None,
) -> Verification:
    """Read a written folder, run it on tokens, and compare.

    Raises: MinipuzzleError if it does not compute what was expected of it.
    """
    written = Fp8Checkpoint(Checkpoint.open(folder))
    stack = open_stack(written, token_ids_BT, device=device, device_memory_bytes=device_memory_bytes)
    found_NH = _rounded_states(stack, written.layout, written.scales, token_ids_BT)
    del stack
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


def _rounded_states(
    stack: LayerStack, layout: Fp8Layout, scales: Mapping[str, torch.Tensor], token_ids_BT: torch.Tensor
) -> torch.Tensor:
    round_activations(stack.module_on_disk, layout, scales)
    return _states(stack, token_ids_BT)


@torch.inference_mode()
def _states(stack: LayerStack, token_ids_BT: torch.Tensor) -> torch.Tensor:
    hidden_BTH = stack.embed(token_ids_BT)
    for layer_idx in range(stack.num_layers):
        # Window by window: matrix products may round differently in batches of another size, and an activation
        # that then falls to the other side of an E4M3 midpoint would look like an error of the export.
        for window_idx in range(len(hidden_BTH)):
            window_1TH = hidden_BTH[window_idx : window_idx + 1]
            stack.apply(layer_idx, window_1TH, out=window_1TH)
    return stack.final_norm(hidden_BTH).flatten(0, 1).cpu()


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
