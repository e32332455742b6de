"""Tokenizer of the tiny hybrid model and its training rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import corpus
import numpy as np
import torch
from model_files import BOS_ID, EOS_ID, MAXIMUM_TOKENS, VOCABULARY_SIZE, write_json
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>"]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every text round-trips, digits stand alone, bos is put before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAXIMUM_TOKENS,
    )


def encode_stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[corpus.Document]) -> NDArray[np.uint16]:
    """Return the parts of `documents` in seeded order as one stream: bos, part, and eos after the last."""
    parts: list[tuple[str, bool]] = []
    for document in documents:
        texts = [part.text for part in corpus.split_into_parts(document)]
        parts += [(text, index == len(texts) - 1) for index, text in enumerate(texts)]
    random.Random(f"{corpus.SPLIT_SEED}/stream").shuffle(parts)
    encoded = tokenizer([text for text, _ in parts])["input_ids"]
    pieces = [
        np.array([*ids, EOS_ID] if is_last else ids, dtype=np.uint16)
        for ids, (_, is_last) in zip(encoded, parts, strict=True)
    ]
    return np.concatenate(pieces)


class RowSampler:
    """Rows of one domain, none repeated inside an epoch; row `n` is a pure function of `n` and the seed."""

    def __init__(self, stream: NDArray[np.uint16], row_tokens: int, seed: int) -> None:
        self._stream = stream
        self._row_tokens = row_tokens
        self._seed = seed
        # One row fewer than fit, so that each epoch can start at another offset inside the first row.
        self._rows_per_epoch = (len(stream) - 1) // row_tokens - 1
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._offset = 0

    def row(self, number: int) -> NDArray[np.uint16]:
        """Return row `number` as `row_tokens` + 1 token ids (inputs and shifted targets overlap)."""
        epoch, index = divmod(number, self._rows_per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = generator.permutation(self._rows_per_epoch)
            self._offset = int(generator.integers(self._row_tokens))
            self._epoch = epoch
        start = self._offset + int(self._order[index]) * self._row_tokens
        return self._stream[start : start + self._row_tokens + 1]


def batch_rows(
    samplers: Sequence[RowSampler], rows_per_domain: Sequence[int], step: int, rank: int, ranks: int
) -> Tensor:
    """Return the rows of one process for `step`, [rows, row_tokens + 1]; counts are over all ranks."""
    rows = []
    for sampler, count in zip(samplers, rows_per_domain, strict=True):
        rows += [sampler.row(step * count + index) for index in range(rank, count, ranks)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def evaluation_windows(ids: Sequence[int], window: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (inputs, targets) of at most `window` tokens that together score each later token once.

    Windows overlap by `window` - `stride` tokens of context, whose targets are masked by -100.
    """
    scored = 1
    start = 0
    while scored < len(ids):
        piece = list(ids[start : start + window + 1])
        first_new = scored - start
        targets = [-100] * (first_new - 1) + piece[first_new:]
        yield piece[:-1], targets
        scored = start + len(piece)
        start += stride


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and a tokenizer_config.json that older releases of transformers read too."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": f"<|{name}|>" for name in ("pad", "bos", "eos")},
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAXIMUM_TOKENS,
    }
    write_json(folder / "tokenizer_config.json", settings)
