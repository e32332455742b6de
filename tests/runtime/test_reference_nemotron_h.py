"""transformers computes the published Nemotron-H formulas, below, at and beyond the length of its scan chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.models import load_model
from tests.support.reference_nemotron_h import reference_forward
from tests.support.tiny_models import VOCABULARY, write_tiny_checkpoint

CHUNK = 16  # of the tiny config


@pytest.mark.parametrize("tokens", [5, CHUNK, 3 * CHUNK + 2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"pattern": "M---MM---M*-", "n_groups": 1}, {"use_bias": True, "mlp_bias": True, "use_conv_bias": False}],
)
def test_transformers_matches_the_formulas(tmp_path: Path, tokens: int, changes: dict[str, Any]) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, **changes))
    token_ids = torch.randint(VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(1))
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.entries}
    wanted, _ = reference_forward(checkpoint.config, tensors, token_ids)
    with torch.no_grad():
        found = load_model(checkpoint)(token_ids, use_cache=False).logits
    assert wanted.abs().max() > 0.5  # a model that says something
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
