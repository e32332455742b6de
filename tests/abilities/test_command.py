"""Guarantee: `abilities` puts the same items to all models, keeps every decision, and continues where it was killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minipuzzle as mp
from minipuzzle.abilities.decisions import Journal
from minipuzzle.workflows.demo import EXAMPLE
from tests.support.cli import run_cli, run_json
from tests.support.kills import stop_command_when
from tests.support.served import served_model
from tests.support.tiny_models import write_tiny_checkpoint

MODEL = EXAMPLE / "model"
SMALL = ("--episodes", 4, "--context-words", "8", "--device", "cpu")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tiny model of the same family as ``tiny_folder``."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("other") / "other", pattern="M-M*-")


def decisions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_models_are_compared_item_by_item(tiny_folder: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run_json("abilities", other, "--against", tiny_folder, *SMALL, "-o", out)
    assert found == json.loads((out / "abilities.json").read_text(encoding="utf-8"))
    rows = {(row["task"], row["group"], row["model"]): row for row in found["rows"]}
    assert {task for task, _, _ in rows} == {"copying", "induction", "needle"}
    kept = decisions(out)
    assert len(kept) == 2 * 3 * 4
    for (task, _, model), row in rows.items():
        own = [line for line in kept if (line["task"], line["model"]) == (task, model)]
        assert row["share"]["mean"] == pytest.approx(sum(line["score"] for line in own) / len(own))
        assert (row["difference"] is None) == (model == "model")
    states = {model: [line["state"] for line in kept if line["model"] == model] for model in ("model", "other")}
    assert states["model"] == states["other"] and len(set(states["model"])) == 12
    assert rows["copying", "", "other"]["kl"] > 0 and rows["needle", "", "other"]["kl"] is None
    assert any("4 items can show nothing" in note for note in found["notes"])


def test_a_model_does_not_differ_from_its_copy(tiny_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    changed = json.loads((copy / "config.json").read_text(encoding="utf-8")) | {"note": "a copy"}
    (copy / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    found = run_json("abilities", copy, "--against", tiny_folder, "--tasks", "copying,needle", *SMALL)
    for row in found["rows"]:
        if row["model"] == "copy":
            assert (row["difference"]["mean"], row["difference"]["p_value"], row["agreement"]) == (0, 1, 1)
            assert row["kl"] in (None, 0)


def test_python_gives_what_the_command_gives(tiny_folder: Path) -> None:
    found = mp.abilities([tiny_folder], tasks=["induction"], episodes=4, context_words="8")
    assert found.to_json() == run_json("abilities", tiny_folder, "--tasks", "induction", *SMALL)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_model(MODEL) as (address, _):
        yield address


def test_a_folder_and_the_server_of_it_answer_alike(url: str, tmp_path: Path) -> None:
    ours = shutil.copytree(MODEL, tmp_path / "ours")
    found = run_json("abilities", ours, "--against", url, "--tasks", "copying,needle", *SMALL)
    rows = {row["task"]: row for row in found["rows"] if row["model"] == "ours" and not row["group"]}
    for row in rows.values():
        assert (row["difference"]["wins"], row["difference"]["losses"], row["agreement"]) == (0, 0, 1)
    assert rows["copying"]["kl"] < 1e-6 and rows["copying"]["share"]["mean"] >= 0.5


def test_a_killed_run_continues_and_asks_nothing_twice(tiny_folder: Path, other: Path, tmp_path: Path) -> None:
    arguments = ("abilities", other, "--against", tiny_folder, "--episodes", 48, "--tasks", "copying", *SMALL[2:])
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_cli(*arguments, "-o", whole).exit_code == 0
    journal = tmp_path / "out.partial" / "decisions.jsonl"
    stop_command_when([*arguments, "-o", out], lambda: journal.is_file() and len(journal.read_bytes()) > 1000)
    with journal.open("a", encoding="utf-8") as file:
        file.write('{"model": "torn')
    assert Journal(journal).of("model")
    result = run_cli(*arguments, "-o", out)
    assert result.exit_code == 0, result.output
    assert (out / "decisions.jsonl").read_bytes() == (whole / "decisions.jsonl").read_bytes()
    assert (out / "abilities.json").read_bytes() == (whole / "abilities.json").read_bytes()


def test_a_run_is_not_continued_with_other_items(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = tmp_path / "out.partial"
    assert run_cli("abilities", tiny_folder, *SMALL, "-o", out).exit_code == 0
    out.rename(partial)
    result = run_cli("abilities", tiny_folder, *SMALL, "--seed", 1, "-o", out)
    assert result.exit_code == 4 and "another items" in result.output


def test_a_dry_run_says_how_much_would_be_asked(tiny_folder: Path) -> None:
    found = run_json("abilities", tiny_folder, *SMALL, "--dry-run")
    assert found["models"] == ["model"]
    assert found["tasks"]["needle"] == {
        "items": 4,
        "kind": "writing",
        "tokens_read": found["tasks"]["needle"]["tokens_read"],
        "tokens_written_at_most": 40,
    }
    assert found["tasks"]["copying"]["tokens_read"] > 4 * 4 * 40
    assert "copying (choice): 4 items" in run_cli("abilities", tiny_folder, *SMALL, "--dry-run").output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no model to ask"),
        (("{model}", "--tasks", "neddle"), "did you mean needle"),
        (("{model}", "--tasks", "piqa"), "give --data piqa=FILE"),
        (("{model}", "--data", "piqa=x.jsonl"), "add it to --tasks"),
        (("{model}", "--context-words", "0"), "no list of lengths"),
        (("--endpoint", "ftp://x"), "no address of a server"),
        (("{model}", "--tasks", "missing.jsonl"), "does not exist"),
        (("{model}/nothing",), "nothing"),
    ],
)
def test_mistakes_are_named(tiny_folder: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run_cli("abilities", *(part.format(model=tiny_folder) for part in arguments))
    assert result.exit_code == 1, result.output
    assert words in result.output and "hint:" in result.output and "Traceback" not in result.output


def test_tasks_of_lm_eval_need_lm_eval(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipuzzle.workflows.abilities.harness.find_spec", lambda _name: None)
    for arguments in (("--tasks", "piqa"), ("--tasks", "piqa", "--dry-run")):
        result = run_cli("evaluate", tiny_folder, *arguments)
        assert result.exit_code == 1 and "minipuzzle[eval]" in result.output
    both = ("--tasks", "piqa", "--data", "x.txt")
    assert "give either --data or --tasks" in run_cli("evaluate", tiny_folder).output
    assert "give either --data or --tasks" in run_cli("evaluate", tiny_folder, *both).output
    assert "lm-eval measures one model" in run_cli("evaluate", tiny_folder, *both[:2], "--against", "x").output


def test_the_table_holds_the_text_of_tasks_literally(tiny_folder: Path, tmp_path: Path) -> None:
    """What files and folders are called cannot put markup into what is printed."""
    task = tmp_path / "[bold red]x.jsonl"
    task.write_text('{"prompt": "1 + 1 =", "options": ["2", "3"], "answer": "2"}\n', encoding="utf-8")
    result = run_cli("abilities", tiny_folder, "--tasks", task, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "[bold red]x (1 items)" in result.output
