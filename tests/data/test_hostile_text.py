"""Guarantee: text of others takes bounded time and memory, and a conversation comes out whole or is refused by line.

Chat templates run in transformers' sandbox within limits; what a template would drop is not trained on in silence.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from minipuzzle.data import conversations
from minipuzzle.data.documents import MAX_TEXT_BYTES, read_documents
from minipuzzle.data.limits import memory_at_most, time_at_most
from minipuzzle.errors import MinipuzzleError
from minipuzzle.runtime.models import load_tokenizer

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
OF_PARTS = "{% for m in messages %}[{{ m.role }}]{% for part in m.content %} {{ part.text }}{% endfor %}\n{% endfor %}"
EITHER = (
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n{% endfor %}"
)
WITH_TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}\n{% endfor %}"
)
PARTS = [{"type": "text", "text": "Where is Ayr?"}, {"type": "text", "text": "And Perth?"}]
TOOL = {"type": "function", "function": {"name": "find_town", "parameters": {"town": "string"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "find_town", "arguments": {"a": 1}}}]}


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(tiny_folder)


def read(tokenizer: Any, path: Path, template: str, *records: Any) -> list[str]:
    """What is read of some records, from JSONL and from Parquet alike."""
    tokenizer.chat_template = template
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    found = read_documents([path], tokenizer)
    parquet.write_table(pyarrow.Table.from_pylist(list(records)), path.with_suffix(".parquet"))
    assert read_documents([path.with_suffix(".parquet")], tokenizer) == found
    return found


@pytest.mark.parametrize(
    "body",
    [
        "{% for i in range(99999) %}{% for i in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for i in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{{ 'a' * 3000000000 }}",
        "{{ 'a' * 40000000 }}",
        "{{ '%1999999999d' % 1 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages[7].content }}",
    ],
)
def test_a_template_that_does_not_end_or_takes_too_much_is_refused(
    tokenizer: Any, tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "MAX_SECONDS", 0.2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MinipuzzleError, match=r"line 1: the chat template refuses the messages: \S"):
        read(tokenizer, tmp_path / "a.jsonl", body, {"messages": [{"role": "user", "content": "hello"}]})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_limits_hold_inside_the_block_only() -> None:
    with pytest.raises(TimeoutError), time_at_most(0.05):
        while True:
            pass
    with pytest.raises(MemoryError), memory_at_most(2**26):
        bytearray(2**28)
    assert len(bytearray(2**28)) == 2**28


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (PLAIN, "[user] Where is Ayr?\nAnd Perth?\n"),
        (OF_PARTS, "[user] Where is Ayr? And Perth?"),
        (EITHER, "[user] Where is Ayr?And Perth?"),
    ],
)
def test_content_in_parts_is_written_as_the_template_expects_it(
    tokenizer: Any, tmp_path: Path, template: str, found: str
) -> None:
    record = {"messages": [{"role": "user", "content": PARTS}]}
    assert read(tokenizer, tmp_path / "a.jsonl", template, record) == [found]


def test_tools_and_their_calls_come_out_of_the_template(tokenizer: Any, tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "Where?"}, CALL], "tools": [TOOL]}
    (found,) = read(tokenizer, tmp_path / "a.jsonl", WITH_TOOLS, record)
    assert found == tokenizer.apply_chat_template(record["messages"], tools=record["tools"], tokenize=False)
    assert found.count("find_town") == 2 and "null" not in found
    as_text = {**record, "tools": json.dumps(record["tools"])}
    assert read(tokenizer, tmp_path / "a.jsonl", WITH_TOOLS, as_text) == [found]


@pytest.mark.parametrize(
    ("template", "record", "problem"),
    [
        (PLAIN, {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL]}, "does not know tools"),
        (WITH_TOOLS, {"messages": [{"role": "user", "content": "a"}], "tools": [7]}, "no list of objects"),
        (PLAIN, {"messages": [CALL]}, "does not write out the call of find_town"),
        ("{{ messages[0].role }}", {"messages": [{"role": "user", "content": PARTS}]}, "all parts of a content"),
        (EITHER, {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "of type 'image'"),
        (EITHER, {"messages": [{"role": "user", "content": [5]}]}, "of type 'int'"),
    ],
)
def test_what_a_template_would_drop_is_refused_with_its_line(
    tokenizer: Any, tmp_path: Path, template: str, record: Any, problem: str
) -> None:
    tokenizer.chat_template = template
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + json.dumps(record) + "\n")
    with pytest.raises(MinipuzzleError, match=f"line 2.*{problem}"):
        read_documents([tmp_path / "a.jsonl"], tokenizer)


def test_parquet_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    path, text = tmp_path / "a.parquet", "word " * 14_000_000
    parquet.write_table(pyarrow.table({"text": [text]}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 2**20
    with pytest.raises(MinipuzzleError, match="would unpack to 70,"):
        read_documents([path])
    # A dictionary hides what its rows unpack to.
    rows = pyarrow.DictionaryArray.from_arrays([0] * 900, [text[: 2**25 + 1]])
    parquet.write_table(
        pyarrow.table({"text": rows}), path, compression="zstd", dictionary_pagesize_limit=2**27, store_schema=False
    )
    with pytest.raises(MinipuzzleError, match="row 1 has a text of 33,554,433 characters"):
        read_documents([path])


def test_a_plain_text_file_beyond_any_document_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(MinipuzzleError, match="512 MiB"):
        read_documents([path])
