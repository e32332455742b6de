"""Guarantee: a byte-pair tokenizer cut to some tokens encodes every text whose tokens all stay as before, but for their
numbers, and every other text so that it decodes to itself; tokenizers that cannot be cut so are refused by their kind.

The tokenizers are trained by the library ``tokenizers``, which also encodes: nothing here merges pairs to check them.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minipuzzle.data.vocabulary import VOCABULARY_MULTIPLE, BytePairs, choose_tokens, cut_tokenizer
from minipuzzle.errors import MinipuzzleError

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SPECIAL = ("<pad>", "<s>", "</s>")
Record = dict[str, Any]


def trained(*, spelled_as: str) -> Record:
    """A tokenizer of 900 tokens, as GPT-2 spells bytes or as SentencePiece falls back to them."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=spelled_as == "fallback", unk_token=None))
    alphabet: list[str] = []
    if spelled_as == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        replace_space, no_bytes = decoders.Replace("▁", " "), decoders.ByteFallback()
        tokenizer.decoder = decoders.Sequence([replace_space, no_bytes, decoders.Fuse()])
    bytes_of_fallback = [f"<0x{byte:02X}>" for byte in range(256)] if spelled_as == "fallback" else []
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*SPECIAL, *bytes_of_fallback], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens([AddedToken("minipuzzle-user", special=False)])
    record: Record = json.loads(tokenizer.to_str())
    if bytes_of_fallback:  # not tokens that are looked for in a text
        record["added_tokens"] = [token for token in record["added_tokens"] if token["content"][:3] != "<0x"]
    return record


def with_every_merge(record: Record) -> Record:
    """As tiktoken's ranks are written down: each way of putting a token together is a merge, and whole words come
    first."""
    ids = record["model"]["vocab"]
    halves = (
        (token, token[:cut], token[cut:]) for token in sorted(ids, key=lambda t: ids[t]) for cut in range(1, len(token))
    )
    merges = [[first, second] for _, first, second in halves if first in ids and second in ids]
    return {**record, "model": {**record["model"], "merges": merges, "ignore_merges": True}}


KINDS = {
    "bytes": lambda: trained(spelled_as="bytes"),
    "fallback": lambda: trained(spelled_as="fallback"),
    "every-merge": lambda: with_every_merge(trained(spelled_as="bytes")),
}


@pytest.fixture(params=KINDS, scope="module")
def record(request: pytest.FixtureRequest) -> Record:
    return KINDS[request.param]()


def pairs_of(record: Record, folder: Path) -> BytePairs:
    (folder / "tokenizer.json").write_text(json.dumps(record))
    return BytePairs.read(folder)


def texts(seed: int) -> Iterator[str]:
    """Pieces that begin and end anywhere, and words in the wrong places."""
    rng = random.Random(seed)
    for _ in range(300):
        start = rng.randrange(len(TEXT))
        yield TEXT[start : start + rng.randrange(1, 60)]
        yield "".join(rng.sample(TEXT.split(), 4))


@pytest.mark.parametrize("limit", [None, 600, 700])
def test_text_whose_tokens_all_stay_keeps_its_tokens(record: Record, limit: int | None, tmp_path: Path) -> None:
    pairs, whole = pairs_of(record, tmp_path), Tokenizer.from_str(json.dumps(record))
    counts = Counter(whole.encode(TEXT[: len(TEXT) // 8], add_special_tokens=False).ids)
    kept = choose_tokens(pairs, counts, limit=limit, needed=frozenset({2}))
    assert kept == tuple(sorted(set(kept)))
    assert len(kept) == limit if limit else len(kept) % VOCABULARY_MULTIPLE == 0 and set(counts) <= set(kept)
    new_ids = {old: new for new, old in enumerate(kept)}
    cut = Tokenizer.from_str(json.dumps(cut_tokenizer(record, new_ids)))
    assert cut.get_vocab_size() == len(kept) < whole.get_vocab_size()
    num_kept = 0
    for text in texts(len(kept)):
        before, after = whole.encode(text), cut.encode(text)
        assert cut.decode(after.ids) == whole.decode(before.ids)
        if set(before.ids) <= set(kept):
            num_kept += 1
            assert after.ids == [new_ids[idx] for idx in before.ids], text
    assert 20 < num_kept < 600


def test_special_tokens_bytes_and_added_tokens_stay_whatever_the_text_is(record: Record, tmp_path: Path) -> None:
    pairs = pairs_of(record, tmp_path)
    kept = choose_tokens(pairs, Counter())
    names = {record["model"]["vocab"].get(token) for token in SPECIAL}
    assert names | {token["id"] for token in record["added_tokens"]} <= set(kept)
    cut = Tokenizer.from_str(json.dumps(cut_tokenizer(record, {old: new for new, old in enumerate(kept)})))
    assert cut.decode(cut.encode("Ünïcode ✓ \x07, and 漢字").ids) == "Ünïcode ✓ \x07, and 漢字"
    assert cut.encode("a").tokens[0] == "<s>" and cut.encode("minipuzzle-user").tokens[1:] == ["minipuzzle-user"]


def test_a_token_takes_along_what_it_is_made_of_and_nothing_else(tmp_path: Path) -> None:
    record = trained(spelled_as="bytes")
    pairs = pairs_of(record, tmp_path)
    made_by = {"".join(pair): pair for pair in pairs.ranks}

    def makings(token: str) -> set[str]:
        return {token}.union(*(makings(part) for part in made_by.get(token, ())))

    for token in list(made_by)[::7]:
        assert pairs.derivation(token) == {pairs.ids[part] for part in makings(token)}
    assert all(len(one) <= len(other) for one, other in pairwise(sorted(made_by, key=len)))


def test_a_vocabulary_too_small_for_bytes_is_refused_with_the_number(tmp_path: Path) -> None:
    pairs = pairs_of(trained(spelled_as="bytes"), tmp_path)
    with pytest.raises(MinipuzzleError, match="260 tokens are bytes or special"):
        choose_tokens(pairs, Counter(), limit=100)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (models.Unigram([("a", -1.0), ("b", -2.0)], 0), "Unigram"),
        (models.WordPiece({"a": 0, "[UNK]": 1}), "WordPiece"),
        (models.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"), "BPE with end_of_word_suffix"),
    ],
)
def test_other_tokenizers_are_refused_by_their_kind(model: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(MinipuzzleError, match=f"of kind {kind}"):
        pairs_of(json.loads(Tokenizer(model).to_str()), tmp_path)
