"""Largest absolute activations of the linear layers that an FP8 export quantises, measured on calibration tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from minipuzzle.errors import MinipuzzleError
from minipuzzle.families import Family
from minipuzzle.models import parts_of
from minipuzzle.progress import Advance, no_progress


@dataclass(frozen=True, kw_only=True)
class ActivationAmax:
    """Largest absolute input and output of modules, by their names on disk (without ``.weight``)."""

    inputs: Mapping[str, float]
    outputs: Mapping[str, float]


@torch.inference_mode()
def measure_amax(
    model: nn.Module,
    family: Family,
    token_ids_BT: torch.Tensor,
    *,
    input_modules: Iterable[str],
    output_modules: Iterable[str] = (),
    batch: int = 4,
    device: str = "cpu",
    advance: Advance = no_progress,
) -> ActivationAmax:
    """Run a model over calibration windows and keep the largest absolute activation of each module.

    Shapes: ``token_ids_BT`` [windows, tokens] int64. ``advance`` is called with the number of windows done.

    Raises: MinipuzzleError if an activation is not finite.
    """
    parts = parts_of(model, family)
    modules = {
        name: model.get_submodule(family.modules.module_name(name)) for name in (*input_modules, *output_modules)
    }
    inputs = {name: torch.zeros((), device=device) for name in input_modules}
    outputs = {name: torch.zeros((), device=device) for name in output_modules}
    with _recording(modules, inputs, outputs):
        for start in range(0, len(token_ids_BT), batch):
            token_ids = token_ids_BT[start : start + batch].to(device)
            parts.logits_input(token_ids)
            advance(len(token_ids))
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
