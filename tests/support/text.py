"""Tokens and texts that tests measure on."""

from __future__ import annotations

import torch

from tests.support.tiny_models import VOCABULARY


def random_tokens(samples: int = 2, tokens: int = 21, *, seed: int = 7, first: int = 0) -> torch.Tensor:
    """``[samples, tokens]`` of the tiny models' vocabulary, from ``first`` upwards: 3 leaves special tokens out."""
    return torch.randint(first, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))
