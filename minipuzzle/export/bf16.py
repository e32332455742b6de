"""BF16 folders that every engine loads: portable config.json, an LM head of its own, each tensor rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minipuzzle.architecture import Architecture, PlacedTensor
from minipuzzle.checkpoint import (
    DEFAULT_SHARD_BYTES,
    Checkpoint,
    ShardWriter,
    copy_companions,
    write_json,
)
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.model_card import CardFacts, write_model_card
from minipuzzle.outputs import check_target_folder, output_folder
from minipuzzle.progress import Advance, no_progress


@dataclass(frozen=True, kw_only=True)
class ExportedFolder:
    """A finished export."""

    folder: Path
    num_tensors: int
    weight_bytes: int

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {"out": str(self.folder), "num_tensors": self.num_tensors, "weight_bytes": self.weight_bytes}


def deployed_architecture(architecture: Architecture) -> Architecture:
    """The architecture as exported: the LM head is written out where engines do not read one that is tied."""
    return replace(architecture, tied_embeddings=architecture.tied_embeddings and architecture.names.ties_head)


def portable_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json that all engines read alike, for BF16 weights."""
    config = checkpoint.family.write(checkpoint.config, deployed_architecture(checkpoint.architecture))
    return {**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}


def read_source(checkpoint: Checkpoint, tensor: PlacedTensor) -> torch.Tensor:
    """One tensor of the exported model in the source's precision."""
    if tensor.part == "head" and tensor.name not in checkpoint.entries:
        return checkpoint.tensor(checkpoint.architecture.names.embeddings)
    return checkpoint.tensor(tensor.name)


def check_export_target(checkpoint: Checkpoint, out: Path, *, overwrite: bool) -> None:
    """Refuse a target folder that must not be replaced, among them the source itself.

    Raises: MinipuzzleError saying why.
    """
    if out.resolve() == checkpoint.folder.resolve():
        raise MinipuzzleError(f"{out} is the model itself", "choose another --out folder")
    check_target_folder(out, overwrite=overwrite)


def export_bf16(
    checkpoint: Checkpoint,
    out: Path,
    *,
    overwrite: bool = False,
    base_model: str | None = None,
    quality: Mapping[str, Mapping[str, float | None]] | None = None,
    command: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    advance: Advance = no_progress,
) -> ExportedFolder:
    """Write a checkpoint as a portable BF16 folder, tensor by tensor, and compare every tensor read back.

    ``quality``: rows of the card's table, data name -> metric -> value. ``advance`` is called with tensors done.

    Raises: MinipuzzleError for a quantised or damaged source, or a target that may not be replaced.
    """
    checkpoint.require_plain_weights()
    check_export_target(checkpoint, out, overwrite=overwrite)
    provenance = {"command": "export", "format": "bf16", "source_fingerprint": checkpoint.fingerprint}
    with output_folder(out, provenance, overwrite=overwrite) as partial:
        write_json(partial / "config.json", portable_config(checkpoint))
        copy_companions(checkpoint.folder, partial)
        writer = ShardWriter(partial, max_shard_bytes)
        for tensor in deployed_architecture(checkpoint.architecture).tensors():
            writer.add(tensor.name, read_source(checkpoint, tensor).to(torch.bfloat16))
            advance(1)
        writer.finish()
        facts = CardFacts(relation="finetune", base_model=base_model, quality=quality or {}, command=command)
        write_model_card(partial, checkpoint, facts)
        written = Checkpoint.open(partial)
        verify_bf16(checkpoint, written)
        return ExportedFolder(folder=out, num_tensors=len(written.entries), weight_bytes=written.weight_bytes)


def verify_bf16(source: Checkpoint, written: Checkpoint) -> None:
    """Read an export back and compare each tensor with the source's, rounded to BF16.

    Raises: MinipuzzleError naming the first tensor that differs.
    """
    written.require_plain_weights()
    for tensor, expected in _bf16_tensors(source):
        found = written.tensor(tensor.name)
        if found.dtype != torch.bfloat16 or not torch.equal(found, expected):
            raise MinipuzzleError(f"{tensor.name} was not written correctly to {written.folder}", "check the disk")


def _bf16_tensors(source: Checkpoint) -> Iterator[tuple[PlacedTensor, torch.Tensor]]:
    for tensor in deployed_architecture(source.architecture).tensors():
        yield tensor, read_source(source, tensor).to(torch.bfloat16)
