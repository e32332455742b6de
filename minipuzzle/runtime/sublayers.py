"""Runnable layers cut out of transformers' decoder blocks: one residual branch each, over hidden states.

A decoder block that adds attention and then an MLP to the hidden states is two layers here. Each is a module that
holds its part of the block under the block's own names, so that tensors find their place, and hooks theirs.

Shape suffixes: B batch, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from minipuzzle.architecture.families import Family


class Branch(nn.Module):
    """``hidden + residual_scale * mixer(norm(hidden))`` with a norm and a mixer of a decoder block; of several mixers
    the sum."""

    def __init__(self, block: nn.Module, norm: str, *mixers: str, residual_scale: float = 1.0) -> None:
        super().__init__()
        self.norm_name, self.mixer_names, self.residual_scale = norm, mixers, residual_scale
        for name in (norm, *mixers):
            self.add_module(name, block.get_submodule(name))

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Hidden states after this layer."""
        added_BTH = self.mix(self.get_submodule(self.norm_name)(hidden_BTH))
        return hidden_BTH + (added_BTH if self.residual_scale == 1.0 else added_BTH * self.residual_scale)

    def mix(self, normed_BTH: torch.Tensor) -> torch.Tensor:
        """What the mixer adds, before scaling."""
        found = (self.get_submodule(name)(normed_BTH) for name in self.mixer_names)
        # gpt-oss returns the router's weights beside the sum.
        first_BTH, *others = (added[0] if isinstance(added, tuple) else added for added in found)
        added_BTH: torch.Tensor = sum(others, start=first_BTH)
        return added_BTH


class Positions:
    """Where tokens are and what they may see: rotary embeddings and masks as transformers' models make them.

    Not a module: its tables are not weights, and must not leave the memory when a layer does.
    """

    def __init__(self, rotary: nn.Module | None, config: Any) -> None:
        self.rotary = rotary
        self.config = config

    def embeddings(self, hidden_BTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines for the positions 0, 1, ...; None without rotary embeddings."""
        if self.rotary is None:
            return None
        cosines, sines = self.rotary(hidden_BTH, self.ids(hidden_BTH))
        return cosines, sines

    def ids(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """The positions, ``[1, tokens]``."""
        return torch.arange(hidden_BTH.shape[1], device=hidden_BTH.device)[None]

    def mask(self, hidden_BTH: torch.Tensor, window: int | None) -> torch.Tensor | None:
        """What a token may not see; None: whatever comes later, which attention kernels know without a mask."""
        slides = window is not None and hidden_BTH.shape[1] > window
        if not slides and self.config._attn_implementation != "eager":
            return None
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        make_mask = create_sliding_window_causal_mask if slides else create_causal_mask
        mask: torch.Tensor = make_mask(
            config=self.config, inputs_embeds=hidden_BTH, attention_mask=None, past_key_values=None
        )
        return mask


class AttentionBranch(Branch):
    """A residual branch with causal attention, over a sliding window where the module or the config has one."""

    def __init__(
        self, block: nn.Module, norm: str, mixer: str, positions: Positions, *, residual_scale: float = 1.0
    ) -> None:
        super().__init__(block, norm, mixer, residual_scale=residual_scale)
        self.positions = positions
        attention = block.get_submodule(mixer)
        of_model = getattr(positions.config, "sliding_window", None)
        self.window: int | None = getattr(attention, "sliding_window", of_model)
        self.asks_for_ids = "position_ids" in signature(attention.forward).parameters

    def mix(self, normed_BTH: torch.Tensor) -> torch.Tensor:
        """What attention adds, before scaling."""
        added_BTH: torch.Tensor = self.get_submodule(self.mixer_names[0])(
            hidden_states=normed_BTH,
            position_embeddings=self.positions.embeddings(normed_BTH),
            attention_mask=self.positions.mask(normed_BTH, self.window),
            **({"position_ids": self.positions.ids(normed_BTH)} if self.asks_for_ids else {}),
        )[0]
        return added_BTH


class NoLayer(nn.Module):
    """In the place of a layer that is missing: adds nothing to the hidden states."""

    def __init__(self, *, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention

    def forward(self, hidden_states: torch.Tensor, **_arguments: Any) -> Any:
        """Zeros; with the attention weights that nobody asked for, as transformers' attention returns them."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.is_attention else nothing


class Scaled(nn.Module):
    """A module whose output is multiplied by a constant. It has the module's parameters, under the same names."""

    def __init__(self, module: nn.Module, scale: float) -> None:
        super().__init__()
        # One table for both, so that weights loaded into one are the other's. Not registered: names stay as they are.
        self._parameters = module._parameters
        self._module, self.scale = (module,), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's output, scaled."""
        output: torch.Tensor = self._module[0](x)
        return output * self.scale


def scaled(module: nn.Module, scale: float) -> nn.Module:
    """A module with its output multiplied by a constant; the module itself where that changes nothing."""
    return module if scale == 1.0 else Scaled(module, scale)


def runnable_layers(model: nn.Module, family: Family) -> list[nn.Module]:
    """The layers of a transformers model in the order of its Architecture: modules from hidden states to hidden states,
    with the parameter names of the decoder block that they belong to."""
    blocks = list(model.get_submodule(family.modules.layers).children())
    if family.names.layers_per_block == 1:
        return blocks
    config: Any = model.config
    positions = Positions(attrgetter(family.modules.rotary)(model), config)
    scale = float(getattr(config, family.residual_scale)) if family.residual_scale else 1.0
    return [branch for block in blocks for branch in _branches(block, family, positions, scale)]


def _branches(block: nn.Module, family: Family, positions: Positions, scale: float) -> Iterator[Branch]:
    """What is there of a decoder block, in the order of its slots."""
    names = family.names
    found: dict[int, str] = {}
    # Several kinds may have one slot; a mixer of several modules is recognised by having all of them.
    for kind in sorted(names.slots, key=lambda kind: (names.slots[kind], -len(family.mixer_modules(kind)))):
        modules = [getattr(block, name, None) for name in family.mixer_modules(kind)]
        if all(module is not None and not isinstance(module, NoLayer) for module in modules):
            found.setdefault(names.slots[kind], kind)
    for kind in found.values():
        mixers, norm = family.mixer_modules(kind), names.mixers[kind][1].removesuffix(".weight")
        if kind == "attention":
            yield AttentionBranch(block, norm, mixers[0], positions, residual_scale=scale)
        else:
            yield Branch(block, norm, *mixers, residual_scale=scale)
