"""What an export is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from minipuzzle.cut.budget import inherited
from minipuzzle.export.algorithms import CalibrationMethod
from minipuzzle.export.write import portable_config
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import DEFAULT_SHARD_BYTES
from minipuzzle.formats.choices import CLOSEST, MAX, PLAIN
from minipuzzle.formats.layout import ExportLayout, export_layout, with_closest_scales


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to write and how.

    ``scheme``: ``bf16`` or a name in SCHEMES; ``overrides``: (pattern of module names, the scheme or ``bf16``).
    ``block_scales``: one of BLOCK_SCALES; ``workers``: threads that write.
    ``is_puzzle``: config.json with ``block_configs``, for a model whose layers differ in width.
    ``base_model``, ``quality`` (data name -> metric -> value) and ``command`` go into the model card.
    """

    scheme: str = PLAIN
    flavour: str = "modelopt"
    recipe: str = "default"
    overrides: tuple[tuple[str, str], ...] = ()
    fp8_kv_cache: bool = False
    is_puzzle: bool = False
    method: CalibrationMethod = field(default_factory=CalibrationMethod)
    verifies: bool = True
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    block_scales: str = MAX
    workers: int = 1
    base_model: str | None = None
    quality: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    command: str | None = None

    def layout(self, checkpoint: Checkpoint) -> ExportLayout:
        """What of a checkpoint is stored how.

        Raises: MinipuzzleError for an unknown recipe, overrides that fit nothing, widths the format cannot hold, or a
        model that ``block_configs`` cannot describe.
        """
        portable_config(checkpoint, is_puzzle=self.is_puzzle)
        layout = export_layout(
            checkpoint.architecture.deployed,
            scheme=self.scheme,
            flavour=self.flavour,
            recipe=self.recipe,
            overrides=self.overrides,
            fp8_kv_cache=self.fp8_kv_cache,
        )
        return with_closest_scales(layout) if self.block_scales == CLOSEST else layout

    def provenance(self, checkpoint: Checkpoint, token_ids: torch.Tensor | None) -> dict[str, Any]:
        """Everything that the written tensors depend on."""
        return {
            "command": "export",
            "format": self.scheme,
            "source_fingerprint": checkpoint.fingerprint,
            "flavour": self.flavour,
            "recipe": self.recipe,
            "overrides": [list(override) for override in self.overrides],
            "fp8_kv_cache": self.fp8_kv_cache,
            "is_puzzle": self.is_puzzle,
            "method": asdict(self.method),
            "max_shard_bytes": self.max_shard_bytes,
            **({} if self.block_scales == MAX else {"block_scales": self.block_scales}),
            "calibration": None if token_ids is None else tokens_fingerprint(token_ids),
            **inherited(checkpoint.folder),
        }


def tokens_fingerprint(token_ids: torch.Tensor) -> str:
    """A short hash of tokens."""
    return hashlib.sha256(f"{list(token_ids.shape)}".encode() + token_ids.numpy().tobytes()).hexdigest()[:16]
