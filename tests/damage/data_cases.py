"""Text, blends and deployments: what people write by hand or fetch from somewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.damage.config_cases import evaluated
from tests.damage.material import LENGTH, copy
from tests.damage.runner import DONE, EITHER, REFUSED, Case
from tests.damage.ways import folder_with, holding, linked

GOOD = '{"text": "the quick brown fox jumps over the lazy dog"}\n' * 4


def _read(material: Path, name: str, make: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        copy(material, folder, "llama")
        (folder / "llama").rename(folder / "model")
        make(folder / name)
        arguments = evaluated(folder)
        arguments[arguments.index("text.jsonl")] = name
        return arguments

    return prepare


def _jsonl_cases(material: Path) -> Iterator[Case]:
    lines: dict[str, tuple[bytes, str]] = {
        "not-json": (b"hello\n", REFUSED),
        "half": (b'{"text": "a', REFUSED),
        "no-text": (b'{"body": "a"}\n', REFUSED),
        "number": (b'{"text": 5}\n', REFUSED),
        "null": (b'{"text": null}\n', REFUSED),
        "list": (b'["a"]\n', REFUSED),
        "bare-text": (b'"a"\n', REFUSED),
        "nested": (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", REFUSED),
        "half-emoji": (b'{"text": "\\ud83d and more words to read here"}\n', EITHER),
        "nul-bytes": (b"\0" * 400 + b"\n", REFUSED),
        "nul-in-text": (b'{"text": "a\\u0000b and more words to read here"}\n', EITHER),
        "not-utf8": (b'{"text": "\xff\xfe"}\n', REFUSED),
        "utf16": (GOOD.encode("utf-16"), REFUSED),
        "bom": (b"\xef\xbb\xbf" + GOOD.encode(), EITHER),
        "duplicate-key": (b'{"text": "a b c d e f", "text": "g h i j k l"}\n', EITHER),
        "empty": (b"", REFUSED),
        "blank-lines": (b"\n\n\n", REFUSED),
        "empty-text": (b'{"text": ""}\n', REFUSED),
        "carriage-returns": (GOOD.replace("\n", "\r\n").encode(), DONE),
        "long-number": (b'{"text": "a b c d e f", "n": ' + b"9" * 5000 + b"}\n", EITHER),
        "infinity": (b'{"text": "a b c d e f", "n": Infinity}\n', EITHER),
        "messages-empty": (b'{"messages": []}\n', REFUSED),
        "messages-text": (b'{"messages": "hello"}\n', REFUSED),
        "messages-numbers": (b'{"messages": [1, 2]}\n', REFUSED),
        "messages-no-template": (b'{"messages": [{"role": "user", "content": "a"}]}\n', REFUSED),
        "huge-line": (b'{"text": "' + b"word " * 12_000_000 + b'"}\n', EITHER),
        "good": (GOOD.encode(), DONE),
    }
    for name, (content, expected) in lines.items():
        yield Case(
            name=f"data/jsonl-{name}", prepare=_read(material, "text.jsonl", holding(content)), expected=expected
        )
        if name in ("not-json", "no-text", "half", "null"):  # the damage after good lines
            late = holding(GOOD.encode() + content)
            yield Case(name=f"data/jsonl-late-{name}", prepare=_read(material, "text.jsonl", late), expected=EITHER)


def _file_cases(material: Path) -> Iterator[Case]:
    files: dict[str, tuple[str, Callable[[Path], object], str]] = {
        "txt-not-utf8": ("a.txt", lambda p: p.write_bytes(b"\xff\xfe\xfa" * 9), REFUSED),
        "txt-nul": ("a.txt", lambda p: p.write_bytes(b"\0" * 4000), REFUSED),
        "txt-blank": ("a.txt", lambda p: p.write_text("  \n \n"), REFUSED),
        "txt-big": ("a.txt", lambda p: p.write_text("words and more words " * 400_000), EITHER),
        "txt-good": ("a.txt", lambda p: p.write_text("words and more words " * 9), DONE),
        "suffix": ("a.docx", lambda p: p.write_text("words"), REFUSED),
        "no-suffix": ("text", lambda p: p.write_text("words"), REFUSED),
        "fifo": ("a.jsonl", os.mkfifo, REFUSED),
        "endless": ("a.txt", lambda p: p.symlink_to("/dev/zero"), REFUSED),
        "endless-jsonl": ("a.jsonl", lambda p: p.symlink_to("/dev/zero"), REFUSED),
        "null-device": ("a.txt", lambda p: p.symlink_to("/dev/null"), REFUSED),
        "dangling": ("a.txt", lambda p: p.symlink_to("nowhere"), REFUSED),
        "loop": ("a.txt", lambda p: p.symlink_to(p.name), REFUSED),
        "missing": ("a.txt", lambda p: None, REFUSED),
        "empty-folder": ("texts", lambda p: p.mkdir(), REFUSED),
        "parquet-text": ("a.parquet", lambda p: p.write_text("words"), REFUSED),
        "parquet-magic": ("a.parquet", lambda p: p.write_bytes(b"PAR1" + b"\0" * 40 + b"PAR1"), REFUSED),
        "parquet-empty": ("a.parquet", lambda p: p.write_bytes(b""), REFUSED),
        "parquet-other-column": ("a.parquet", lambda p: _parquet(p, {"body": ["a b c"]}), REFUSED),
        "parquet-numbers": ("a.parquet", lambda p: _parquet(p, {"text": [1, 2]}), REFUSED),
        "parquet-nulls": ("a.parquet", lambda p: _parquet(p, {"text": [None, None]}), REFUSED),
        "parquet-no-rows": ("a.parquet", lambda p: _parquet(p, {"text": []}), REFUSED),
        "parquet-good": ("a.parquet", lambda p: _parquet(p, {"text": ["words and more words"] * 9}), DONE),
        "parquet-truncated": ("a.parquet", _truncated_parquet, REFUSED),
        "folder-of-json": ("texts", folder_with({"a.json": GOOD}), REFUSED),
        "folder-loop": ("texts", folder_with({"in": linked(".."), "a.txt": GOOD}), EITHER),
        "folder-dangling": ("texts", folder_with({"a.txt": linked("x"), "b.txt": GOOD}), EITHER),
    }
    for name, (file, make, expected) in files.items():
        yield Case(name=f"data/{name}", prepare=_read(material, file, make), expected=expected)


def _parquet(path: Path, columns: dict[str, list[object]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def _truncated_parquet(path: Path) -> None:
    _parquet(path, {"text": ["words"] * 100})
    path.write_bytes(path.read_bytes()[:-40])


SOURCE = '[sources.a]\npath = "text.jsonl"\n'
PHASE = '[[phases]]\nname = "one"\nshare = 1.0\nweights = { a = 1.0 }\n'


def _toml_cases(material: Path) -> Iterator[Case]:
    texts = {
        "good": SOURCE + PHASE,
        "empty": "",
        "broken": "[[[",
        "not-utf8": "\udcff",
        "text-only": 'a = "b"',
        "sources-number": "sources = 7\n",
        "sources-list": "sources = [1, 2]\n",
        "phases-number": "phases = 7\n" + SOURCE,
        "path-missing": "[sources.a]\nmax_epochs = 2\n" + PHASE,
        "path-number": "[sources.a]\npath = 5\n" + PHASE,
        "path-gone": '[sources.a]\npath = "nowhere.jsonl"\n' + PHASE,
        "epochs-negative": SOURCE + "max_epochs = -1\n" + PHASE,
        "epochs-text": SOURCE + 'max_epochs = "many"\n' + PHASE,
        "epochs-nan": SOURCE + "max_epochs = nan\n" + PHASE,
        "held-out-text": 'held_out = "some"\n' + SOURCE + PHASE,
        "held-out-negative": "held_out = -0.5\n" + SOURCE + PHASE,
        "held-out-all": "held_out = 1.0\n" + SOURCE + PHASE,
        "unknown-key": "beauty = 1\n" + SOURCE + PHASE,
        "source-unknown-key": SOURCE + "beauty = 1\n" + PHASE,
        "source-twice": SOURCE + SOURCE + PHASE,
        "share-above-one": SOURCE + PHASE.replace("share = 1.0", "share = 2.0"),
        "share-negative": SOURCE + PHASE.replace("share = 1.0", "share = -1.0"),
        "share-nan": SOURCE + PHASE.replace("share = 1.0", "share = nan"),
        "share-text": SOURCE + PHASE.replace("share = 1.0", 'share = "all"'),
        "weight-unknown": SOURCE + PHASE.replace("a = 1.0", "z = 1.0"),
        "weight-negative": SOURCE + PHASE.replace("a = 1.0", "a = -1.0"),
        "weight-text": SOURCE + PHASE.replace("a = 1.0", 'a = "much"'),
        "weight-infinite": SOURCE + PHASE.replace("a = 1.0", "a = inf"),
        "weight-zero": SOURCE + PHASE.replace("a = 1.0", "a = 0.0"),
        "nested": "a = " + "[" * 100_000,
        "date": "[sources.a]\npath = 1979-05-27\n" + PHASE,
    }
    for name, text in texts.items():

        def blend(folder: Path, text: str = text) -> list[str]:
            copy(material, folder, "pruned", "nemotron_h", "text.jsonl")
            (folder / "blend.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
            batch = ["--sequence-length", str(LENGTH), "--batch", "2", "--tokens", "64", "--device", "cpu", "--json"]
            return ["distill", "pruned", "--teacher", "nemotron_h", "--data", "blend.toml", *batch, "-o", "out"]

        yield Case(name=f"blend/{name}", prepare=blend, expected=DONE if name == "good" else REFUSED)
    deployments = {
        "good": '[mine]\nmemory = "1GiB"\ncontext = 64\n',
        "empty": "",
        "broken": "[[[",
        "memory-number": "[mine]\nmemory = 7\n",
        "memory-text": '[mine]\nmemory = "much"\n',
        "context-negative": '[mine]\nmemory = "1GiB"\ncontext = -5\n',
        "context-huge": '[mine]\nmemory = "1GiB"\ncontext = 999999999999999999999999\n',
        "context-text": '[mine]\nmemory = "1GiB"\ncontext = "long"\n',
        "batch-zero": '[mine]\nmemory = "1GiB"\nbatch = 0\n',
        "batch-fraction": '[mine]\nmemory = "1GiB"\nbatch = 1.5\n',
        "weights-unknown": '[mine]\nmemory = "1GiB"\nweights = "int3"\n',
        "unknown-key": '[mine]\nmemory = "1GiB"\nbeauty = 1\n',
        "not-a-table": "mine = 5\n",
        "other-name": '[yours]\nmemory = "1GiB"\n',
        "boolean": '[mine]\nmemory = "1GiB"\ncontext = true\n',
    }
    for name, text in deployments.items():

        def deployed(folder: Path, text: str = text) -> list[str]:
            copy(material, folder, "llama")
            (folder / "mine.toml").write_text(text, encoding="utf-8")
            return ["inspect", "llama/config.json", "--deployment", "mine", "--deployments", "mine.toml", "--json"]

        yield Case(name=f"deployments/{name}", prepare=deployed, expected=DONE if name == "good" else REFUSED)


def cases(material: Path) -> Iterator[Case]:
    """All cases of this file."""
    yield from _jsonl_cases(material)
    yield from _file_cases(material)
    yield from _toml_cases(material)
