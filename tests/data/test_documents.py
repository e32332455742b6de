"""Guarantee: text comes out of every supported format whole and in order, and no record is skipped silently.

Conversations are written out exactly as transformers' own chat template does, and are not opened twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import PIECE_CHARACTERS, document_tokens
from minipuzzle.errors import MinipuzzleError
from minipuzzle.runtime.models import load_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TALK = [{"role": "user", "content": "Where is Ayr?"}, {"role": "assistant", "content": "In Scotland."}]
SPELLED = "<s>[user] Where is Ayr?\n[assistant] In Scotland.\n"


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Any:
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["Один line\nand another", "two", "three\u2028not a line end"]
    jsonl = write_jsonl(tmp_path / "a.jsonl", *({"text": text, "id": 3} for text in texts))
    table = write_parquet(tmp_path / "b.parquet", {"id": [1, 2, 3], "text": texts})
    (tmp_path / "c.txt").write_text(texts[0], encoding="utf-8")
    assert read_documents([jsonl]) == read_documents([table]) == texts
    assert read_documents([tmp_path]) == [*texts, *texts, texts[0]]


def test_conversations_are_written_out_by_the_tokenizers_own_template(tokenizer: Any, tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", {"messages": TALK}, {"text": "plain"})
    # In Parquet all messages have all fields; those that are null must not reach the template.
    with_nulls = [{**message, "name": None} for message in TALK]
    table = write_parquet(tmp_path / "b.parquet", {"messages": [with_nulls, [{**TALK[0], "name": "Ann"}]]})
    assert read_documents([jsonl], tokenizer) == [SPELLED, "plain"]
    assert read_documents([table], tokenizer)[0] == tokenizer.apply_chat_template(TALK, tokenize=False) == SPELLED


def test_a_document_is_opened_once(tokenizer: Any) -> None:
    by_template = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert document_tokens(tokenizer, SPELLED) == by_template
    assert document_tokens(tokenizer, "plain")[0] == tokenizer.bos_token_id
    assert document_tokens(tokenizer, SPELLED).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": ""}, "row 3: no text"),
        ({"text": None}, "row 3: no text"),
    ],
)
def test_a_parquet_row_without_text_is_named(tmp_path: Path, record: dict[str, Any], problem: str) -> None:
    table = write_parquet(tmp_path / "a.parquet", {"text": ["one", "two", record["text"]]})
    with pytest.raises(MinipuzzleError, match=problem):
        read_documents([table])


def test_bad_records_and_files_are_named(tokenizer: Any, tmp_path: Path) -> None:
    refused = {
        "no text": write_jsonl(tmp_path / "a.jsonl", {"text": "fine"}, {"messages": []}),
        "a.2.jsonl, line 1: no text": write_jsonl(tmp_path / "a.2.jsonl", {"messages": "hello"}),
        "no column text or messages": write_parquet(tmp_path / "b.parquet", {"body": ["x"]}),
        "c.parquet is empty": write_parquet(tmp_path / "c.parquet", {"text": pyarrow.array([], pyarrow.string())}),
        "unknown format": write_jsonl(tmp_path / "d.csv", {}),
    }
    (tmp_path / "e.parquet").write_bytes(b"PAR1 but nothing else")
    refused["not a readable Parquet file"] = tmp_path / "e.parquet"
    for problem, path in refused.items():
        with pytest.raises(MinipuzzleError, match=problem):
            read_documents([path], tokenizer)


def test_a_conversation_needs_a_template_that_accepts_it(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(MinipuzzleError, match="no chat template"):
        read_documents([path])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(MinipuzzleError, match=r"a\.jsonl, line 1: the chat template refuses .* roles must alternate"):
        read_documents([path], tokenizer)


def test_a_long_text_is_tokenised_in_pieces_to_the_same_tokens(tiny_folder: Path) -> None:
    """A byte-level tokenizer without merges shows every character; pieces must neither lose nor repeat any."""
    tokenizer = load_tokenizer(tiny_folder)
    text = "some words\nand more " * (3 * PIECE_CHARACTERS // 20)
    tokens = document_tokens(tokenizer, text)
    assert tokenizer.decode(tokens[1:]) == text
    word = "x" * (PIECE_CHARACTERS + 5)
    assert document_tokens(tokenizer, word) == tokenizer(word)["input_ids"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "' + b"word " * 7_000_000 + b'"}\n',
        b'{"text": "\\ud83d and half a character"}\n',
        b'{"text": ' + b"[" * 200_000 + b"}\n",
        b"\0" * 99,
    ],
)
def test_lines_that_no_reader_should_hold_are_refused_with_their_number(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "a good line"}\n' + content)
    with pytest.raises(MinipuzzleError, match="line 2"):
        read_documents([path])


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "more"}\n')
    assert read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == ["words", "more"]


def test_nul_bytes_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\0" * 50)
    with pytest.raises(MinipuzzleError, match="NUL"):
        read_documents([tmp_path / "a.txt"])
