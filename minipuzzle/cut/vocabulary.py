"""A checkpoint with a part of its vocabulary: embeddings and LM head by row, ids in config.json, and the tokenizer.

It reads like any other, so that whatever measures, searches, cuts or compares sees a model of the smaller vocabulary.
The distribution over the rows that stay is the source's, renormalised: their logits are the same.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from minipuzzle.architecture.kinds import VOCABULARY
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import KeptUnits, Plan
from minipuzzle.data.vocabulary import renumber_config, write_cut_files
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import TensorEntry, torch_dtype

if TYPE_CHECKING:
    import torch

_READ_ROWS = 4096


class VocabularyCut(Checkpoint):
    """A checkpoint whose vocabulary is ``kept_tokens`` of its source, in this order.

    ``tokenizer_folder``: a folder whose tokenizer has these ids; without one the source's is cut into one that lasts
    as long as this does.
    """

    def __init__(self, source: Checkpoint, kept_tokens: Sequence[int], tokenizer_folder: Path | None = None) -> None:
        """Nothing is read but headers and, where it is cut, the tokenizer.

        Raises: MinipuzzleError for ids that the model does not have, or a tokenizer that cannot be cut.
        """
        size = source.architecture.vocabulary
        if not kept_tokens or min(kept_tokens) < 0 or max(kept_tokens) >= size:
            raise MinipuzzleError(
                f"the vocabulary of {source.folder} has {size:,} rows, and tokens beyond them are to stay",
                "the model and the tokenizer do not belong together; check both folders",
            )
        self._source, self.kept_tokens = source, tuple(kept_tokens)
        new_ids = {old: new for new, old in enumerate(self.kept_tokens)}
        tables = {tensor.name for tensor in source.architecture.outer_tensors() if VOCABULARY in tensor.spec.axes}
        entries = {name: self._cut_entry(entry) if name in tables else entry for name, entry in source.entries.items()}
        self._tables = tables
        config = renumber_config(source.config, new_ids, size)
        frozen = MappingProxyType(config), MappingProxyType(entries)
        super().__init__(source.folder, *frozen, is_fused=source.is_fused, hub_id=source.hub_id)
        self._files: tempfile.TemporaryDirectory[str] | None = None
        if tokenizer_folder is None:
            self._files = tempfile.TemporaryDirectory(prefix="minipuzzle-")
            tokenizer_folder = Path(self._files.name)
            write_cut_files(source.tokenizer_folder, tokenizer_folder, new_ids, size)
        self.origin, self.tokenizer_folder = source.origin, tokenizer_folder

    def _cut_entry(self, entry: TensorEntry) -> TensorEntry:
        num_rows, *others = entry.shape
        num_bytes = entry.num_bytes // num_rows * len(self.kept_tokens)
        return replace(entry, shape=(len(self.kept_tokens), *others), num_bytes=num_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """That of the source and of the tokens."""
        tokens = np.array(self.kept_tokens, dtype=np.int64).tobytes()
        return hashlib.sha256(self._source.fingerprint.encode() + tokens).hexdigest()[:16]

    def unchecked_rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Rows of one tensor; of the tables those of the tokens that stay."""
        if name not in self._tables:
            return self._source.unchecked_rows(name, start, stop)
        import torch

        rows = np.array(self.kept_tokens[slice(start, stop)], dtype=np.int64)
        entry = self.entries[name]
        found = torch.empty((len(rows), *entry.shape[1:]), dtype=torch_dtype(entry.dtype))
        for first in range(int(rows.min(initial=0)), int(rows.max(initial=-1)) + 1, _READ_ROWS):
            here = np.flatnonzero((rows >= first) & (rows < first + _READ_ROWS))
            if here.size:
                part = self._source.unchecked_rows(name, first, first + _READ_ROWS)
                found[torch.from_numpy(here)] = part[torch.from_numpy(rows[here] - first)]
        return found


def recorded(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """A plan as it is kept: for the checkpoint in the folder, whose tokens are a part of what is cut."""
    if not isinstance(checkpoint, VocabularyCut):
        return plan
    kept_units: KeptUnits = {**plan.kept_units, VOCABULARY: {None: checkpoint.kept_tokens}}
    source = checkpoint.origin.architecture
    return replace(plan, source_fingerprint=source.fingerprint(), kept_units=kept_units)


def apart(plan: Plan, source: Checkpoint) -> tuple[Plan, Checkpoint]:
    """A kept plan as what it does to the checkpoint that has only the tokens that stay, and that checkpoint.

    Raises: MinipuzzleError for a plan of another model.
    """
    kept_tokens = plan.units(VOCABULARY, None)
    if kept_tokens is None:
        return plan, source
    plan.check_against(source.architecture)
    cut = VocabularyCut(source, kept_tokens)
    return on_fewer_tokens(plan, cut.architecture), cut


def on_fewer_tokens(plan: Plan, architecture: Architecture) -> Plan:
    """What a plan does beside cutting the vocabulary, for the model in which that is done."""
    kept_units = {axis: by_layer for axis, by_layer in plan.kept_units.items() if axis != VOCABULARY}
    return replace(plan, source_fingerprint=architecture.fingerprint(), kept_units=kept_units)
