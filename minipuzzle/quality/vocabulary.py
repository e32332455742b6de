"""One vocabulary for two models, without which their predictions cannot be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minipuzzle.cut.vocabulary import VocabularyCut
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.models import load_tokenizer

_HINT = "KL and agreement need one vocabulary: give the model that this one was made from"


@dataclass(frozen=True, kw_only=True)
class SharedVocabulary:
    """One tokenizer for both models, and the rows that both heads have. ``note``: what a user should know, or empty."""

    tokenizer: Any
    rows: int
    note: str = ""


def check_same_vocabulary(model: Checkpoint, other: Checkpoint) -> None:
    """Refuse two models whose distributions cannot be laid side by side, row by row.

    Raises: MinipuzzleError if heads differ in length or, where both folders have tokenizers, a token in its number.
    """
    rows = model.architecture.vocabulary, other.architecture.vocabulary
    if rows[0] != rows[1]:
        raise MinipuzzleError(
            f"{model.folder} has a vocabulary of {rows[0]:,}, {other.folder} one of {rows[1]:,}", _HINT
        )
    if all((checkpoint.folder / "tokenizer.json").is_file() for checkpoint in (model, other)):
        _check_same_tokenizers(model, other, _HINT)


def in_vocabulary_of(student: Checkpoint, teacher: Checkpoint) -> Checkpoint:
    """A teacher with only the tokens that its student kept, under their numbers there; as it is where they share one.

    It is compared over these rows, renormalised, and reads the student's tokens: also where the teacher's own
    tokenizer would have made one of several.
    """
    if student.architecture.vocabulary >= teacher.architecture.vocabulary:
        return teacher
    vocabulary, others = (load_tokenizer(each.tokenizer_folder).get_vocab() for each in (student, teacher))
    is_part = len(vocabulary) < len(others) and vocabulary.keys() <= others.keys()
    in_order = sorted(vocabulary, key=lambda token: vocabulary[token])
    kept_tokens = [others[token] for token in in_order] if is_part else []
    if len(kept_tokens) != student.architecture.vocabulary:  # each row has its token
        return teacher
    return VocabularyCut(teacher, kept_tokens, student.tokenizer_folder)


def shared_vocabulary(student: Checkpoint, teacher: Checkpoint, hint: str = _HINT) -> SharedVocabulary:
    """The vocabulary of a pair whose heads may be padded to different numbers of rows.

    What lies beyond the shorter head is compared with nothing.

    Raises: MinipuzzleError if a token has two numbers, or a head is too short for the tokenizer.
    """
    tokenizer = _check_same_tokenizers(student, teacher, hint)
    rows = {"student": student.architecture.vocabulary, "teacher": teacher.architecture.vocabulary}
    num_needed, fewest = max(tokenizer.get_vocab().values()) + 1, min(rows.values())
    for name, num_rows in rows.items():
        if num_rows < num_needed:
            raise MinipuzzleError(
                f"the {name}'s vocabulary has {num_rows:,} rows, and its tokenizer knows {num_needed:,} tokens",
                "the model and the tokenizer do not belong together; check both folders",
            )
    if rows["student"] == rows["teacher"]:
        return SharedVocabulary(tokenizer=tokenizer, rows=fewest)
    note = (
        f"one vocabulary of {num_needed:,} tokens, padded to {rows['student']:,} rows in the student and "
        f"{rows['teacher']:,} in the teacher: the first {fewest:,} are compared"
    )
    return SharedVocabulary(tokenizer=tokenizer, rows=fewest, note=note)


def _check_same_tokenizers(model: Checkpoint, other: Checkpoint, hint: str) -> Any:
    """The tokenizer of both."""
    tokenizer = load_tokenizer(model.tokenizer_folder)
    vocabulary, others = tokenizer.get_vocab(), load_tokenizer(other.tokenizer_folder).get_vocab()
    if vocabulary != others:
        difference = _difference(vocabulary, others)
        raise MinipuzzleError(f"{model.folder} and {other.folder} have different tokenizers: {difference}", hint)
    return tokenizer


def _difference(vocabulary: dict[str, int], other: dict[str, int]) -> str:
    for token, idx in vocabulary.items():
        if token not in other:
            return f"{len(vocabulary):,} and {len(other):,} tokens, {token!r} is in the first alone"
        if other[token] != idx:
            return f"they give tokens different numbers, {token!r} has {idx} and {other[token]}"
    return f"{len(vocabulary):,} and {len(other):,} tokens"
