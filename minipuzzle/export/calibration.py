"""Largest activations of the linear layers that an export quantises, found by ModelOpt's quantisers on text.

The model runs layer by layer over the hidden states of all windows, so one layer's weights in memory are enough.
Shape suffixes: B windows, T tokens, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from minipuzzle.architecture.model import Architecture
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.algorithms import ALGORITHMS, Algorithm, CalibrationMethod
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.formats.e4m3 import E4M3_MAX, fake_quantize
from minipuzzle.progress import Advance, no_progress
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack, largest_activation_bytes


@dataclass(frozen=True, kw_only=True)
class ActivationAmax:
    """Largest absolute input and output of modules, by their names on disk (without ``.weight``)."""

    inputs: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, dict[str, float]]:
        """Both tables."""
        return {"inputs": dict(self.inputs), "outputs": dict(self.outputs)}


def open_stack(checkpoint: Checkpoint, token_ids_BT: torch.Tensor, compute: Compute = Compute()) -> LayerStack:
    """A float32 layer stack with room for the hidden states of all windows.

    Raises: MinipuzzleError if the memory does not suffice.
    """
    in_float32 = replace(compute, dtype="float32")
    return LayerStack(checkpoint, in_float32, reserved_bytes=calibration_bytes(checkpoint, token_ids_BT))


def calibration_bytes(checkpoint: Checkpoint, token_ids_BT: torch.Tensor) -> int:
    """An estimate of the memory that running a model over windows needs beside its weights."""
    hidden_bytes = token_ids_BT.numel() * checkpoint.architecture.hidden * torch.float32.itemsize
    # The layer stack gives a quarter of what is left to the working set of one call.
    return hidden_bytes + 4 * largest_activation_bytes(checkpoint, token_ids_BT.shape[1], torch.float32)


def new_quantizer(method: CalibrationMethod) -> Any:
    """ModelOpt's quantiser of one tensor to E4M3, collecting statistics and changing nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ModelOpt says of newer transformers that it has not tested them
        from modelopt.torch.quantization.config import QuantizerAttributeConfig
        from modelopt.torch.quantization.nn import TensorQuantizer

    calibrator = ALGORITHMS[method.algorithm].calibrator
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3), axis=None, calibrator=calibrator))
    quantizer.disable_quant()
    quantizer.enable_calib()
    return quantizer


def calibrated_amax(quantizer: Any, method: CalibrationMethod) -> float:
    """What a quantiser has found; 0 where it saw only zeros, or nothing, like an expert that no token was routed to."""
    calibrator = quantizer._calibrator
    edges = getattr(calibrator, "_calib_bin_edges", None)
    if getattr(calibrator, "_calib_hist", None) is None and getattr(calibrator, "_calib_amax", None) is None:
        return 0.0
    if edges is not None and not float(edges[-1]) > 0:
        return 0.0
    return float(ALGORITHMS[method.algorithm].find(calibrator, method.percentile))


def _least_squares(calibrator: Any, _percentile: float) -> float:
    # ModelOpt 0.47 fails on its own call for E4M3 (an argument is missing); the histogram is its, the search ours.
    counts, edges = calibrator._calib_hist, calibrator._calib_bin_edges
    return least_squares_amax(torch.as_tensor(counts).cpu(), torch.as_tensor(edges).cpu())


LARGEST = Algorithm(calibrator="max", find=lambda calibrator, _percentile: calibrator.compute_amax())
PERCENTILE = Algorithm(
    calibrator="histogram",
    find=lambda calibrator, percentile: calibrator.compute_amax("percentile", percentile=percentile),
)
LEAST_SQUARES = Algorithm(calibrator="histogram", find=_least_squares)


def least_squares_amax(counts: torch.Tensor, edges: torch.Tensor, first_bin: int = 128) -> float:
    """The bin centre that, as the largest value, rounds a histogram to E4M3 with the least squared error.

    Shapes: ``counts`` [bins], ``edges`` [bins + 1], both of absolute values. The first 128 bins are not candidates,
    as in ModelOpt.
    """
    centers = ((edges[1:] + edges[:-1]) / 2).float()
    counts = counts.float()
    errors = [
        float((((fake_quantize(centers, center / E4M3_MAX) - centers) ** 2) * counts).sum())
        for center in centers[first_bin:]
    ]
    return float(centers[first_bin + errors.index(min(errors))])


@torch.inference_mode()
def measure_amax(
    stack: LayerStack,
    token_ids_BT: torch.Tensor,
    *,
    input_modules: Iterable[str],
    output_modules: Iterable[str] = (),
    method: CalibrationMethod | None = None,
    advance: Advance = no_progress,
) -> ActivationAmax:
    """Run a model over calibration windows and find each module's largest absolute activations.

    Shapes: ``token_ids_BT`` [windows, tokens] int64. ``advance`` is called once a layer.

    Raises: MinipuzzleError if an activation is not finite.
    """
    method = method or CalibrationMethod()
    inputs = {name: new_quantizer(method) for name in input_modules}
    outputs = {name: new_quantizer(method) for name in output_modules}
    modules = {name: stack.module_on_disk(name) for name in (*inputs, *outputs)}
    hidden_BTH = stack.embed(token_ids_BT)
    with _recording(modules, inputs, outputs):
        for layer_idx in range(stack.num_layers):
            stack.apply(layer_idx, hidden_BTH, out=hidden_BTH)
            advance(1)
        head = stack.architecture.names.head.removesuffix(".weight")
        if head in inputs:
            inputs[head](stack.final_norm(hidden_BTH))
    found = {name: calibrated_amax(quantizer, method) for name, quantizer in inputs.items()}
    return ActivationAmax(
        inputs=found | _unseen_experts(stack.architecture, found),
        outputs={name: calibrated_amax(quantizer, method) for name, quantizer in outputs.items()},
    )


def _unseen_experts(architecture: Architecture, found: Mapping[str, float]) -> dict[str, float]:
    """For each expert that saw nothing, the largest amax of the other experts of its layer, of the same matrix."""
    of_layer: dict[tuple[int | None, str], list[str]] = {}
    for tensor in architecture.tensors():
        if tensor.spec.unit is not None and (name := tensor.name.removesuffix(".weight")) in found:
            of_layer.setdefault((tensor.layer_idx, name.rpartition(".")[2]), []).append(name)
    return {
        name: max(found[other] for other in names) for names in of_layer.values() for name in names if found[name] == 0
    }


@contextmanager
def _recording(
    modules: Mapping[str, nn.Module], inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> Iterator[None]:
    def record(name: str, quantizer: Any, values: torch.Tensor) -> None:
        if not torch.isfinite(values).all():
            raise MinipuzzleError(f"{name} has NaN or infinite activations on the calibration data", "check the model")
        quantizer(values)

    handles: list[RemovableHandle] = []
    for name, quantizer in inputs.items():
        handles.append(
            modules[name].register_forward_pre_hook(
                lambda _module, args, name=name, quantizer=quantizer: record(name, quantizer, args[0])
            )
        )
    for name, quantizer in outputs.items():
        handles.append(
            modules[name].register_forward_hook(
                lambda _module, _args, out, name=name, quantizer=quantizer: record(name, quantizer, out)
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
