"""Training text as an endless, seeded sequence of packed token windows that can be entered at any point.

Window number n is a pure function of the documents, the seed and n: a resumed run needs no more than a number.
Documents follow each other as in pre-training, and neither attention nor state is reset between them: the model sees
the end of one document while it reads the next.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipuzzle.corpus import document_tokens
from minipuzzle.errors import MinipuzzleError


@dataclass(frozen=True, kw_only=True)
class WindowPosition:
    """A place in the endless sequence: how many epochs are behind it, and the window within this one."""

    epoch: int
    index: int


class PackedWindows:
    """Windows of ``sequence_length`` inputs and as many labels, cut anew from reshuffled documents in every epoch.

    A window overlaps the next by one token, so that every token but the first of an epoch is predicted. What is left
    at an epoch's end and fills no window is dropped; another order of documents drops something else.

    Raises: MinipuzzleError if the text does not fill one window.
    """

    def __init__(self, documents: Sequence[Sequence[int]], *, sequence_length: int, seed: int = 0) -> None:
        self.sequence_length = sequence_length
        self.seed = seed
        self._documents = [torch.tensor(tokens, dtype=torch.int32) for tokens in documents]
        self.num_tokens = sum(len(tokens) for tokens in self._documents)
        self.windows_per_epoch = max(0, self.num_tokens - 1) // sequence_length
        self._cached_epoch: tuple[int, Tensor] | None = None
        if self.windows_per_epoch == 0:
            raise MinipuzzleError(
                f"the data has {self.num_tokens:,} tokens, fewer than one sequence of {sequence_length:,}",
                "give more --data, or lower --sequence-length",
            )

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Sequence[str], *, sequence_length: int, seed: int = 0) -> PackedWindows:
        """Tokenise documents and pack them."""
        documents = [document_tokens(tokenizer, text) for text in texts]
        return cls(documents, sequence_length=sequence_length, seed=seed)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens that are predicted in one epoch."""
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
        windows = torch.stack([self._window(first_window + offset) for offset in range(num_windows)]).long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _window(self, window: int) -> Tensor:
        position = self.position(window)
        if self._cached_epoch is None or self._cached_epoch[0] != position.epoch:
            self._cached_epoch = (position.epoch, self._cut_epoch(position.epoch))
        return self._cached_epoch[1][position.index]

    def _cut_epoch(self, epoch: int) -> Tensor:
        shuffler = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self._documents)))
        shuffler.shuffle(order)
        stream = torch.cat([self._documents[document_idx] for document_idx in order])
        # Neighbours in a long document are alike, so the windows are shuffled too.
        starts = list(range(self.windows_per_epoch))
        shuffler.shuffle(starts)
        windows = stream.unfold(0, self.sequence_length + 1, self.sequence_length)
        return windows[starts]
