"""What student and teacher must have in common, found out before any weight or text is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill.settings import DistillSettings
from minipuzzle.cut.plan import read_plan
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.models import load_tokenizer

GIVE_TEACHER = "give the model it was cut from with --teacher"
_PLAN_FILE = "plan.json"  # what `minipuzzle prune` leaves beside the weights


@dataclass(frozen=True, kw_only=True)
class SharedVocabulary:
    """One tokenizer for both models, and the rows that both heads have. ``note``: what a user should know, or empty."""

    tokenizer: Any
    rows: int
    note: str = ""


def shared_vocabulary(student: Checkpoint, teacher: Checkpoint) -> SharedVocabulary:
    """The vocabulary of a pair; logits of different vocabularies cannot be compared.

    Heads may be padded to different numbers of rows: what lies beyond the shorter one is compared with nothing.

    Raises: MinipuzzleError if a token has two numbers, or a head is too short for the tokenizer.
    """
    tokenizer, other = load_tokenizer(student.folder), load_tokenizer(teacher.folder)
    vocabulary, other_vocabulary = tokenizer.get_vocab(), other.get_vocab()
    if vocabulary != other_vocabulary:
        raise MinipuzzleError(
            f"the tokenizers of student and teacher differ: {_difference(vocabulary, other_vocabulary)}", GIVE_TEACHER
        )
    rows = {"student": student.architecture.vocabulary, "teacher": teacher.architecture.vocabulary}
    num_needed, fewest = max(vocabulary.values()) + 1, min(rows.values())
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


def _difference(vocabulary: dict[str, int], other: dict[str, int]) -> str:
    for token, idx in vocabulary.items():
        if token not in other:
            return f"{len(vocabulary):,} and {len(other):,} tokens, {token!r} is in the student's alone"
        if other[token] != idx:
            return f"they give tokens different numbers, {token!r} has {idx} and {other[token]}"
    return f"{len(vocabulary):,} and {len(other):,} tokens"


def kept_hidden_channels(student: Checkpoint, teacher: Checkpoint, settings: DistillSettings) -> tuple[int, ...] | None:
    """The teacher's hidden channels that the student has, for a hidden loss; None where all, or there is no such loss.

    Raises: MinipuzzleError if the widths differ and the student's folder does not say what was kept, or the teacher's
    hidden states would not be there.
    """
    if settings.hidden_weight == 0:
        return None
    if settings.top_k:
        raise MinipuzzleError(
            "a hidden loss needs the teacher's hidden states, and top-k targets do without",
            "drop --hidden-weight, or --top-k and --teacher-cache",
        )
    widths = student.architecture.hidden, teacher.architecture.hidden
    if widths[0] == widths[1]:
        return None
    path = student.folder / _PLAN_FILE
    kept = read_plan(path).units("hidden", None) if path.is_file() else None
    if kept is None or len(kept) != widths[0] or max(kept) >= widths[1]:
        raise MinipuzzleError(
            f"hidden sizes are {widths[0]:,} and {widths[1]:,}: {student.folder} does not say which channels it kept",
            f"drop --hidden-weight, or put the {_PLAN_FILE} of the cut beside the student's weights",
        )
    return kept
