"""What an interrupted run left: training states, progress, teacher caches, partial scores."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.damage.config_cases import broken_json
from tests.damage.material import copy, distill_arguments
from tests.damage.runner import CANARY, DONE, EITHER, REFUSED, Case
from tests.damage.ways import holding

STATE, CACHE = "out.partial/state", "cache"


def _resumed(material: Path, damage: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        copy(material, folder, "pruned", "nemotron_h", "text.jsonl", CACHE, "out.partial")
        # A run is one of certain folders: without this each case would be refused for being a copy.
        record = folder / "out.partial/minipuzzle.json"
        record.write_text(record.read_text(encoding="utf-8").replace(str(material), str(folder)), encoding="utf-8")
        damage(folder)
        return distill_arguments(folder)

    return prepare


def _newest(folder: Path) -> Path:
    return max(path for path in (folder / STATE).iterdir() if path.is_dir())


def _byte_damage(file: str, position: float, bit: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = _newest(folder) / file
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1 << bit
        path.write_bytes(bytes(content))

    return damage


def in_newest(file: str, way: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: way(_newest(folder) / file)


def in_every(file: str, way: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for state in (folder / STATE).iterdir():
            way(state / file)

    return damage


def _state_cases(material: Path) -> Iterator[Case]:
    generator = random.Random(2)
    files = sorted(path.name for path in _newest(material).iterdir() if path.is_file())
    for file in files:
        for number in range(8):
            # An older good state is kept, so the run goes on from that one and says so; nothing may be trained on.
            damage = _byte_damage(file, generator.random(), generator.randrange(8))
            yield Case(
                name=f"state/{file}-flip-{number}",
                prepare=_resumed(material, damage),
                expected=EITHER,
            )
        ways: dict[str, Callable[[Path], object]] = {
            "missing": lambda path: path.unlink(),
            "empty": lambda path: path.write_bytes(b""),
            "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
            "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 64),
        }
        for name, way in ways.items():
            yield Case(
                name=f"state/{file}-{name}",
                prepare=_resumed(material, in_newest(file, way)),
                expected=EITHER,
            )
        yield Case(
            name=f"state/{file}-missing-everywhere",
            prepare=_resumed(
                material,
                in_every(file, lambda path: path.unlink(missing_ok=True)),
            ),
            expected=REFUSED,
        )

    def hostile(folder: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (folder / CANARY,))

        for state in (folder / STATE).iterdir():
            (state / ".metadata").write_bytes(pickle.dumps(Evil()))

    yield Case(name="state/hostile-metadata", prepare=_resumed(material, hostile))
    empty_newer: Callable[[Path], object] = lambda folder: (folder / STATE / "step-00000050").mkdir()  # noqa: E731
    yield Case(name="state/empty-newer", prepare=_resumed(material, empty_newer), expected=EITHER)
    mixed: Callable[[Path], object] = lambda folder: shutil.copyfile(  # noqa: E731
        min(p for p in (folder / STATE).iterdir() if p.is_dir()) / "progress.json", _newest(folder) / "progress.json"
    )
    yield Case(name="state/progress-of-other-step", prepare=_resumed(material, mixed), expected=EITHER)
    yield Case(name="state/whole", prepare=_resumed(material, lambda folder: None), expected=DONE)


def _progress_cases(material: Path) -> Iterator[Case]:
    fields = json.loads((_newest(material) / "progress.json").read_text(encoding="utf-8"))
    values: dict[str, Any] = {
        "text": "x",
        "negative": -5,
        "huge": 10**9,
        "null": None,
        "nan": float("nan"),
        "gone": ...,
    }
    for field in fields:
        for name, value in values.items():

            def damage(folder: Path, field: str = field, value: Any = value) -> None:
                for state in (folder / STATE).iterdir():
                    path = state / "progress.json"
                    record = json.loads(path.read_text(encoding="utf-8"))
                    record.update({field: value})
                    if value is ...:
                        del record[field]
                    path.write_text(json.dumps(record), encoding="utf-8")

            yield Case(name=f"progress/{field}-{name}", prepare=_resumed(material, damage))
    for name, content in broken_json(b'{"step": 4}').items():

        def broken(folder: Path, content: bytes = content) -> None:
            for state in (folder / STATE).iterdir():
                (state / "progress.json").write_bytes(content)

        yield Case(name=f"progress/json-{name}", prepare=_resumed(material, broken))
    provenance = json.loads((material / "out.partial/minipuzzle.json").read_text(encoding="utf-8"))
    for field in provenance:

        def other(folder: Path, field: str = field) -> None:
            path = folder / "out.partial/minipuzzle.json"
            record = json.loads(path.read_text(encoding="utf-8"))
            record[field] = "another"
            path.write_text(json.dumps(record), encoding="utf-8")

        yield Case(name=f"provenance/{field}-other", prepare=_resumed(material, other))
    for name, content in broken_json((material / "out.partial/minipuzzle.json").read_bytes()).items():
        yield Case(
            name=f"provenance/json-{name}",
            prepare=_resumed(material, holding(content, "out.partial/minipuzzle.json")),
        )


def _cache_cases(material: Path) -> Iterator[Case]:
    generator = random.Random(3)
    files = sorted(
        path.relative_to(material / CACHE).as_posix() for path in (material / CACHE).rglob("*") if path.is_file()
    )
    for file in files[:6]:
        for number in range(4):
            position = generator.random()

            def flipped(folder: Path, file: str = file, position: float = position) -> None:
                path = folder / CACHE / file
                content = bytearray(path.read_bytes())
                content[int(position * (len(content) - 1))] ^= 16
                path.write_bytes(bytes(content))

            # Targets can be computed again: either is right, as long as nothing damaged is trained on.
            yield Case(
                name=f"cache/{file}-flip-{number}",
                prepare=_resumed(material, flipped),
                expected=EITHER,
            )
        for name, content in {"empty": b"", "zeros": b"\0" * 4096, "text": b"hello"}.items():
            yield Case(
                name=f"cache/{file}-{name}",
                prepare=_resumed(material, holding(content, f"{CACHE}/{file}")),
                expected=EITHER,
            )


def cases(material: Path) -> Iterator[Case]:
    """All cases of this file."""
    yield from _state_cases(material)
    yield from _progress_cases(material)
    yield from _cache_cases(material)
