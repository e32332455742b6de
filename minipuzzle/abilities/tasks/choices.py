"""Tasks by likelihood from local files, in the layouts that they are passed on in.

PIQA (1911.11641), SIQA (1904.09728), BoolQ (1905.10044), CommonsenseQA (1811.00937), MMLU (2009.03300). Prompts are
those of lm-eval 0.4 for PIQA, SIQA, BoolQ and MMLU, without examples.
"""

from __future__ import annotations

import csv
import gzip
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minipuzzle.abilities.items import Item, Sampling, Task
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import parse_json, require_regular_file

LETTERS = "ABCDEFGHIJ"
_QUESTION_FIELDS = ("question", "goal", "input", "query", "ctx")
_PASSAGE_FIELDS = ("passage", "context")
_ANSWER_FIELDS = ("answer", "label", "answerKey", "correct", "target", "gold")
_OPTION_SETS = (("sol1", "sol2"), ("answerA", "answerB", "answerC"), ("A", "B", "C", "D"))
_LETTERED = re.compile(r"^\(?([A-J])[.)] ", re.MULTILINE)
_HINT = "a record has a question, options and the right one; `docs/abilities.md` lists the layouts"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What all layouts hold. ``answer``: the place of the right option."""

    question: str
    passage: str
    options: tuple[str, ...]
    answer: int


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of a .jsonl (or .jsonl.gz) file, one a line, or of a headless MMLU .csv, with their line numbers.

    Raises: MinipuzzleError naming the line that is no record.
    """
    require_regular_file(path)
    name = path.name.removesuffix(".gz")
    try:
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise MinipuzzleError(f"{path} cannot be read: {error}", "restore the file from its source") from None
    if name.endswith(".csv"):
        for number, row in enumerate(csv.reader(text.splitlines()), start=1):
            if len(row) < 4:
                raise MinipuzzleError(f"{path}:{number} has {len(row)} columns", "question, options, letter of one")
            yield number, {"question": row[0], "choices": row[1:-1], "answer": row[-1]}
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = parse_json(line, f"{path}:{number}", "one JSON object a line")
            if not isinstance(record, dict):
                raise MinipuzzleError(f"{path}:{number} is no JSON object", "one JSON object a line")
            yield number, record


def question_of(record: Mapping[str, Any]) -> Question:
    """A question in any of the layouts known.

    Raises: ValueError saying what is missing.
    """
    stem = next((record[name] for name in _QUESTION_FIELDS if name in record), None)
    passage = str(next((record[name] for name in _PASSAGE_FIELDS if name in record), "")).strip()
    choices: Any = record.get("choices", record.get("options", record.get("endings")))
    if isinstance(stem, dict):  # CommonsenseQA as published
        choices = stem.get("choices", choices)
        stem = stem.get("stem")
    if not isinstance(stem, str):
        raise ValueError("no question")
    options = _options(record, choices)
    answer = next((record[name] for name in _ANSWER_FIELDS if record.get(name) not in (None, "")), None)
    is_boolean = str(answer).casefold() in ("true", "false", "yes", "no") and not options
    if is_boolean:
        return Question(
            question=stem.strip(),
            passage=passage,
            options=("no", "yes"),
            answer=int(str(answer).casefold() in ("true", "yes")),
        )
    if not options and isinstance(answer, int) and answer in (0, 1):
        return Question(question=stem.strip(), passage=passage, options=("no", "yes"), answer=answer)
    if len(options) < 2 or len(set(options)) < len(options):
        raise ValueError("no two options that differ")
    from_one = "answerA" in record and "label" in record  # SIQA counts from 1
    return Question(
        question=stem.strip(), passage=passage, options=options, answer=option_place(answer, options, from_one=from_one)
    )


def _options(record: Mapping[str, Any], choices: Any) -> tuple[str, ...]:
    if isinstance(choices, str):  # "A. ...\nB. ..."
        return tuple(text.strip() for text in _LETTERED.split(choices.strip())[2::2])
    if isinstance(choices, Mapping):  # {"label": [...], "text": [...]}
        choices = choices.get("text", [])
    if isinstance(choices, Sequence):
        texts = [one.get("text", "") if isinstance(one, Mapping) else one for one in choices]
        return tuple(str(text).strip() for text in texts)
    names = next((names for names in _OPTION_SETS if all(name in record for name in names)), ())
    return tuple(str(record[name]).strip() for name in names)


def option_place(answer: Any, options: Sequence[str], *, from_one: bool = False) -> int:
    """The place of the right option, which is given by its text, letter or number.

    Raises: ValueError if there is no such option.
    """
    text = str(answer).strip()
    if text.isdigit() and text not in options:
        place = int(text) - from_one
    elif len(text) == 1 and text in LETTERS:
        place = LETTERS.index(text)
    else:
        bare = _LETTERED.sub("", text, count=1).strip()
        place = options.index(bare) if bare in options else -1
    if not 0 <= place < len(options):
        raise ValueError(f"{text[:40]!r} is none of the options")
    return place


def choice_items(sampling: Sampling, *, prompt: str, names_options: bool = False) -> list[Item]:
    """Items of a file of questions in seeded order, all of them or as many as asked for.

    ``prompt``: with {question}, {passage} and {lettered}. ``names_options``: a model answers with an option's letter.
    Questions without a right answer, as test sets have them, are an error.
    """
    assert sampling.data is not None
    records = list(read_records(sampling.data))
    items = []
    for number, record in random.Random(f"{sampling.seed}").sample(records, len(records))[: sampling.num_items]:
        try:
            found = question_of(record)
        except ValueError as error:
            raise MinipuzzleError(f"{sampling.data}:{number}: {error}", _HINT) from None
        lettered = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, found.options, strict=False))
        shown = LETTERS[: len(found.options)] if names_options else found.options
        texts = [f" {text}" for text in shown]
        items.append(
            Item(
                name=str(number),
                prompt=prompt.format(question=found.question, passage=found.passage, lettered=lettered),
                options=(texts[found.answer], *texts[: found.answer], *texts[found.answer + 1 :]),
            )
        )
    return items


def _task(description: str, prompt: str, **how: Any) -> Task:
    return Task(description=description, items=partial(choice_items, prompt=prompt, **how), needs_data=True)


PIQA = _task("which of two ways works in the physical world", "Question: {question}\nAnswer:")
SIQA = _task("what people do and feel next", "Q: {passage} {question}\nA:")
BOOLQ = _task("a yes-or-no question about a passage", "{passage}\nQuestion: {question}?\nAnswer:")
COMMONSENSEQA = _task(
    "a question of common sense, by letter", "Question: {question}\n{lettered}\nAnswer:", names_options=True
)
MMLU = _task("an examination question, by letter", "{question}\n{lettered}\nAnswer:", names_options=True)
