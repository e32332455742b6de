"""Training text as a seeded sequence of token windows that can be entered at any point.

Window number n is a pure function of the text, the seed, the blend and n: a resumed run needs no more than a number,
and the windows of a step are the same for any number of processes. Each source is cut into windows once, so that all
its epochs consist of the same windows, in another order each time; a teacher's targets can be kept by window.

Two ways to lay documents out. ``packed``: they follow each other without a gap, as in pre-training; neither attention
nor the state of Mamba layers is reset, so that a document is read after the end of another one, but no label crosses
a boundary. ``separate``: a window holds text of one document alone and is filled up with padding that does not count;
causal layers of every kind then see nothing else.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.settings import DOCUMENTS, DistillSettings, DocumentLayout
from minipuzzle.data.blend import BLEND_SUFFIX, Blend, PlannedShare, plain_blend, plan_blend, read_blend
from minipuzzle.data.documents import iterate_documents
from minipuzzle.data.windows import IGNORE, document_tokens
from minipuzzle.errors import MinipuzzleError

_NO_TOKEN = 0  # any token: nothing before it sees it, and it has no label
_HASHES = 1 << 32


@dataclass(frozen=True, kw_only=True)
class WindowPosition:
    """A place in the sequence of one source: how many epochs are behind it, and the window within this one."""

    epoch: int
    index: int


class PackedWindows:
    """The windows of one source: fixed stretches of its documents in a seeded order, reshuffled in every epoch.

    In packed text a window overlaps the next by one token, and what is left at the end and fills no window is dropped.

    Raises: MinipuzzleError if the text does not fill one window.
    """

    def __init__(
        self, documents: Sequence[Sequence[int]], *, sequence_length: int, seed: int = 0, layout: str = "packed"
    ) -> None:
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_documents = len(documents)
        self.num_tokens = sum(len(tokens) for tokens in documents)
        order = list(range(len(documents)))
        random.Random(f"{seed}/documents").shuffle(order)
        shuffled = [torch.tensor(documents[idx], dtype=torch.int32) for idx in order if len(documents[idx])]
        self._windows, self._labels = DOCUMENTS[layout].cut(shuffled, sequence_length)
        self.windows_per_epoch = len(self._windows)
        self.labels_per_epoch = int((self._labels != IGNORE).sum())
        self._cached_order: tuple[int, list[int]] | None = None
        if self.windows_per_epoch == 0:
            raise MinipuzzleError(
                f"the data has {self.num_tokens:,} tokens, fewer than one sequence of {sequence_length:,}",
                "give more ‹data›, or lower ‹sequence_length›",
            )

    @property
    def tokens_per_epoch(self) -> int:
        """Positions of one epoch; ``labels_per_epoch`` of them are predicted."""
        return self.windows_per_epoch * self.sequence_length

    def epochs(self, num_tokens: int) -> float:
        """How often the data is seen in a run of so many tokens."""
        return num_tokens / self.tokens_per_epoch

    def position(self, window: int) -> WindowPosition:
        """Epoch and index of a window of the endless sequence."""
        epoch, index = divmod(window, self.windows_per_epoch)
        return WindowPosition(epoch=epoch, index=index)

    def batch(self, first_window: int, num_windows: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of consecutive windows, both ``[num_windows, sequence_length]`` int64."""
        rows = torch.tensor([self._row(first_window + offset) for offset in range(num_windows)])
        return self._windows[rows].long(), self._labels[rows].long()

    def _row(self, window: int) -> int:
        position = self.position(window)
        if self._cached_order is None or self._cached_order[0] != position.epoch:
            order = list(range(self.windows_per_epoch))
            random.Random(f"{self.seed}/{position.epoch}").shuffle(order)
            self._cached_order = (position.epoch, order)
        return self._cached_order[1][position.index]


def _cut_packed(documents: list[Tensor], sequence_length: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels ``[windows, sequence_length]`` int32 of documents without gaps between them."""
    stream = torch.cat([*documents, torch.empty(0, dtype=torch.int32)])
    labels = stream.clone()
    starts = torch.tensor([len(tokens) for tokens in documents], dtype=torch.int64).cumsum(0)[:-1]
    labels[starts] = IGNORE  # the first token of a document follows from nothing before it
    num_windows = max(0, len(stream) - 1) // sequence_length
    end = num_windows * sequence_length
    return stream[:end].view(-1, sequence_length), labels[1 : end + 1].view(-1, sequence_length)


def _cut_separately(documents: list[Tensor], sequence_length: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels ``[windows, sequence_length]`` int32, no window of more than one document."""
    inputs, labels = [], []
    for tokens in documents:
        for start in range(0, len(tokens) - 1, sequence_length):
            piece = tokens[start : start + sequence_length + 1]
            row = torch.full((2, sequence_length), _NO_TOKEN, dtype=torch.int32)
            row[1] = IGNORE
            row[0, : len(piece) - 1], row[1, : len(piece) - 1] = piece[:-1], piece[1:]
            inputs.append(row[0])
            labels.append(row[1])
    if not inputs:
        return torch.empty(0, sequence_length, dtype=torch.int32), torch.empty(0, sequence_length, dtype=torch.int32)
    return torch.stack(inputs), torch.stack(labels)


PACKED = DocumentLayout(
    _cut_packed, "documents are packed: attention and Mamba state run on across their boundaries, labels do not"
)
SEPARATE = DocumentLayout(
    _cut_separately, "a sequence holds one document: nothing of another one reaches attention or Mamba state"
)


class BlendedWindows:
    """The windows of a run: phase after phase, in each of them those of its sources evenly interleaved.

    A source goes on in a phase where it stopped in the one before. After the run's last window there is none.
    """

    def __init__(self, sources: dict[str, PackedWindows], blend: Blend, *, total_windows: int) -> None:
        self.sources = sources
        self.blend = blend
        self.total_windows = total_windows
        lengths = {windows.sequence_length for windows in sources.values()}
        assert len(lengths) == 1
        self.sequence_length = lengths.pop()
        per_epoch = {name: windows.windows_per_epoch for name, windows in sources.items()}
        self.plan = plan_blend(blend, per_epoch, total_windows=total_windows, sequence_length=self.sequence_length)
        self._source_names: list[str] = list(sources)
        self._source_idx, self._source_window = self._schedule()

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources together."""
        return sum(windows.num_tokens for windows in self.sources.values())

    @property
    def predicted_fraction(self) -> float:
        """Share of the run's positions that have a label; the others are boundaries and padding."""
        labels = sum(
            share.num_windows
            * self.sources[share.source].labels_per_epoch
            / self.sources[share.source].windows_per_epoch
            for share in self.plan
        )
        return labels / (self.total_windows * self.sequence_length)

    def epochs_of(self, source: str) -> float:
        """How often a source is read over all phases."""
        return sum(share.epochs for share in self.plan if share.source == source)

    def position(self, window: int) -> WindowPosition:
        """Epoch and index of a window in its own source; of the run's end, those of the window that would follow."""
        if window >= self.total_windows:
            last = int(self._source_window[-1])
            return self.sources[self.source_of(-1)].position(last + 1)
        return self.sources[self.source_of(window)].position(int(self._source_window[window]))

    def source_of(self, window: int) -> str:
        """The source that a window of the run comes from."""
        return self._source_names[int(self._source_idx[window])]

    def batch(self, first_window: int, num_windows: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of consecutive windows, both ``[num_windows, sequence_length]`` int64."""
        pairs = [
            self.sources[self.source_of(window)].batch(int(self._source_window[window]), 1)
            for window in range(first_window, first_window + num_windows)
        ]
        return torch.cat([inputs for inputs, _ in pairs]), torch.cat([labels for _, labels in pairs])

    def _schedule(self) -> tuple[Any, Any]:
        """For every window of the run the number of its source, and its number within that source."""
        read = dict.fromkeys(self._source_names, 0)
        source_parts, window_parts = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for phase in self.blend.phases:
            shares = [share for share in self.plan if share.phase == phase.name]
            # A source's k-th of n windows belongs at (k + 1/2) / n of the phase.
            places = [(np.arange(share.num_windows) + 0.5) / max(1, share.num_windows) for share in shares]
            numbers = [np.full(share.num_windows, self._source_names.index(share.source)) for share in shares]
            windows = [read[share.source] + np.arange(share.num_windows) for share in shares]
            order = np.argsort(np.concatenate(places), kind="stable")
            source_parts.append(np.concatenate(numbers)[order].astype(np.int32))
            window_parts.append(np.concatenate(windows)[order])
            for share in shares:
                read[share.source] += share.num_windows
        return np.concatenate(source_parts), np.concatenate(window_parts)


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """What a run trains on, and the documents of it that were kept for validation."""

    windows: BlendedWindows
    held_out: list[str]

    @property
    def plan(self) -> list[PlannedShare]:
        """What each phase reads of each source."""
        return self.windows.plan


def blend_of(data: tuple[Path, ...], held_out: float = 0.0) -> Blend:
    """The blend that ``--data`` names: a blend file, or text as one source.

    Raises: MinipuzzleError for a blend file among other paths, or one that is wrong.
    """
    if not any(path.suffix == BLEND_SUFFIX for path in data):
        return plain_blend(data, held_out)
    if len(data) > 1 or held_out:
        raise MinipuzzleError(
            "a blend file stands alone", "name all sources, and held_out, in the blend file, and give one ‹data›"
        )
    return read_blend(data[0])


def read_training_text(tokenizer: Any, blend: Blend, settings: DistillSettings) -> TrainingText:
    """Read, split and tokenise all sources of a blend, and lay out the run's windows.

    Raises: MinipuzzleError for text that cannot be read, is too short, or would be read too often.
    """
    sources, held_out = {}, []
    for source in blend.sources:
        documents = []
        for text in iterate_documents(source.paths, tokenizer):
            if is_held_out(text, blend.held_out):
                held_out.append(text)
            else:
                documents.append(document_tokens(tokenizer, text))
        try:
            sources[source.name] = PackedWindows(
                documents,
                sequence_length=settings.sequence_length,
                seed=settings.seed,
                layout=settings.documents,
            )
        except MinipuzzleError as error:
            raise MinipuzzleError(f"source {source.name}: {error.problem}", error.hint) from None
    if blend.held_out and not held_out:
        raise MinipuzzleError(
            f"no document fell into the held-out share of {blend.held_out:g}", "raise it, or give ‹validation›"
        )
    total_windows = settings.total_steps * settings.batch_sequences
    return TrainingText(windows=BlendedWindows(sources, blend, total_windows=total_windows), held_out=held_out)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out share. Its text alone decides, so that copies are never parted."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < share * _HASHES
