"""Scores of channels and heads, and the energies under the norms, from one forward pass over the calibration data.

Forward hooks on transformers' modules see the activations and reduce them at once: to means over each sequence, whose
squares are summed over the samples (the L2 norm over samples of arXiv 2408.11796 and 2504.11409), or to mean squares.

Shape suffixes: B batch, T tokens, H hidden, F ffn, I ssm inner channels, N ssm heads, P channels a head, G key-value
groups, W columns of a group in o_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import linear, silu

from importance.layers import not_finite, share_of_samples
from minipuzzle.architecture.layer_kinds import LAYER_KINDS, LayerSpec
from minipuzzle.cut.scores import FINAL
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import Advance, no_progress
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.processes import Processes

UNIT_DEFINITIONS: Mapping[str, str] = {
    "ffn": "input of down_proj: mean over the sequence of |a|, L2 over samples",
    "ffn_contribution": "mean over all tokens of |a|, times the norm of the neuron's column of down_proj",
    "shared_ffn": "of the shared expert: as ffn",
    "shared_ffn_contribution": "of the shared expert: as ffn_contribution",
    "expert": "norm of the expert's output (before a latent projection back) times its routing weight: mean over all "
    "tokens, zero for those it is not given",
    "expert_ffn": "[experts, neurons] input of the expert's down_proj: mean over all tokens of |a|, zero likewise",
    "ssm_head": "x slice of the in_proj output: mean over the sequence of |x|, L2 over samples and channels",
    "ssm_head_channel": "x slice of the in_proj output: mean over the sequence of |x|, L2 over samples and heads",
    "kv_group": "norm of the group's contribution through o_proj: mean over the sequence, L2 over samples",
    "hidden": "outputs of the block norms and the final norm: mean over the sequence of |x|, L2 over samples, summed",
}
ENERGY_DEFINITIONS: Mapping[str, str] = {
    "ssm": "input of the gated norm after the gate: mean square over all tokens",
    "hidden": "input of the block's norm or of the final norm, minus its mean for a LayerNorm: mean square over tokens",
}
Array = NDArray[np.float32]
Observe = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]  # a forward hook
SLICE_COPIES = 6  # of the hidden states of a slice, alive at once at the worst moment (the final norm)


@dataclass(kw_only=True)
class _Sums:
    """Running float64 sums over samples, under the keys of the score file (``hidden`` still by norm).

    ``squares``: of the means over each sequence. ``means``, ``energies``: of such means and mean squares themselves.
    """

    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    energies: dict[str, torch.Tensor] = field(default_factory=dict)
    num_samples: int = 0

    @staticmethod
    def add_row(sums: dict[str, torch.Tensor], key: str, num_rows: int, row: int, values: torch.Tensor) -> None:
        """Add to one row of the sum under a key, which has as many rows as a layer has experts."""
        if key not in sums:
            sums[key] = torch.zeros(num_rows, *values.shape, dtype=torch.float64)
        sums[key][row] += values.double().cpu()

    @staticmethod
    def add(sums: dict[str, torch.Tensor], key: str, values_BU: torch.Tensor) -> None:
        """Add the values of some samples to the sum under a key."""
        added = values_BU.double().sum(0).cpu()
        sums[key] = sums[key] + added if key in sums else added

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """The sums, exactly, for a file."""
        tables = {"squares": self.squares, "means": self.means, "energies": self.energies}
        arrays = {f"{table}/{key}": total.numpy() for table, sums in tables.items() for key, total in sums.items()}
        return {**arrays, "num_samples": np.array([float(self.num_samples)])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float64]]) -> _Sums:
        """The sums that ``to_arrays`` gave, to be continued."""
        sums = cls(num_samples=int(arrays["num_samples"][0]))
        for name, array in arrays.items():
            table, _, key = name.partition("/")
            if key:
                getattr(sums, table)[key] = torch.tensor(array)
        return sums

    def summed_over(self, processes: Processes) -> _Sums:
        """The sums of all processes together."""
        if processes.world_size == 1:
            return self
        arrays = self.to_arrays()
        # An expert that got no token in one process has a sum in others only.
        shapes = {
            name: shape
            for found in processes.gather({n: a.shape for n, a in arrays.items()})
            for name, shape in found.items()
        }
        summed = {}
        for name in sorted(shapes):
            array = arrays.get(name)
            own = torch.zeros(shapes[name], dtype=torch.float64) if array is None else torch.tensor(array)
            summed[name] = processes.sum_(own).numpy()
        return _Sums.from_arrays(summed)


def score_channels(
    stack: LayerStack,
    token_ids_BT: torch.Tensor,
    *,
    slice_samples: int | None = None,
    advance: Advance = no_progress,
    processes: Processes | None = None,
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
    processes = processes or Processes()
    samples = share_of_samples(num_samples, processes)
    slice_samples = slice_samples or samples_per_slice(stack, len(samples), num_tokens)
    sums = _Sums() if earlier is None else _Sums.from_arrays(earlier)
    advance(sums.num_samples * stack.num_layers)
    with _hooks(stack, sums):
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


def samples_per_slice(stack: LayerStack, num_samples: int, num_tokens: int) -> int:
    """Samples whose hidden states fit beside the weights and a layer at work; one always does."""
    bytes_per_sample = SLICE_COPIES * num_tokens * stack.architecture.hidden * stack.dtype.itemsize
    return max(1, min(num_samples, (stack.free_bytes - stack.activation_bytes(num_tokens)) // bytes_per_sample))


def _units(sums: _Sums, num_samples: int) -> dict[str, Array]:
    norms = {key: total.sqrt() for key, total in sums.squares.items()}
    hidden = torch.stack([norm for key, norm in norms.items() if key.startswith("hidden.")]).sum(0)
    return {
        **{key: _float32(norm) for key, norm in norms.items() if not key.startswith("hidden.")},
        **{key: _float32(total / num_samples) for key, total in sums.means.items()},
        "hidden": _float32(hidden),
    }


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
                "measure in float32 (--dtype float32); if that is in use, check the checkpoint",
            )


@contextmanager
def _hooks(stack: LayerStack, sums: _Sums) -> Iterator[None]:
    """Observe the modules of all layers, and the final norm, while the block runs."""
    is_centered = stack.architecture.names.norm.is_centered
    handles = [stack.final_norm_module.register_forward_hook(_observe_norm(sums, FINAL, is_centered))]
    for layer_idx, spec in enumerate(stack.architecture.layers):
        mixer_prefix, norm_name = stack.architecture.names.mixers[spec.kind]
        observers = {norm_name: _observe_norm(sums, layer_idx, is_centered)}
        observers |= {mixer_prefix + name: hook for name, hook in _OBSERVERS[spec.kind](sums, layer_idx, spec).items()}
        for tensor_name, observe in observers.items():
            module = stack.layer(layer_idx).get_submodule(tensor_name.removesuffix(".weight"))
            handles.append(module.register_forward_hook(observe))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean_size(x_BTU: torch.Tensor) -> torch.Tensor:
    """Mean over the sequence of the absolute value, in float32 at least."""
    return x_BTU.abs().mean(dim=1, dtype=torch.promote_types(x_BTU.dtype, torch.float32))


def _mean_square(x_BTU: torch.Tensor) -> torch.Tensor:
    return x_BTU.to(torch.promote_types(x_BTU.dtype, torch.float32)).square().mean(dim=1)


def _observe_norm(sums: _Sums, norm: int | str, is_centered: bool) -> Observe:
    def observe(_module: nn.Module, args: tuple[torch.Tensor, ...], normed_BTH: torch.Tensor) -> None:
        sums.add(sums.squares, f"hidden.{norm}", _mean_size(normed_BTH).square())
        input_BTH = args[0] - args[0].mean(-1, keepdim=True) if is_centered else args[0]
        sums.add(sums.energies, f"hidden.{norm}", _mean_square(input_BTH))

    return observe


def _observe_neurons(sums: _Sums, axis: str, layer_idx: int) -> Observe:
    def observe_down_proj(module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        size_BF = _mean_size(args[0])
        sums.add(sums.squares, f"{axis}.{layer_idx}", size_BF.square())
        column_norms_F = module.get_parameter("weight").norm(dim=0)
        sums.add(sums.means, f"{axis}_contribution.{layer_idx}", size_BF * column_norms_F)

    return observe_down_proj


def _observe_mlp(sums: _Sums, layer_idx: int, spec: LayerSpec) -> dict[str, Observe]:
    (output,) = (tensor for tensor in LAYER_KINDS[spec.kind].tensors(spec) if tensor.dims[1:] == ((("ffn",),),))
    return {output.name: _observe_neurons(sums, "ffn", layer_idx)}


def _observe_moe(sums: _Sums, layer_idx: int, spec: LayerSpec) -> dict[str, Observe]:
    num_experts, num_tokens = spec.sizes["expert"], 1

    def observe_gate(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        nonlocal num_tokens  # of a sequence; experts see tokens of all sequences in one list
        num_tokens = args[0].shape[-2]

    def observe_expert(expert_idx: int) -> Observe:
        def observe(_module: nn.Module, _args: tuple[torch.Tensor, ...], weighted_NH: torch.Tensor) -> None:
            norms_N = weighted_NH.norm(dim=-1, dtype=torch.promote_types(weighted_NH.dtype, torch.float32))
            sums.add_row(sums.means, f"expert.{layer_idx}", num_experts, expert_idx, norms_N.sum() / num_tokens)

        return observe

    def observe_expert_down_proj(expert_idx: int) -> Observe:
        def observe(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            size_F = args[0].abs().sum(dim=0, dtype=torch.promote_types(args[0].dtype, torch.float32)) / num_tokens
            sums.add_row(sums.means, f"expert_ffn.{layer_idx}", num_experts, expert_idx, size_F)

        return observe

    observers = {"gate": observe_gate, "shared_experts.down_proj": _observe_neurons(sums, "shared_ffn", layer_idx)}
    for expert_idx in range(num_experts):
        observers[f"experts.{expert_idx}"] = observe_expert(expert_idx)
        observers[f"experts.{expert_idx}.down_proj"] = observe_expert_down_proj(expert_idx)
    return observers


def _observe_attention(sums: _Sums, layer_idx: int, spec: LayerSpec) -> dict[str, Observe]:
    group_width = spec.sizes["queries_per_group"] * spec.sizes["head_dim"]

    def observe_o_proj(module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        inputs_BTW = torch.split(args[0], group_width, dim=-1)
        weights_HW = torch.split(module.get_parameter("weight"), group_width, dim=-1)
        sizes = [
            linear(input_BTW, weight_HW).norm(dim=-1, dtype=torch.promote_types(input_BTW.dtype, torch.float32)).mean(1)
            for input_BTW, weight_HW in zip(inputs_BTW, weights_HW, strict=True)
        ]
        sums.add(sums.squares, f"kv_group.{layer_idx}", torch.stack(sizes, dim=-1).square())

    return {"o_proj.weight": observe_o_proj}


def _observe_mamba(sums: _Sums, layer_idx: int, spec: LayerSpec) -> dict[str, Observe]:
    num_heads, num_channels = spec.sizes["ssm_head"], spec.sizes["ssm_head_channel"]
    inner = num_heads * num_channels

    def observe_in_proj(_module: nn.Module, _args: tuple[torch.Tensor, ...], zxbcdt: torch.Tensor) -> None:
        x_BTI = zxbcdt[..., inner : 2 * inner]
        squares_BNP = _mean_size(x_BTI).square().view(-1, num_heads, num_channels)
        sums.add(sums.squares, f"ssm_head.{layer_idx}", squares_BNP.sum(2))
        sums.add(sums.squares, f"ssm_head_channel.{layer_idx}", squares_BNP.sum(1))

    def observe_gated_norm(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        y_BTI, gate_BTI = args
        precision = torch.promote_types(y_BTI.dtype, torch.float32)
        sums.add(sums.energies, f"ssm.{layer_idx}", _mean_square(y_BTI.to(precision) * silu(gate_BTI.to(precision))))

    return {"in_proj.weight": observe_in_proj, "norm.weight": observe_gated_norm}


_OBSERVERS: Mapping[str, Callable[[_Sums, int, LayerSpec], dict[str, Observe]]] = {
    "mlp": _observe_mlp,
    "attention": _observe_attention,
    "mamba": _observe_mamba,
    "moe": _observe_moe,
}
