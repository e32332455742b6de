"""Scores of channels and heads, and the energies under the norms, from one forward pass over the calibration data.

Forward hooks on transformers' modules see the activations and reduce them at once: to means over each sequence, whose
squares are summed over the samples (the L2 norm over samples of arXiv 2408.11796 and 2504.11409), or to mean squares.

Shape suffixes: B batch, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from importance.layers import not_finite, share_of_samples
from importance.observers import OBSERVERS
from importance.observers.base import Observe, Sums, mean_size, mean_square
from minipuzzle.cut.expert_criteria import EXPERT, EXPERT_CRITERIA, ExpertSums, criterion_axis
from minipuzzle.cut.scores import FINAL
from minipuzzle.errors import MinipuzzleError
from minipuzzle.runtime.layer_stack import LayerStack, WorkingSet

UNIT_DEFINITIONS: Mapping[str, str] = {
    "ffn": "input of down_proj: mean over the sequence of |a|, L2 over samples",
    "ffn_contribution": "mean over all tokens of |a|, times the norm of the neuron's column of down_proj",
    "shared_ffn": "of the shared expert: as ffn",
    "shared_ffn_contribution": "of the shared expert: as ffn_contribution",
    **{criterion_axis(name): criterion.definition for name, criterion in EXPERT_CRITERIA.items()},
    "expert_ffn": "[experts, neurons] input of the expert's down_proj: mean over all tokens of |a|, zero likewise",
    "ssm_head": "x slice of the in_proj output: mean over the sequence of |x|, L2 over samples and channels",
    "ssm_head_channel": "x slice of the in_proj output: mean over the sequence of |x|, L2 over samples and heads",
    "kv_group": "norm of the group's contribution through o_proj: mean over the sequence, L2 over samples",
    "gdn_key_group": "as kv_group, of a key head with its value heads, through out_proj",
    "gdn_value_head": "[key heads, value heads of each] as kv_group, of a value head, through out_proj",
    "hidden": "outputs of the block norms and the final norm: mean over the sequence of |x|, L2 over samples, summed",
}
ENERGY_DEFINITIONS: Mapping[str, str] = {
    "ssm": "input of the gated norm after the gate: mean square over all tokens",
    "hidden": "input of the block's norm or of the final norm, minus its mean for a LayerNorm: mean square over tokens",
}
Array = NDArray[np.float32]
SLICE_COPIES = 6  # of the hidden states of a slice, alive at once at the worst moment (the final norm)


def score_channels(
    stack: LayerStack,
    token_ids_BT: torch.Tensor,
    *,
    slice_samples: int | None = None,
    earlier: Mapping[str, NDArray[np.float64]] | None = None,
    after_slice: Callable[[dict[str, NDArray[np.float64]]], None] | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Unit scores and norm energies, under the keys of a score file (``minipuzzle.cut.scores``).

    Definitions: UNIT_DEFINITIONS and ENERGY_DEFINITIONS. ``slice_samples``: samples at a time (default: as many as
    fit); the slicing changes nothing but rounding. Progress: one step for each layer and sample. Where there are
    several processes each takes a share of the samples. ``after_slice`` receives the sums so far, and ``earlier``
    takes such sums of an interrupted run: the samples they cover are not run again.

    Raises: MinipuzzleError if a value is not a finite number.
    """
    num_samples, num_tokens = token_ids_BT.shape
    processes = stack.compute.processes
    samples = share_of_samples(num_samples, processes)
    slice_samples = slice_samples or stack.sequences_that_fit(working_set(num_tokens), len(samples))
    sums = Sums() if earlier is None else Sums.from_arrays(earlier)
    bar = stack.compute.progress("scoring channels", stack.num_layers * len(samples))
    with _hooks(stack, sums), bar as advance:
        advance(sums.num_samples * stack.num_layers)
        for start in range(samples.start + sums.num_samples, samples.stop, slice_samples):
            token_ids = token_ids_BT[start : min(start + slice_samples, samples.stop)]
            hidden_BTH = stack.embed(token_ids)
            for layer_idx in range(stack.num_layers):
                stack.apply(layer_idx, hidden_BTH, out=hidden_BTH)
                _require_finite_states(hidden_BTH, layer_idx, start)
                advance(len(token_ids))
            stack.final_norm(hidden_BTH)
            sums.num_samples += len(token_ids)
            if after_slice is not None:
                after_slice(sums.to_arrays())
    sums = sums.summed_over(processes)
    units = _units(sums, num_samples)
    energies = {key: _float32(total / num_samples) for key, total in sums.energies.items()}
    _require_finite({**units, **energies})
    return units, energies


def working_set(num_tokens: int) -> WorkingSet:
    """What observing activations needs."""
    return WorkingSet(num_tokens=num_tokens, num_copies=SLICE_COPIES)


def _units(sums: Sums, num_samples: int) -> dict[str, Array]:
    norms = {key: total.sqrt() for key, total in sums.squares.items()}
    hidden = torch.stack([norm for key, norm in norms.items() if key.startswith("hidden.")]).sum(0)
    return {
        **{key: _float32(norm) for key, norm in norms.items() if not key.startswith("hidden.")},
        **{key: _float32(total / num_samples) for key, total in sums.means.items()},
        **dict(_experts(sums.totals)),
        "hidden": _float32(hidden),
    }


def _experts(totals: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Array]]:
    for key, total in totals.items():
        axis, _, layer_idx = key.partition(".")
        num_tokens = float(totals[f"expert_tokens.{layer_idx}"])
        if axis == "expert_ffn":
            yield key, _float32(total / num_tokens)
        elif axis == EXPERT:
            names = ("routed", "norms", "squared_norms", "gated_norms", "weighted_norms")
            columns = dict(zip(names, total.numpy().T, strict=True))
            expert_sums = ExpertSums(num_tokens=num_tokens, **columns)
            for name, criterion in EXPERT_CRITERIA.items():
                yield f"{criterion_axis(name)}.{layer_idx}", criterion.of(expert_sums).astype(np.float32)


def _float32(values: torch.Tensor) -> Array:
    return values.numpy().astype(np.float32)


def _require_finite_states(hidden_BTH: torch.Tensor, layer_idx: int, first_sample: int) -> None:
    sums_B = hidden_BTH.sum(dim=(1, 2), dtype=torch.float32)  # finite only if all its terms are
    for sample in (~torch.isfinite(sums_B)).nonzero()[:, 0].tolist():
        raise not_finite(layer_idx, first_sample + sample)


def _require_finite(measured: Mapping[str, Array]) -> None:
    for key, values in measured.items():
        if not np.isfinite(values).all():
            raise MinipuzzleError(
                f"{key} has values that are not finite numbers: the activations overflow",
                "measure in float32 (‹dtype› float32); if that is in use, check the checkpoint",
            )


@contextmanager
def _hooks(stack: LayerStack, sums: Sums) -> Iterator[None]:
    """Observe the modules of all layers, and the final norm, while the block runs."""
    is_centered = stack.architecture.names.norm.is_centered
    handles = [stack.final_norm_module.register_forward_hook(_observe_norm(sums, FINAL, is_centered))]
    for layer_idx, layer in enumerate(stack.architecture.layers):
        modules: dict[str, list[str]] = {}
        for placed in stack.architecture.layer_tensors(layer_idx):
            module, _, tensor = stack.parameter_name(placed).rpartition(".")
            if tensor == "weight":
                modules.setdefault(placed.spec.role, []).append(module)
        observers = {modules[""][0]: _observe_norm(sums, layer_idx, is_centered)}
        observers |= OBSERVERS[layer.kind](sums, layer_idx, layer, modules)
        for name, observe in observers.items():
            handles.append(stack.layer(layer_idx).get_submodule(name).register_forward_hook(observe))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe_norm(sums: Sums, norm: int | str, is_centered: bool) -> Observe:
    def observe(_module: nn.Module, args: tuple[torch.Tensor, ...], normed_BTH: torch.Tensor) -> None:
        sums.add(sums.squares, f"hidden.{norm}", mean_size(normed_BTH).square())
        input_BTH = args[0] - args[0].mean(-1, keepdim=True) if is_centered else args[0]
        sums.add(sums.energies, f"hidden.{norm}", mean_square(input_BTH))

    return observe
