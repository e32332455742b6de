"""Tokens and texts that tests measure on."""

from __future__ import annotations

import torch

from tests.support.tiny_models import VOCABULARY


def random_tokens(samples: int = 2, tokens: int = 21) -> torch.Tensor:
    return torch.randint(VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(7))
