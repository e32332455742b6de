"""What the tests hold our numbers to: plain formulas in float64, and published rules of rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import HIDDEN, CacheSpec
from minipuzzle.architecture.model import Architecture, PlacedTensor
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.cut.surgery import kept_positions


@contextmanager
def everything_in_float64() -> Iterator[None]:
    """Turns the casts to float32 inside transformers' modules into casts to float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def logits_of(model: torch.nn.Module, token_ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits by the model's own forward pass, without a cache."""
    with torch.no_grad():
        logits_BTV: torch.Tensor = model(token_ids_BT, use_cache=False).logits
    return logits_BTV


def exact_logits_of(model: torch.nn.Module, token_ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of a float64 model with no step in float32."""
    with everything_in_float64():
        return logits_of(model, token_ids_BT)


def silence(tensor: torch.Tensor, placed: PlacedTensor, axis: str, kept: tuple[int, ...], *, to_mean: bool) -> None:
    """Make the units that go silent: whatever writes them writes zeros, or the mean of the others."""
    if placed.spec.rms_groups:
        return
    writes = 1 if placed.part == "embeddings" else 0
    positions = kept_positions(placed.spec.dims[writes], placed.sizes, {axis: kept})
    if positions is not None:
        silent = np.setdiff1d(np.arange(tensor.shape[writes]), positions)
        others = tensor.index_select(writes, torch.from_numpy(positions))
        quiet = others.mean(writes, keepdim=True) if to_mean else torch.zeros_like(others.narrow(writes, 0, 1))
        shape = [len(silent) if dim_idx == writes else length for dim_idx, length in enumerate(tensor.shape)]
        tensor.index_copy_(writes, torch.from_numpy(silent), quiet.expand(shape).contiguous())


def never_route(tensors: dict[str, torch.Tensor], source: Architecture, kept: tuple[int, ...]) -> None:
    """Let routers give no token to other experts than those kept: by what they add before they pick the best, or else
    by a channel that has the same sign for every token, because no layer writes into it."""
    for placed in source.tensors():
        tensor = tensors[placed.name]
        if ("expert",) in placed.spec.dims[0]:
            gone = [expert for expert in range(len(tensor)) if expert not in kept]
            tensor[gone] = -1e4
            if tensor.ndim > 1:
                tensor[gone, 1:] = 0
        elif placed.part == "embeddings":
            tensor[:, 0] = 0.1
        elif placed.spec.rms_groups and placed.spec.dims == (HIDDEN,):
            tensor[0] = 1
        elif placed.spec.dims[0] == HIDDEN:
            tensor[0] = 0


Scores = dict[str, NDArray[np.float64]]


def plain_metrics(full: torch.Tensor, altered: torch.Tensor, head: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    log_p, log_q = F.log_softmax(full @ head.T, -1), F.log_softmax(altered @ head.T, -1)

    def loss(log_probabilities: torch.Tensor) -> torch.Tensor:
        return F.nll_loss(log_probabilities[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return {
        "mse": F.mse_loss(altered, full).item(),
        "nmse": ((altered - full).square().sum() / full.square().sum()).item(),
        "cosine": (1 - F.cosine_similarity(altered, full, dim=-1)).mean().item(),
        "kl": F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean().item(),
        "delta_loss": (loss(log_q) - loss(log_p)).item(),
    }


def assert_same_scores(found: Scores, wanted: Scores, relative: float) -> None:
    assert found.keys() == wanted.keys() == LAYER_METRICS.keys()
    for metric, values in wanted.items():
        # A rise of the loss may be near zero while the losses are not; its error is relative to the typical rise.
        absolute = relative * np.abs(values).mean() if metric == "delta_loss" else 0
        np.testing.assert_allclose(found[metric], values, rtol=relative, atol=absolute, err_msg=metric)


def e4m3_table() -> np.ndarray:
    """The 127 finite values of codes 0 to 126, ascending: 4 bits of exponent with bias 7, 3 bits of mantissa."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


def reference_codes(values: np.ndarray, scale: float) -> np.ndarray:
    """Codes of values / scale in float64, rounded once to nearest, ties to the even code."""
    table = e4m3_table()
    magnitudes = np.minimum(np.abs(values.astype(np.float64) / scale), 448.0)
    above = np.clip(np.searchsorted(table, magnitudes), 1, 126)
    below = above - 1
    to_above, to_below = table[above] - magnitudes, magnitudes - table[below]
    rounds_up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    codes: np.ndarray[Any, Any] = np.where(rounds_up, above, below) + 128 * np.signbit(values)
    return codes


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Positions of the nearest entries of an ascending table, ties to the even position, in float64."""
    above = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    to_above, to_below = table[above] - values, values - table[above - 1]
    picked: np.ndarray[Any, Any] = above - 1 + ((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)))
    return picked


def reference_nvfp4(weight: np.ndarray, tensor_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(codes [rows, columns], values of block scales [rows, blocks]) by the published rule, in float64."""
    blocks = weight.astype(np.float64).reshape(len(weight), -1, 16)
    wanted = np.abs(blocks).max(-1) / (6 * tensor_scale)
    wanted = np.clip(np.where(wanted == 0, 1.0, wanted), 2.0**-9, 448)
    scales = e4m3_table()[nearest(wanted, e4m3_table())]
    magnitudes = np.minimum(np.abs(blocks) / (scales[..., None] * tensor_scale), 6)
    codes = nearest(magnitudes, E2M1) + 8 * np.signbit(blocks)
    return codes.reshape(weight.shape), scales


def caches_of(architecture: Architecture) -> list[CacheSpec]:
    """What all layers keep while text is generated."""
    return [cache for layer in architecture.layers for cache in LAYER_KINDS[layer.kind].caches(layer)]
