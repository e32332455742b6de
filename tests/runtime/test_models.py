"""Guarantee: a model built from a checkpoint is that checkpoint, strictly, and on its own from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.models import build_model, load_model
from tests.support.tiny_models import change_tensors, write_family_checkpoint


def test_changing_a_loaded_model_does_not_change_what_the_checkpoint_reads_next(tiny_checkpoint: Checkpoint) -> None:
    """Tensors of a safetensors file are views of the mapped file, and float32 ones need no conversion."""
    name = "backbone.layers.0.mixer.in_proj.weight"
    before = tiny_checkpoint.tensor(name).clone()
    with torch.no_grad():
        for parameter in load_model(tiny_checkpoint).parameters():
            parameter.zero_()
    assert torch.equal(tiny_checkpoint.tensor(name), before)


def test_a_missing_or_unexpected_tensor_is_an_error(tiny_checkpoint: Checkpoint) -> None:
    tensors = {name: tiny_checkpoint.tensor(name) for name in tiny_checkpoint.entries}
    with pytest.raises(RuntimeError, match="Unexpected"):
        build_model(tiny_checkpoint.config, {**tensors, "backbone.extra": torch.ones(1)}.items())
    del tensors["lm_head.weight"]
    with pytest.raises(RuntimeError, match="Missing"):
        build_model(tiny_checkpoint.config, tensors.items())


def test_dt_is_not_clamped_in_a_loaded_model(tiny_checkpoint: Checkpoint) -> None:
    """transformers would clamp it at time_step_min, which no engine does."""
    limits = [m.time_step_limit for m in load_model(tiny_checkpoint).modules() if hasattr(m, "time_step_limit")]
    assert limits == [(0.0, float("inf"))] * 3


def test_tables_of_positions_in_early_llama_files_are_no_weights(tmp_path: Path) -> None:
    folder = write_family_checkpoint(tmp_path / "llama", "llama")
    weights = Checkpoint.open(folder).weight_bytes

    def add_tables(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    checkpoint = Checkpoint.open(change_tensors(folder, add_tables))
    checkpoint.require_plain_weights()
    assert checkpoint.weight_bytes == weights
