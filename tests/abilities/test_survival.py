"""Guarantee: what a model lost shows: a hybrid whose attention is silent copies no more, while the same items and the
same words leave the whole one unharmed."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

import minipuzzle as mp
from minipuzzle.workflows.demo import EXAMPLE

MODEL = EXAMPLE / "model"


def without_attention(folder: Path) -> Path:
    """The embedded hybrid with attention layers that add nothing."""
    shutil.copytree(MODEL, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    silent = [name for name in tensors if name.endswith("mixer.o_proj.weight")]
    assert len(silent) == 4
    for name in silent:
        tensors[name].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_hybrid_without_attention_copies_no_more(tmp_path: Path) -> None:
    silent = without_attention(tmp_path / "silent")
    found = mp.abilities([silent], against=MODEL, tasks=["copying"], episodes=16, context_words="12")
    whole, cut = (row for row in found.rows if not row.group)
    assert whole.share.mean >= 0.8 and whole.difference is None
    assert cut.difference is not None and cut.difference.mean < -0.3 and cut.difference.p_value < 0.05
    assert cut.difference.high < 0 and cut.kl is not None and cut.kl > 0.5
    assert any("16 items" in note for note in found.notes)
