"""The proof that a folder computes what was calibrated: reload it, run it, compare with its source rounded alike.

Shape suffixes: B windows, T tokens of a window, N tokens of all windows, H hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from minipuzzle.architecture.model import PlacedTensor
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.calibration import open_stack
from minipuzzle.export.reader import QuantizedCheckpoint, open_any, round_activations
from minipuzzle.export.write import (
    ExportTensors,
    WeightScales,
    export_headers,
    piece_rows,
    portable_config,
    read_source,
    source_name,
)
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.formats.layout import WEIGHT, ExportLayout
from minipuzzle.quality.evaluate import divergence_sums, head_chunks
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.rounded_linear import RoundedLinear

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
    """What a folder computes on a slice of text, and beside it the model that it was made from, where that is known.

    ``after``: of the folder, its KL and agreement from the source: the cost of rounding. ``relative_difference``: of
    the LM head's inputs, to the source rounded alike; 0 up to kernels' own noise, None where they were not compared.
    """

    after: Quality
    before: Quality | None = None
    relative_difference: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """All figures by name; only where the source is known."""
        assert self.before is not None
        return {
            "relative_difference": self.relative_difference,
            "kl_from_source": self.after.kl,
            "agreement_with_source": self.after.agreement,
            "source_loss": self.before.loss,
            "loss": self.after.loss,
            "num_tokens": self.after.num_tokens,
        }


def verification_slice(token_ids_BT: torch.Tensor) -> torch.Tensor:
    """The first windows of some tokens, a few thousand tokens together."""
    num_windows = max(1, _SLICE_TOKENS // token_ids_BT.shape[1])
    return token_ids_BT[:num_windows, :_SLICE_TOKENS]


class RoundedSource(Checkpoint):
    """A source checkpoint that reads as its export should: decoded values for quantised weights, BF16 for the rest.

    It is computed from the source alone, not from anything written.
    """

    def __init__(self, tensors: ExportTensors) -> None:
        source = tensors.checkpoint
        entries = {tensor.name: source.entries[source_name(source, tensor)] for tensor in tensors.tensors}
        super().__init__(source.folder, portable_config(source), entries)
        self._export = tensors
        self._tensors = {tensor.name: tensor for tensor in tensors.tensors}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the source after the rounding that the export gives it, in float32."""
        stored = read_source(self._export.checkpoint, self._tensors[name])
        module, layout = name.removesuffix(WEIGHT), self._export.layout
        if not name.endswith(WEIGHT) or not layout.is_quantized(module):
            return stored.to(torch.bfloat16).float()
        assert layout.scheme is not None
        scale = self._export.weight_scale(module)
        values = torch.empty(stored.shape)
        for first, end in piece_rows(stored.shape):
            rows = stored[first:end].float()
            values[first:end] = layout.scheme.fake_quantize(rows, scale, self._export.row_scale_dtype)
        return values


def expected_states(tensors: ExportTensors, token_ids_BT: torch.Tensor, compute: Compute = Compute()) -> ExpectedStates:
    """Run a source on tokens as it is, and with weights and activations rounded as its export rounds them."""
    _return_freed_memory()  # of calibration
    plain = open_stack(tensors.checkpoint, token_ids_BT, compute)
    source_NH = head_inputs(plain, token_ids_BT)
    del plain
    _return_freed_memory()
    rounded = open_stack(RoundedSource(tensors), token_ids_BT, compute)
    return ExpectedStates(source=source_NH, rounded=head_inputs(rounded, token_ids_BT, tensors.layout, tensors.scales))


def verify_against(
    tensors: ExportTensors,
    folder: Path,
    token_ids_BT: torch.Tensor,
    expected: ExpectedStates,
    compute: Compute = Compute(),
) -> Verification:
    """Read a written folder, run it on tokens, and compare it with what was expected.

    Raises: MinipuzzleError if it does not compute what was expected of it.
    """
    written = open_any(folder, is_export=True)
    _return_freed_memory()
    stack = open_stack(written, token_ids_BT, compute)
    found_NH = head_inputs(stack, token_ids_BT, *_rounding(written))
    del stack
    _return_freed_memory()
    difference = float((found_NH - expected.rounded).norm() / expected.rounded.norm())
    if not difference <= _TOLERANCE:  # also true for NaN
        raise MinipuzzleError(
            f"{folder} does not compute what was calibrated: its states differ by {difference:.2%}",
            "do not deploy it; check the disk and run the command again",
        )
    compared = compare(written, found_NH, token_ids_BT, tensors.checkpoint, expected.source, compute)
    return replace(compared, relative_difference=difference)


def compare_folders(
    model: Checkpoint,
    against: Checkpoint | None,
    token_ids_BT: torch.Tensor,
    compute: Compute = Compute(),
) -> Verification:
    """Run one or two readable checkpoints on tokens, a layer at a time where memory holds no more.

    Raises: MinipuzzleError if a model does not fit, or does not compute finite numbers.
    """
    states = []
    for checkpoint in (model, against):
        if checkpoint is not None:
            stack = open_stack(checkpoint, token_ids_BT, compute)
            states.append(head_inputs(stack, token_ids_BT, *_rounding(checkpoint)))
            del stack
            if not torch.isfinite(states[-1]).all():
                raise MinipuzzleError(f"{checkpoint.folder} computes NaN or infinite values", "do not deploy it")
    return compare(model, states[0], token_ids_BT, against, states[-1], compute)


def verify_plain(tensors: ExportTensors, folder: Path) -> None:
    """Read a BF16 export back and compare each tensor with the source's, rounded once.

    Raises: MinipuzzleError naming the first tensor that differs.
    """
    for name in unlike_source(tensors, Checkpoint.open(folder)):
        raise MinipuzzleError(f"{name} was not written correctly to {folder}", "check the disk")


def unlike_source(tensors: ExportTensors, written: Checkpoint, *, is_ours: bool = True) -> Iterator[str]:
    """Names of stored tensors, or of weights, that are not the source's rounded alike.

    Scales of activations are not compared: they depend on the calibration text. ``is_ours``: to the bit. Other programs
    may round otherwise, so that their weights may be twice as far from the source as ours.
    """
    expected = export_headers(tensors.checkpoint.architecture, tensors.layout)
    shapes = {name: entry.shape for name, entry in written.entries.items()}
    unlike = [name for name in expected | shapes if name not in expected or shapes.get(name) != expected[name].shape]
    yield from unlike
    for tensor in () if unlike else tensors.tensors:
        if not is_ours:
            if _is_further_than_ours(tensors, written, tensor):
                yield tensor.name
            continue
        different = {}
        for name, first, values in tensors.stored(tensor, with_measured=False):
            found = written.unchecked_rows(name, first, first + len(values) if values.ndim else None)
            if found.dtype != values.dtype or not torch.equal(_bytes_of(found), _bytes_of(values)):
                different[name] = True
        yield from different


def _bytes_of(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1).view(torch.uint8)


def _is_further_than_ours(tensors: ExportTensors, written: Checkpoint, tensor: PlacedTensor) -> bool:
    source = read_source(tensors.checkpoint, tensor).float()
    found, rounded = (
        checkpoint.tensor(tensor.name).float() for checkpoint in (open_any(written), RoundedSource(tensors))
    )
    return not (found - source).norm() <= 2 * (rounded - source).norm()


def _rounding(checkpoint: Checkpoint) -> tuple[ExportLayout | None, WeightScales | None]:
    if isinstance(checkpoint, QuantizedCheckpoint):
        return checkpoint.layout, checkpoint.scales
    return None, None


@torch.inference_mode()
def head_inputs(
    stack: LayerStack,
    token_ids_BT: torch.Tensor,
    layout: ExportLayout | None = None,
    scales: WeightScales | None = None,
) -> torch.Tensor:
    """What the LM head's matrix is multiplied with, ``[N, H]`` float32, activations rounded where a layout says so."""
    if layout is not None and scales is not None and layout.scheme is not None:
        modules = stack.checkpoint.family.modules
        stack.replace_modules(lambda model: round_activations(model, modules, layout, scales))
    hidden_BTH = stack.embed(token_ids_BT)
    for layer_idx in range(stack.num_layers):
        # Window by window: matrix products may round differently in batches of another size, and an activation
        # that then falls to the other side of a rounding's midpoint would look like an error of the export.
        for window_idx in range(len(hidden_BTH)):
            window_1TH = hidden_BTH[window_idx : window_idx + 1]
            stack.apply(layer_idx, window_1TH, out=window_1TH)
    states_NH = stack.final_norm(hidden_BTH).flatten(0, 1)
    head = stack.module_on_disk(stack.architecture.names.head.removesuffix(WEIGHT))
    return (head.round_inputs(states_NH) if isinstance(head, RoundedLinear) else states_NH).cpu()


@torch.inference_mode()
def compare(
    model: Checkpoint,
    states_NH: torch.Tensor,
    token_ids_BT: torch.Tensor,
    against: Checkpoint | None,
    against_NH: torch.Tensor,
    compute: Compute = Compute(),
) -> Verification:
    """Losses, KL and agreement from what two LM heads see; windows follow each other in ``states_NH``."""
    device = compute.torch_device
    head_VH = _head(model, device)
    against_head_VH = None if against is None else _head(against, device)
    labels_N = F.pad(token_ids_BT[:, 1:], (0, 1), value=-100).flatten().to(device)
    sums = dict.fromkeys(("loss", "against_loss", "kl", "agreed"), 0.0)
    for chunk in head_chunks(len(states_NH), len(head_VH)):
        logits_CV = F.linear(states_NH[chunk].to(device), head_VH.float())
        sums["loss"] += float(F.cross_entropy(logits_CV, labels_N[chunk], ignore_index=-100, reduction="sum"))
        if against_head_VH is None:
            continue
        against_CV = F.linear(against_NH[chunk].to(device), against_head_VH.float())
        sums["against_loss"] += float(F.cross_entropy(against_CV, labels_N[chunk], ignore_index=-100, reduction="sum"))
        kl, agreed = divergence_sums(against_CV, logits_CV)
        sums["kl"] += kl
        sums["agreed"] += agreed
    num_tokens, num_labels = len(states_NH), max(1, int((labels_N != -100).sum()))
    after = Quality(loss=sums["loss"] / num_labels, num_tokens=num_tokens)
    if against is None:
        return Verification(after=after)
    return Verification(
        after=replace(after, kl=sums["kl"] / num_tokens, agreement=sums["agreed"] / num_tokens),
        before=Quality(loss=sums["against_loss"] / num_labels, num_tokens=num_tokens),
    )


def _return_freed_memory() -> None:
    """Give back to the system what layers have left in the C library's heaps, one of which a reading thread fills."""
    gc.collect()  # layers and their hooks refer to each other
    with suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _head(checkpoint: Checkpoint, device: torch.device) -> torch.Tensor:
    """As stored: two heads of a small model in float32 would be most of the memory in use."""
    architecture = checkpoint.architecture.deployed
    name = architecture.names.embeddings if architecture.tied_embeddings else architecture.names.head
    tensor = next(tensor for tensor in architecture.tensors() if tensor.name == name)
    return read_source(checkpoint, tensor).to(device)


def scale_figures(export: QuantizedCheckpoint) -> Mapping[str, float]:
    """Sanity of an export's scales: smallest and largest of weights and inputs, by name; reads no weights."""
    figures: dict[str, float] = {}
    for kind, scales in (("weight", export.scales.weights), ("input", export.scales.inputs)):
        values = [float(scale) for scale in scales.values()]
        if values and export.layout.scheme is not None and export.layout.scheme.has_tensor_scale:
            figures |= {f"smallest_{kind}_scale": min(values), f"largest_{kind}_scale": max(values)}
    return figures
