"""transformers models built from our own checkpoints: strictly, lazily, and computing what engines compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minipuzzle.architecture.configs.per_layer import PER_LAYER_MODEL_TYPE
from minipuzzle.architecture.families import Family, family_of
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.meta_models import uniform_on_meta
from minipuzzle.runtime.sublayers import runnable_layers, scaled
from minipuzzle.runtime.unequal_layers import narrow_on_meta


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """The pieces of a causal language model that layer-by-layer work needs; layers as in the Architecture."""

    embeddings: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Linear

    def logits_input(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm, ``[batch, tokens, hidden]``: what the LM head sees."""
        hidden_BTH = self.embeddings(token_ids_BT)
        for layer in self.layers:
            hidden_BTH = layer(hidden_BTH)
        normed: torch.Tensor = self.final_norm(hidden_BTH)
        return normed


def parts_of(model: nn.Module, family: Family) -> ModelParts:
    """The parts of a transformers model of the given family; whoever changes them keeps them."""
    paths = family.modules
    head = model.get_submodule(paths.head)

    def scale_of(field: str) -> float:
        return float(getattr(model.config, field)) if field else 1.0

    assert isinstance(head, nn.Linear)
    return ModelParts(
        embeddings=scaled(model.get_submodule(paths.embeddings), scale_of(family.embedding_scale)),
        layers=nn.ModuleList(runnable_layers(model, family)),
        final_norm=scaled(model.get_submodule(paths.final_norm), 1.0 / scale_of(family.logit_divisor)),
        head=head,
    )


def build_on_meta(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A transformers model for a config.json with shapes and no weights, but with its tables of positions."""
    model = uniform_on_meta(config, dtype)
    if config["model_type"] == PER_LAYER_MODEL_TYPE:
        narrow_on_meta(model, config, dtype)
    return model


def build_model(
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    compute: Compute = Compute(),
) -> nn.Module:
    """A model in evaluation mode from named tensors as on disk; a missing or unexpected name is an error."""
    device, dtype = compute.own_device.name, compute.torch_dtype
    family = family_of(config)
    model = build_on_meta(config, dtype)
    # A copy, because a tensor of a safetensors file is a view of the mapped file: training it in place would change
    # what the same open checkpoint reads next.
    state = {family.modules.module_name(name): tensor.to(device, dtype, copy=True) for name, tensor in tensors}
    head = f"{family.modules.head}.weight"
    if family.read(config).tied_embeddings and head not in state:
        state[head] = state[f"{family.modules.embeddings}.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def load_model(checkpoint: Checkpoint, compute: Compute = Compute()) -> nn.Module:
    """The whole model of a checkpoint with plain weights.

    Raises: MinipuzzleError if names, shapes or values are wrong.
    """
    checkpoint.require_plain_weights()
    names = (name for name in checkpoint.entries if not checkpoint.family.carries(name))
    tensors = ((name, checkpoint.tensor(name)) for name in names)
    return build_model(checkpoint.config, tensors, compute)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises: MinipuzzleError if there is none, if it is damaged, or if only code in the folder could read it.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise MinipuzzleError(f"{folder} has no tokenizer", "copy tokenizer.json from the model's source")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds: the file is read by three libraries
        raise MinipuzzleError(
            f"the tokenizer of {folder} cannot be read: {type(error).__name__}: {str(error)[:300]}",
            "copy the tokenizer's files from the model's source; code in the folder is never run",
        ) from error
    vocabulary = tokenizer.get_vocab()
    if len(set(vocabulary.values())) != len(vocabulary):
        raise MinipuzzleError(f"the tokenizer of {folder} gives several tokens one number", "copy it from the source")
    return tokenizer
