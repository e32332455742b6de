"""MiniPuzzle makes large language models smaller: measure, search, cut, distil, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu", rounds_activations: bool = True
) -> nn.Module:
    """A runnable transformers model from a checkpoint folder or from any export of ours, in evaluation mode.

    The weights of a quantised export are decoded. ``rounds_activations``: activations are rounded as serving engines
    round them; False leaves the decoded weights alone. ``dtype``: float32 by default, which alone holds decoded weights
    exactly. torch is imported when this is called.

    Raises: MinipuzzleError naming the tensor, if the folder is damaged.
    """
    from minipuzzle.export.reader import load_any_model
    from minipuzzle.runtime.compute import Compute

    compute = Compute(device=device, dtype=str(dtype or "float32").removeprefix("torch."))
    return load_any_model(Path(folder), compute, rounds_activations=rounds_activations)
