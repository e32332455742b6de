"""Guarantee: Mamba-2 layers without Triton kernels compute the recurrence, as transformers' own layers do.

The scan equals the recurrence step by step in float64; a whole mixer equals transformers' unchanged mixer, in float32
and bfloat16, at lengths around a chunk, and so do its gradients; masks and cached generation are left to transformers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.mamba_scan import (
    TORCH,
    FastMamba2,
    causal_convolution,
    chunked_scan,
    chunks_in_range,
    scan_path,
)
from minipuzzle.runtime.meta_models import transformers_config
from tests.support.tiny_models import write_family_checkpoint

HEADS, CHANNELS, GROUPS, STATE = 6, 5, 2, 7


def random_inputs(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    dt = nn.functional.softplus(normal(2, tokens, HEADS) * 3)
    a = -normal(HEADS).exp()
    return (
        normal(2, tokens, HEADS, CHANNELS),
        dt,
        a,
        normal(2, tokens, GROUPS, STATE),
        normal(2, tokens, GROUPS, STATE),
        normal(HEADS),
    )


def recurrence(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x, dt, a, b, c, d = (tensor.double() for tensor in inputs)
    b, c = (tensor.repeat_interleave(HEADS // GROUPS, dim=2) for tensor in (b, c))
    state, outputs = torch.zeros(2, HEADS, CHANNELS, STATE, dtype=torch.float64), []
    for t in range(x.shape[1]):
        added = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = (dt[:, t] * a).exp()[..., None, None] * state + added
        outputs.append((state * c[:, t, :, None]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_the_scan_is_the_recurrence(tokens: int, dtype: torch.dtype, relative: float) -> None:
    inputs = random_inputs(tokens, dtype)
    wanted = recurrence(inputs)
    found = chunked_scan(*inputs, longest_chunk=8)
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() <= relative * wanted.abs().max()


def test_a_step_of_no_length_passes_and_a_long_one_forgets() -> None:
    x, dt, a, b, c, d = random_inputs(24, torch.float32)
    dt[:, 3], dt[:, 11] = 0, 1e4  # the second is a decay that underflows
    found = chunked_scan(x, dt, a, b, c, d, longest_chunk=8)
    wanted = recurrence((x, dt, a, b, c, d))
    assert torch.isfinite(found).all()
    assert (found.double() - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_the_convolution_is_torchs_own(tokens: int) -> None:
    x, weight, bias = torch.randn(2, tokens, 6), torch.randn(6, 4), torch.randn(6)
    for some_bias in (bias, None):
        wanted = nn.functional.conv1d(x.transpose(1, 2), weight[:, None], some_bias, padding=3, groups=6)
        found = causal_convolution(x, weight, some_bias)
        torch.testing.assert_close(found, wanted[..., :tokens].transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.fixture(params=["nemotron_h", "granitemoehybrid"])
def hybrid(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    """A tiny model of each family with Mamba-2 layers."""
    return Checkpoint.open(write_family_checkpoint(tmp_path, request.param))


def mixers(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A mixer as we run it, and transformers' own with the same weights, whose steps nothing clamps."""
    compute = Compute(dtype=str(dtype).removeprefix("torch."))
    path, _norm = checkpoint.architecture.names.mixers["mamba"]
    mixer = LayerStack(checkpoint, compute).loaded_layer(0).get_submodule(path.rstrip("."))
    assert isinstance(mixer, FastMamba2)
    config = transformers_config({**checkpoint.config, "time_step_min": 0.0})
    original_class = {"nemotron_h": NemotronHMamba2Mixer, "granitemoehybrid": GraniteMoeHybridMambaLayer}
    original = original_class[checkpoint.config["model_type"]](config, layer_idx=0)
    original.load_state_dict(mixer.state_dict(), strict=True, assign=True)
    assert not isinstance(original, FastMamba2)
    return mixer, original


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_mixer_computes_what_transformers_does(
    hybrid: Checkpoint, tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    mixer, original = mixers(hybrid, dtype)
    hidden = torch.randn(3, tokens, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        wanted, found = original(hidden), mixer(hidden)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_gradients_are_those_of_transformers(tiny_checkpoint: Checkpoint) -> None:
    mixers_ = mixers(tiny_checkpoint, torch.float32)
    hidden = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1))
    inputs = [hidden.clone().requires_grad_() for _ in mixers_]
    for mixer, x in zip(mixers_, inputs, strict=True):
        (mixer(x) * hidden).sum().backward()
    found, wanted = (dict(mixer.named_parameters()) for mixer in mixers_)
    pairs = [(inputs[0].grad, inputs[1].grad), *((found[name].grad, wanted[name].grad) for name in wanted)]
    for ours, theirs in pairs:
        assert ours is not None and theirs is not None
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_masks_are_left_to_transformers(tiny_checkpoint: Checkpoint) -> None:
    mixer, original = mixers(tiny_checkpoint, torch.float32)
    hidden, mask = torch.randn(1, 20, 32), torch.ones(1, 20)
    mask[:, :4] = 0
    with torch.no_grad():
        torch.testing.assert_close(
            mixer(hidden, attention_mask=mask), original(hidden, attention_mask=mask), rtol=0, atol=0
        )


@pytest.mark.parametrize(("steepness", "chunk_tokens", "dtype"), [
    (0.5, 128, torch.float32),  # nats a token
    (2.5, 32, torch.float32),
    (5.0, 128, torch.float64),
    (40.0, 16, torch.float64),
    (1e4, 8, torch.float64),
])  # fmt: skip
def test_chunks_are_as_long_as_the_decays_allow(steepness: float, chunk_tokens: int, dtype: torch.dtype) -> None:
    x, dt, _a, b, c, d = random_inputs(256, torch.float32)
    dt, a = torch.ones_like(dt), torch.full_like(d, -steepness)
    assert chunks_in_range((dt.double() * steepness).clamp(max=110), 128, torch.float32) == (chunk_tokens, dtype)
    found, wanted = chunked_scan(x, dt, a, b, c, d, longest_chunk=128), recurrence((x, dt, a, b, c, d))
    assert (found.double() - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_a_cpu_never_runs_triton_kernels() -> None:
    assert scan_path("cpu") == TORCH


def test_autocast_leaves_the_scan_precise_over_several_chunks(tiny_checkpoint: Checkpoint) -> None:
    fast, _ = mixers(tiny_checkpoint, torch.float32)
    hidden = torch.randn(1, 150, tiny_checkpoint.architecture.hidden, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = fast(hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = fast(hidden)
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2
