"""Largest absolute activations of the linear layers that an FP8 export quantises, measured on calibration tokens.

The model runs layer by layer over the hidden states of all windows, so one layer's weights in memory are enough.
Shape suffixes: B windows, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import Advance, no_progress
from minipuzzle.streaming import LayerStack, largest_activation_bytes


@dataclass(frozen=True, kw_only=True)
class ActivationAmax:
    """Largest absolute input and output of modules, by their names on disk (without ``.weight``)."""

    inputs: Mapping[str, float]
    outputs: Mapping[str, float]


def open_stack(
    checkpoint: Checkpoint, token_ids_BT: torch.Tensor, *, device: str, device_memory_bytes: int | None
) -> LayerStack:
    """A float32 layer stack with room for the hidden states of all windows.

    Raises: MinipuzzleError if the memory does not suffice.
    """
    return LayerStack(
        checkpoint,
        device=device,
        device_memory_bytes=device_memory_bytes,
        reserved_bytes=calibration_bytes(checkpoint, token_ids_BT),
    )


def calibration_bytes(checkpoint: Checkpoint, token_ids_BT: torch.Tensor) -> int:
    """An estimate of the memory that running a model over windows needs beside its weights."""
    hidden_bytes = token_ids_BT.numel() * checkpoint.architecture.hidden * torch.float32.itemsize
    # The layer stack gives a quarter of what is left to the working set of one call.
    return hidden_bytes + 4 * largest_activation_bytes(checkpoint, token_ids_BT.shape[1], torch.float32)


@torch.inference_mode()
def measure_amax(
    stack: LayerStack,
    token_ids_BT: torch.Tensor,
    *,
    input_modules: Iterable[str],
    output_modules: Iterable[str] = (),
    advance: Advance = no_progress,
) -> ActivationAmax:
    """Run a model over calibration windows and keep the largest absolute activation of each module.

    Shapes: ``token_ids_BT`` [windows, tokens] int64. ``advance`` is called once a layer.

    Raises: MinipuzzleError if an activation is not finite.
    """
    modules = {name: stack.module_on_disk(name) for name in (*input_modules, *output_modules)}
    inputs = {name: torch.zeros((), device=stack.device) for name in input_modules}
    outputs = {name: torch.zeros((), device=stack.device) for name in output_modules}
    hidden_BTH = stack.embed(token_ids_BT)
    with _recording(modules, inputs, outputs):
        for layer_idx in range(stack.num_layers):
            stack.apply(layer_idx, hidden_BTH, out=hidden_BTH)
            advance(1)
    return ActivationAmax(inputs=_checked(inputs), outputs=_checked(outputs))


@contextmanager
def _recording(
    modules: Mapping[str, nn.Module], inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
) -> Iterator[None]:
    def record(amaxes: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> None:
        amaxes[name] = torch.maximum(amaxes[name], values.abs().amax().float())

    handles: list[RemovableHandle] = []
    for name in inputs:
        handles.append(
            modules[name].register_forward_pre_hook(lambda _module, args, name=name: record(inputs, name, args[0]))
        )
    for name in outputs:
        handles.append(
            modules[name].register_forward_hook(lambda _module, _args, out, name=name: record(outputs, name, out))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checked(amaxes: Mapping[str, torch.Tensor]) -> dict[str, float]:
    for name, amax in amaxes.items():
        if not torch.isfinite(amax):
            raise MinipuzzleError(f"{name} has NaN or infinite activations on the calibration data", "check the model")
    return {name: float(amax) for name, amax in amaxes.items()}
