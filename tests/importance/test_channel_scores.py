"""Guarantee: channel and head scores are what their published definitions say about the activations.

Every score and energy equals a direct recomputation from activations captured in one run of the whole transformers
model, and the feed-forward score also equals modelopt's; the slicing of the samples does not matter; units that stay
silent score zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from importance.channels import Array, score_channels
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import load_model
from tests.support.text import random_tokens
from tests.support.tiny_models import change_tensors, write_tiny_checkpoint

Tensors = dict[str, torch.Tensor]
Captured = dict[str, tuple[tuple[torch.Tensor, ...], torch.Tensor]]  # module -> (inputs, output), float64
SAMPLES, TOKENS = 3, 37
# Of the tiny config: 4 ssm heads of 8 channels, 2 key-value groups of 2 queries with 8 dimensions each.
HEADS, CHANNELS, GROUPS, GROUP_WIDTH = 4, 8, 2, 16
MAMBA, ATTENTION, MLP = (0, 2, 5), (4,), (1, 3, 6)
PATTERN = "M-M-*M-"


TOKEN_IDS = random_tokens(SAMPLES, TOKENS, seed=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("channels"), pattern=PATTERN))


@contextmanager
def capturing(model: nn.Module, captured: Captured) -> Iterator[None]:
    """Keep inputs and output of every module, in float64."""

    def keep(name: str) -> object:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if isinstance(output, torch.Tensor):
                captured[name] = tuple(a.double() for a in args if isinstance(a, torch.Tensor)), output.double()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    yield
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def captured(checkpoint: Checkpoint) -> Captured:
    """Activations of the whole model on all samples at once."""
    model, found = load_model(checkpoint), Captured()
    with torch.no_grad(), capturing(model, found):
        model(TOKEN_IDS, use_cache=False)
    return found


@pytest.fixture(scope="module")
def measured(checkpoint: Checkpoint) -> tuple[dict[str, Array], dict[str, Array]]:
    return score_channels(LayerStack(checkpoint), TOKEN_IDS, slice_samples=2)


def l2_over_samples(values_BTU: torch.Tensor) -> torch.Tensor:
    """The published aggregation: mean over the sequence, L2 norm over the samples."""
    return values_BTU.mean(dim=1).square().sum(dim=0).sqrt()


def assert_close(found: Array, wanted: torch.Tensor) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5)


def test_the_keys_cover_every_axis_of_every_layer(measured: tuple[dict[str, Array], dict[str, Array]]) -> None:
    units, energies = measured
    assert units.keys() == {
        "hidden",
        *(f"{axis}.{i}" for axis in ("ssm_head", "ssm_head_channel") for i in MAMBA),
        *(f"{axis}.{i}" for axis in ("ffn", "ffn_contribution") for i in MLP),
        *(f"kv_group.{i}" for i in ATTENTION),
    }
    assert energies.keys() == {*(f"ssm.{i}" for i in MAMBA), *(f"hidden.{i}" for i in (*range(7), "final"))}


@pytest.mark.parametrize("layer_idx", MLP)
def test_a_neuron_counts_by_the_size_of_its_activation(
    measured: tuple[dict[str, Array], dict[str, Array]], captured: Captured, checkpoint: Checkpoint, layer_idx: int
) -> None:
    (activations,), _ = captured[f"model.layers.{layer_idx}.mixer.down_proj"]
    assert_close(measured[0][f"ffn.{layer_idx}"], l2_over_samples(activations.abs()))
    down_proj = checkpoint.tensor(f"backbone.layers.{layer_idx}.mixer.down_proj.weight").double()
    contribution = activations.abs().mean(dim=(0, 1)) * down_proj.square().sum(0).sqrt()
    assert_close(measured[0][f"ffn_contribution.{layer_idx}"], contribution)


def test_neurons_count_as_in_modelopt(measured: tuple[dict[str, Array], dict[str, Array]], captured: Captured) -> None:
    hooks = pytest.importorskip("modelopt.torch.prune.importance_hooks.base_hooks")
    for layer_idx in MLP:
        (activations,), output = captured[f"model.layers.{layer_idx}.mixer.down_proj"]
        hook = hooks.L2NormHook()
        hook(nn.Identity(), (activations.transpose(0, 1),), output)  # [tokens, batch, ffn]
        assert_close(measured[0][f"ffn.{layer_idx}"], hook.accumulate())


@pytest.mark.parametrize("layer_idx", MAMBA)
def test_ssm_heads_and_channels_count_by_the_x_slice(
    measured: tuple[dict[str, Array], dict[str, Array]], captured: Captured, layer_idx: int
) -> None:
    _, zxbcdt = captured[f"model.layers.{layer_idx}.mixer.in_proj"]
    inner = HEADS * CHANNELS
    scores = l2_over_samples(zxbcdt[..., inner : 2 * inner].abs()).view(HEADS, CHANNELS)
    assert_close(measured[0][f"ssm_head.{layer_idx}"], torch.linalg.vector_norm(scores, dim=1))
    assert_close(measured[0][f"ssm_head_channel.{layer_idx}"], torch.linalg.vector_norm(scores, dim=0))


@pytest.mark.parametrize("layer_idx", ATTENTION)
def test_a_key_value_group_counts_by_what_it_adds_to_the_residual_stream(
    measured: tuple[dict[str, Array], dict[str, Array]], captured: Captured, checkpoint: Checkpoint, layer_idx: int
) -> None:
    (heads,), output = captured[f"model.layers.{layer_idx}.mixer.o_proj"]
    o_proj = checkpoint.tensor(f"backbone.layers.{layer_idx}.mixer.o_proj.weight").double()
    added = []
    for group in range(GROUPS):
        alone = torch.zeros_like(heads)
        columns = slice(group * GROUP_WIDTH, (group + 1) * GROUP_WIDTH)
        alone[..., columns] = heads[..., columns]
        added.append(alone @ o_proj.T)
    torch.testing.assert_close(sum(added), output, rtol=0, atol=1e-5)
    norms = torch.stack([contribution.square().sum(-1).sqrt() for contribution in added], dim=-1)
    assert_close(measured[0][f"kv_group.{layer_idx}"], l2_over_samples(norms))


def test_hidden_channels_count_by_what_all_norms_pass_on(
    measured: tuple[dict[str, Array], dict[str, Array]], captured: Captured
) -> None:
    norms = [*(f"model.layers.{i}.norm" for i in range(len(PATTERN))), "model.norm_f"]
    assert_close(
        measured[0]["hidden"], sum((l2_over_samples(captured[norm][1].abs()) for norm in norms), torch.zeros(1))
    )


def test_energies_are_mean_squares_of_what_the_norms_average(
    measured: tuple[dict[str, Array], dict[str, Array]], captured: Captured
) -> None:
    energies = measured[1]
    for layer_idx in MAMBA:
        (y, gate), _ = captured[f"model.layers.{layer_idx}.mixer.norm"]
        assert_close(energies[f"ssm.{layer_idx}"], (y * silu(gate)).square().mean(dim=(0, 1)))
    for layer_idx in range(len(PATTERN)):
        assert_close(
            energies[f"hidden.{layer_idx}"], captured[f"model.layers.{layer_idx}.norm"][0][0].square().mean((0, 1))
        )
    assert_close(energies["hidden.final"], captured["model.norm_f"][0][0].square().mean((0, 1)))


@pytest.mark.parametrize("slice_samples", [1, SAMPLES])
def test_slicing_does_not_change_the_scores(
    checkpoint: Checkpoint, measured: tuple[dict[str, Array], dict[str, Array]], slice_samples: int
) -> None:
    found = score_channels(LayerStack(checkpoint), TOKEN_IDS, slice_samples=slice_samples)
    for table, wanted in zip(found, measured, strict=True):
        for key, values in wanted.items():
            np.testing.assert_allclose(table[key], values, rtol=1e-5, err_msg=key)


def test_one_pass_applies_every_layer_once_a_slice(checkpoint: Checkpoint) -> None:
    stack = LayerStack(checkpoint)
    score_channels(stack, TOKEN_IDS, slice_samples=1)
    assert stack.counters.layer_applications == SAMPLES * len(PATTERN)
    assert stack.counters.weight_bytes_read == checkpoint.weight_bytes - stack.stored_bytes("head")


def test_the_model_is_left_without_hooks(checkpoint: Checkpoint) -> None:
    stack = LayerStack(checkpoint)
    score_channels(stack, TOKEN_IDS)
    layers = [stack.layer(i) for i in range(stack.num_layers)]
    assert not any(m._forward_hooks for layer in (*layers, stack.final_norm_module) for m in layer.modules())


def test_silent_units_score_zero_and_no_others(tmp_path: Path) -> None:
    def silence(tensors: Tensors) -> None:
        tensors["backbone.layers.1.mixer.up_proj.weight"][5] = 0
        x_rows = HEADS * CHANNELS  # x follows z
        tensors["backbone.layers.0.mixer.in_proj.weight"][x_rows + 2 * CHANNELS : x_rows + 3 * CHANNELS] = 0
        tensors["backbone.layers.2.mixer.in_proj.weight"][x_rows + 3 : 2 * x_rows : CHANNELS] = 0
        tensors["backbone.layers.4.mixer.v_proj.weight"][:8] = 0

    folder = change_tensors(write_tiny_checkpoint(tmp_path, pattern=PATTERN), silence)
    units, _ = score_channels(LayerStack(Checkpoint.open(folder)), TOKEN_IDS)
    silent = {"ffn.1": [5], "ffn_contribution.1": [5], "ssm_head.0": [2], "ssm_head_channel.2": [3], "kv_group.4": [0]}
    for key, values in units.items():
        assert np.flatnonzero(values == 0).tolist() == silent.get(key, []), key


def test_an_overflow_is_an_error_and_not_a_score(tmp_path: Path) -> None:
    def inflate(tensors: Tensors) -> None:
        tensors["backbone.layers.1.mixer.up_proj.weight"].mul_(1e25)

    stack = LayerStack(Checkpoint.open(change_tensors(write_tiny_checkpoint(tmp_path), inflate)))
    with pytest.raises(MinipuzzleError, match="layer 1 computes NaN or infinite values for sample 0"):
        score_channels(stack, TOKEN_IDS)
