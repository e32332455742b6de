"""Which tokens of a byte-pair encoding stay, and its files without the others.

A token is made by one derivation alone, wherever it occurs: inside its span, merges happen in the order in which they
would happen if it were a text of its own, and none crosses its borders. So if the tokens of that derivation stay with
it, and every merge whose three tokens stay, text whose tokens all stay is encoded as before: at each step the merge
that went first among all is there, and goes first among those that are left.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from minipuzzle.data.windows import document_tokens
from minipuzzle.errors import MinipuzzleError, warn
from minipuzzle.files.companions import companion_files
from minipuzzle.files.json_files import read_json, write_json

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_MULTIPLE = 64  # to which engines pad a vocabulary
_SPACE = "▁"  # as SentencePiece writes it
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ID_FIELD = re.compile(r"_token(_ids?|_index)$|^pad_id$")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_UNCUT = ("tokenizer.model", "tekken.json")  # tokens in other forms than tokenizer.json


@dataclass(frozen=True, kw_only=True)
class BytePairs:
    """A byte-pair encoding. ``ids``: of tokens, ``ranks``: of pairs of tokens that are merged, ``added``: ids of tokens
    that are found in a text before anything is merged; ``alphabet``: of what any text can be spelled with."""

    ids: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]
    added: frozenset[int]
    alphabet: frozenset[int]

    @classmethod
    def read(cls, folder: Path) -> BytePairs:
        """Those of a folder's tokenizer.json.

        Raises: MinipuzzleError for a tokenizer of another kind, by its name.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise MinipuzzleError(f"{folder} has no {TOKENIZER_FILE} to cut", "leave out ‹vocab› and ‹keep_vocab_from›")
        record = read_json(path)
        model = record.get("model") or {}
        odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
        if model.get("type") != "BPE" or odd:
            kind = f"BPE with {odd[0]}" if odd and model.get("type") == "BPE" else str(model.get("type"))
            raise MinipuzzleError(
                f"{path} is a tokenizer of kind {kind}: its vocabulary cannot be cut",
                "plain byte-pair encodings can; leave out ‹vocab› and ‹keep_vocab_from›",
            )
        added = {token["content"]: token["id"] for token in record.get("added_tokens") or ()}
        return cls(
            ids=model["vocab"] | added,
            ranks={pair: rank for rank, pair in enumerate(map(_pair, model["merges"]))},
            added=frozenset(added.values()),
            alphabet=frozenset(_alphabet(record, model)),
        )

    def derivation(self, token: str) -> frozenset[int]:
        """The tokens that a token is made of, step by step; only itself where merges do not make it."""
        symbols = list(token)
        made = set(symbols)
        while len(symbols) > 1:
            found = [(self.ranks.get(pair), start) for start, pair in enumerate(pairwise(symbols))]
            ranked = [(rank, start) for rank, start in found if rank is not None]
            if not ranked:
                return frozenset({self.ids[token]})
            start = min(ranked)[1]
            symbols[start : start + 2] = [symbols[start] + symbols[start + 1]]
            made.add(symbols[start])
        ids = {self.ids.get(symbol) for symbol in made}
        return frozenset({self.ids[token]} | {idx for idx in ids if idx is not None})


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _alphabet(record: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[int]:
    """Bytes by themselves; every character where a tokenizer knows no bytes; and what stands for the unknown."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary: Mapping[str, int] = model["vocab"]
    if model.get("unk_token") in vocabulary:
        yield vocabulary[model["unk_token"]]
    spelled = json.dumps([record.get("pre_tokenizer"), record.get("decoder")])
    if "ByteLevel" in spelled:
        yield from (vocabulary[symbol] for symbol in ByteLevel.alphabet() if symbol in vocabulary)
    elif model.get("byte_fallback"):
        # A space that is bytes would be the sign for it again when it is decoded.
        yield from (idx for token, idx in vocabulary.items() if token == _SPACE or _BYTE_TOKEN.fullmatch(token))
    else:
        yield from (idx for token, idx in vocabulary.items() if len(token) == 1)


def count_tokens(tokenizer: Any, documents: Sequence[str]) -> Counter[int]:
    """How often each token occurs in some documents."""
    counts: Counter[int] = Counter()
    for text in documents:
        counts.update(document_tokens(tokenizer, text))
    return counts


def choose_tokens(
    pairs: BytePairs, counts: Mapping[int, int], *, limit: int | None = None, needed: frozenset[int] = frozenset()
) -> tuple[int, ...]:
    """Ascending ids of tokens that stay: bytes, added tokens, ``needed`` ones, and those of a text with their makings.

    ``limit``: so many in all, the most frequent first and then those that were merged first. Without one all that
    occur stay, and as many more as fill a multiple of VOCABULARY_MULTIPLE.

    Raises: MinipuzzleError for a limit that is too low for what must stay.
    """
    token_of = {idx: token for token, idx in pairs.ids.items()}
    kept = set(pairs.alphabet | pairs.added | needed)
    if limit is not None and len(kept) > limit:
        raise MinipuzzleError(
            f"a vocabulary of {limit:,} is too small: {len(kept):,} tokens are bytes or special", "raise ‹vocab›"
        )
    seen = sorted((idx for idx in counts if idx in token_of), key=lambda idx: (-counts[idx], idx))
    for idx in seen:
        more = pairs.derivation(token_of[idx]) - kept
        if limit is None or len(kept) + len(more) <= limit:
            kept |= more
    wanted = -(-len(kept) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE if limit is None else limit
    for idx in sorted(token_of):
        if len(kept) >= wanted:
            break
        more = pairs.derivation(token_of[idx]) - kept
        if len(kept) + len(more) <= wanted:
            kept |= more
    return tuple(sorted(kept))


def cut_tokenizer(record: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """A tokenizer.json with only the tokens that have a new id, and the merges among them."""
    model = record["model"]
    vocabulary = {token: new_ids[idx] for token, idx in model["vocab"].items() if idx in new_ids}
    merges = []
    for merge in model["merges"]:
        first, second = _pair(merge)
        if first in vocabulary and second in vocabulary and first + second in vocabulary:
            merges.append(merge)
    cut = {
        **record,
        "model": {**model, "vocab": vocabulary, "merges": merges},
        "added_tokens": [{**token, "id": new_ids[token["id"]]} for token in record.get("added_tokens") or ()],
    }
    return {**cut, **{name: _renumbered_rule(cut.get(name), new_ids) for name in ("post_processor", "padding")}}


def _renumbered_rule(rule: Any, new_ids: Mapping[int, int]) -> Any:
    """What a tokenizer adds to a text: ids are ``ids`` of special tokens, the second of a pair, or ``pad_id``."""
    if isinstance(rule, Mapping):
        found = {name: _renumbered_rule(value, new_ids) for name, value in rule.items()}
        for name in ("ids", "pad_id"):
            if name in found:
                found[name] = _renumbered(found[name], new_ids)
        for name in ("sep", "cls"):
            if isinstance(found.get(name), list):
                found[name] = [found[name][0], new_ids[found[name][1]]]
        return found
    return [_renumbered_rule(value, new_ids) for value in rule] if isinstance(rule, list) else rule


def renumber_config(config: Mapping[str, Any], new_ids: Mapping[int, int], old_size: int) -> dict[str, Any]:
    """A config.json or generation_config.json for other ids, in all parts that have the same vocabulary."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found[name] = renumber_config(value, new_ids, old_size)
        elif name == "vocab_size" and value == old_size:
            found[name] = len(new_ids)
        elif name in _ID_LISTS and isinstance(value, list):
            found[name] = [new_ids[idx] for idx in value if idx in new_ids]
        else:
            found[name] = _renumbered(value, new_ids) if _ID_FIELD.search(name) else value
    return found


def _renumbered(value: Any, new_ids: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_renumbered(item, new_ids) for item in value]
    return new_ids.get(value, value) if type(value) is int else value


def named_ids(config: Mapping[str, Any], size: int) -> frozenset[int]:
    """Ids of tokens that a config names, such as the one that ends a text."""
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= named_ids(value, size)
        elif _ID_FIELD.search(name):
            found |= {idx for idx in (value if isinstance(value, list) else [value]) if type(idx) is int}
    return frozenset(idx for idx in found if 0 <= idx < size)


def write_cut_files(source: Path, target: Path, new_ids: Mapping[int, int], old_size: int) -> None:
    """Carry along the files beside the weights, with fewer tokens and their new ids."""
    record = cut_tokenizer(read_json(source / TOKENIZER_FILE), new_ids)
    model = record["model"]
    for name, content in companion_files(source).items():
        path = target / name
        path.parent.mkdir(exist_ok=True)
        if name in _UNCUT:
            warn(f"{source / name} is left behind: {TOKENIZER_FILE} has the cut vocabulary")
        elif name == TOKENIZER_FILE:
            write_json(path, record)
        elif name == "vocab.json":
            write_json(path, model["vocab"])
        elif name == "merges.txt":
            path.write_text("\n".join(" ".join(_pair(merge)) for merge in model["merges"]) + "\n", encoding="utf-8")
        elif name == "added_tokens.json":
            write_json(path, {token: new_ids[idx] for token, idx in read_json(content).items()})
        elif name == "tokenizer_config.json":
            found = read_json(content)
            by_id = {str(new_ids[int(idx)]): token for idx, token in (found.get("added_tokens_decoder") or {}).items()}
            write_json(path, {**found, **({"added_tokens_decoder": by_id} if by_id else {})})
        elif name == "generation_config.json":
            write_json(path, renumber_config(read_json(content), new_ids, old_size))
        else:
            path.write_bytes(content.read_bytes())
