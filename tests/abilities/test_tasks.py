"""Guarantee: tasks make the same items everywhere, read the layouts that data come in, and refuse what measures
nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.abilities.items import SCORERS, TASKS, Item, Sampling, check_items
from minipuzzle.abilities.tasks.choices import question_of
from minipuzzle.abilities.tasks.own_tasks import find_task
from minipuzzle.errors import MinipuzzleError
from tests.support.packages import run_python

MADE = ("copying", "induction", "needle")


@pytest.mark.parametrize("name", MADE)
def test_items_made_from_a_seed_are_the_same_in_every_process(name: str) -> None:
    sampling = Sampling(num_items=3, seed=5, context_words=(16, 300))
    items = TASKS[name].items(sampling)
    check_items(name, items)
    code = (
        "from minipuzzle.abilities.items import *;"
        f"print([i.state for i in TASKS[{name!r}].items(Sampling(num_items=3, seed=5, context_words=(16, 300)))])"
    )
    assert run_python({**os.environ, "PYTHONHASHSEED": "77"}, "-c", code).strip() == str([item.state for item in items])
    more = TASKS[name].items(Sampling(num_items=4, seed=5, context_words=(300,)))
    assert [item.state for item in more[:3]] == [item.state for item in items[3:]]
    assert {item.state for item in items}.isdisjoint(
        item.state for item in TASKS[name].items(Sampling(num_items=3, seed=6, context_words=(16, 300)))
    )


@pytest.mark.parametrize("name", MADE)
def test_the_right_answer_stands_in_the_context(name: str) -> None:
    for item in TASKS[name].items(Sampling(num_items=20, context_words=(16, 300))):
        context, _, _ = item.prompt.rpartition("\n") if "\n" in item.prompt else (item.prompt, "", "")
        assert (item.options[0] if item.options else item.reference) in f" {context}"
        assert len(item.prompt.split()) >= int(item.group.split()[0])


def test_recall_asks_for_words_that_stood_in_the_users_text(text_file: Path) -> None:
    items = TASKS["recall"].items(Sampling(num_items=10, data=text_file))
    texts = [json.loads(line)["text"] for line in text_file.read_text(encoding="utf-8").splitlines()]
    assert len(items) == 10
    for item in items:
        assert any(item.prompt + item.options[0] in text for text in texts)
        assert all(option in f" {item.prompt}" for option in item.options)


QUESTION, OPTIONS = "Which is it?", ["this", "that", "other"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "piqa": {"goal": QUESTION, "sol1": "this", "sol2": "that", "label": 1},
    "siqa": {"context": "C", "question": QUESTION, "answerA": "this", "answerB": "that", "answerC": "no", "label": "2"},
    "siqa by letter": {"question": QUESTION, "answerA": "this", "answerB": "that", "answerC": "no", "correct": "B"},
    "commonsenseqa": {
        "question": {"stem": QUESTION, "choices": [{"label": "A", "text": "this"}, {"label": "B", "text": "that"}]},
        "answerKey": "B",
    },
    "commonsenseqa by columns": {
        "question": QUESTION,
        "choices": {"label": ["A", "B", "C"], "text": OPTIONS},
        "answerKey": "B",
    },
    "mmlu": {"question": QUESTION, "choices": OPTIONS, "answer": 1},
    "mmlu by letter": {"question": QUESTION, "A": "this", "B": "that", "C": "no", "D": "none", "answer": "B"},
    "one string": {"question": QUESTION, "options": "\nA. this\nB. that\nC. other", "answer": "B. that"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_questions_are_read(layout: str) -> None:
    found = question_of(LAYOUTS[layout])
    assert (found.question, found.options[found.answer]) == (QUESTION, "that")
    assert found.options[0] == "this"


@pytest.mark.parametrize("answer", [True, "True", "yes", 1])
def test_yes_and_no_are_read(answer: object) -> None:
    found = question_of({"question": QUESTION, "passage": "P", "answer": answer})
    assert found.options[found.answer] == "yes" and found.passage == "P"


@pytest.mark.parametrize(
    "record",
    [
        {"goal": "x", "sol1": "a", "sol2": "b"},
        {"goal": "x", "sol1": "a", "sol2": "a", "label": 0},
        {"question": "x", "choices": ["a", "b"], "answer": 2},
        {"question": "x", "options": "A. a\nB. b", "answer": "C. c"},
        {"text": "x"},
    ],
)
def test_a_record_without_a_right_answer_is_an_error_that_names_its_line(
    record: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(MinipuzzleError, match=r"data\.jsonl:1"):
        TASKS["mmlu"].items(Sampling(num_items=1, data=path))


def test_the_csv_of_mmlu_is_read(tmp_path: Path) -> None:
    path = tmp_path / "anatomy_test.csv"
    path.write_text('"Which, of these?",a,b,c,d,C\nAnother?,e,f,g,h,A\n', encoding="utf-8")
    items = TASKS["mmlu"].items(Sampling(num_items=9, data=path))
    assert {item.prompt for item in items} == {
        "Which, of these?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
        "Another?\nA. e\nB. f\nC. g\nD. h\nAnswer:",
    }
    assert {item.prompt[0]: item.options[0] for item in items} == {"W": " C", "A": " A"}


def test_a_task_file_says_how_questions_are_put(tmp_path: Path) -> None:
    lines = [{"country": "France", "capital": "Paris", "others": ["Rome", "Paris"]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    chosen = 'data = "data.jsonl"\nprompt = "The capital of {country} is"\nanswer = "{capital}"\noptions = "others"\n'
    written = 'data = "data.jsonl"\nprompt = "Capital of {country}?"\nanswer = "{capital}"\nscore = "contains"\n'
    (tmp_path / "capitals.toml").write_text(chosen, encoding="utf-8")
    (tmp_path / "written.toml").write_text(written, encoding="utf-8")
    name, task = find_task(str(tmp_path / "capitals.toml"))
    (item,) = task.items(Sampling(num_items=5))
    assert (name, item.prompt, item.options) == ("capitals", "The capital of France is", (" Paris", " Rome"))
    _, task = find_task(str(tmp_path / "written.toml"))
    (item,) = task.items(Sampling(num_items=5))
    assert task.score is not None and task.score(item, "It is paris.") == 1.0 and task.score(item, "Rome") == 0.0
    (tmp_path / "wrong.toml").write_text('data = "data.jsonl"\nprompts = "x"\n', encoding="utf-8")
    with pytest.raises(MinipuzzleError, match="prompts"):
        find_task(str(tmp_path / "wrong.toml"))


def test_a_file_of_questions_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "options": ["2", "3"], "answer": "2"}\n', encoding="utf-8")
    name, task = find_task(str(path))
    (item,) = task.items(Sampling(num_items=5))
    assert (name, item.options, task.score) == ("mine", (" 2", " 3"), None)
    with pytest.raises(MinipuzzleError, match="unknown task 'neddle'"):
        find_task("neddle")


@pytest.mark.parametrize(
    ("scorer", "answer", "score"),
    [
        ("exact", " The  answer. ", 1.0),
        ("exact", "The answer is", 0.0),
        ("begins", "the answer, of course", 1.0),
        ("begins", "not the answer", 0.0),
        ("contains", "so it is the answer then", 1.0),
        ("number", "3 + 4 = 1,007", 0.0),
    ],
)
def test_scorers_hold_answers_against_the_reference(scorer: str, answer: str, score: float) -> None:
    assert SCORERS[scorer](Item(name="", prompt="", reference="the answer"), answer) == score


def test_the_last_number_counts() -> None:
    item = Item(name="", prompt="", reference="1,007.0")
    assert SCORERS["number"](item, "3 + 1004 = 1,007") == 1.0 and SCORERS["number"](item, "1007 or 3") == 0.0


def test_items_that_cannot_be_told_apart_are_refused() -> None:
    item = Item(name="1", prompt="x", options=(" a", " b"))
    for items in ([], [item, item], [Item(name="1", prompt="x", options=(" a", " a"))], [Item(name="1", prompt="x")]):
        with pytest.raises(MinipuzzleError):
            check_items("task", items)
    check_items("task", [item])
