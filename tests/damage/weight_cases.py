"""safetensors files and indices: headers that lie, values that are not numbers, shards that are not there."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.damage.config_cases import with_model
from tests.damage.runner import EITHER, REFUSED, Case
from tests.damage.ways import linked

WEIGHTS = "model.safetensors"
Header = dict[str, Any]


def change_header(path: Path, change: Callable[[Header], object]) -> None:
    """Rewrite the header of a safetensors file and leave its data as it is."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def header_damage(change: Callable[[Header], object]) -> Callable[[Path], None]:
    return lambda folder: change_header(folder / "model" / WEIGHTS, change)


def in_entry(name: str, **fields: object) -> Callable[[Header], object]:
    return lambda header: header[name].update(fields)


def value_damage(name: str, value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model" / WEIGHTS
        tensors = load_file(path)
        tensors[name].view(-1)[tensors[name].numel() // 2] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def _header_cases(material: Path) -> Iterator[Case]:
    names = sorted(load_file(material / "llama" / WEIGHTS))
    first, second = names[0], names[1]

    def overlap(header: Header) -> None:
        size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
        begin = header[first]["data_offsets"][0]
        header[second]["data_offsets"] = [begin, begin + size]

    changes: dict[str, Callable[[Header], object]] = {
        "overlap": overlap,
        "offsets-negative": lambda h: h[first].update(data_offsets=[-4, 0]),
        "offsets-reversed": lambda h: h[first].update(data_offsets=h[first]["data_offsets"][::-1]),
        "offsets-beyond": lambda h: h[first].update(data_offsets=[10**9, 10**9 + 4]),
        "offsets-text": lambda h: h[first].update(data_offsets=["0", "4"]),
        "offsets-three": lambda h: h[first].update(data_offsets=[0, 4, 8]),
        "offsets-missing": lambda h: h[first].pop("data_offsets"),
        "offsets-fraction": lambda h: h[first].update(data_offsets=[0.5, 4.5]),
        "shape-text": lambda h: h[first].update(shape="32"),
        "shape-negative": lambda h: h[first].update(shape=[-1, 32]),
        "shape-other": lambda h: h[first].update(shape=[1, *h[first]["shape"]]),
        "shape-huge": lambda h: h[first].update(shape=[10**12, 10**12]),
        "shape-missing": lambda h: h[first].pop("shape"),
        "dtype-missing": lambda h: h[first].pop("dtype"),
        "dtype-unknown": lambda h: h[first].update(dtype="F12"),
        "dtype-number": lambda h: h[first].update(dtype=32),
        "entry-list": lambda h: h.update({first: [1, 2]}),
        "entry-null": lambda h: h.update({first: None}),
        "tensor-missing": lambda h: h.pop(first),
        "tensor-renamed": lambda h: h.update({"other": h.pop(first)}),
        "metadata-number": lambda h: h.update(__metadata__={"a": 1}),
    }
    for dtype in ("I32", "U8", "BOOL", "I64", "F64", "F16", "F8_E4M3", "F8_E5M2"):
        changes[f"dtype-{dtype}"] = in_entry(first, dtype=dtype)
    for name, change in changes.items():
        expected = EITHER if name == "metadata-number" else REFUSED
        yield Case(
            name=f"weights/header-{name}",
            prepare=with_model(material, "llama", header_damage(change)),
            expected=expected,
        )


def _byte_cases(material: Path) -> Iterator[Case]:
    content = (material / "llama" / WEIGHTS).read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    generator = random.Random(0)
    pieces = {
        "empty": b"",
        "short": content[:5],
        "header-zero": (0).to_bytes(8, "little") + content[8:],
        "header-huge": (2**62).to_bytes(8, "little") + content[8:],
        "header-99MB": (99_000_000).to_bytes(8, "little") + content[8:],
        "header-nested": (200_000).to_bytes(8, "little") + b"[" * 100_000 + b"]" * 100_000,
        "header-list": (9).to_bytes(8, "little") + b"[1, 2, 3]",
        "extra-bytes": content + b"\0" * 16,
        "git-lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        "html": b"<!DOCTYPE html><html><body>Not found</body></html>",
    }
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.999):
        pieces[f"truncated-{share}"] = content[: int(len(content) * share)]
    for number in range(30):
        position = 8 + generator.randrange(header_bytes)
        flipped = bytearray(content)
        flipped[position] ^= 1 << generator.randrange(8)
        pieces[f"header-flip-{number}"] = bytes(flipped)
    for name, piece in pieces.items():

        def damage(folder: Path, piece: bytes = piece) -> None:
            (folder / "model" / WEIGHTS).write_bytes(piece)

        expected = EITHER if "flip" in name else REFUSED
        yield Case(name=f"weights/{name}", prepare=with_model(material, "llama", damage), expected=expected)


def _value_cases(material: Path) -> Iterator[Case]:
    for name in sorted(load_file(material / "llama" / WEIGHTS)):
        for what, value in {"nan": float("nan"), "inf": float("inf")}.items():
            yield Case(name=f"weights/{what}-{name}", prepare=with_model(material, "llama", value_damage(name, value)))


def _index_cases(material: Path) -> Iterator[Case]:
    names = sorted(load_file(material / "llama" / WEIGHTS))

    def split(change: Callable[[Path, dict[str, Any]], object]) -> Callable[[Path], None]:
        """Two shards with an index that is then changed."""

        def damage(folder: Path) -> None:
            model = folder / "model"
            tensors = load_file(model / WEIGHTS)
            (model / WEIGHTS).unlink()
            halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
            for shard, members in halves.items():
                save_file({name: tensors[name] for name in members}, model / shard, metadata={"format": "pt"})
            weight_map: dict[str, Any] = {name: shard for shard, members in halves.items() for name in members}
            change(model, weight_map)
            index = {"metadata": {}, "weight_map": weight_map}
            (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

        return damage

    def instead(model: Path, make: Callable[[Path], object]) -> None:
        (model / "b.safetensors").unlink()
        make(model / "b.safetensors")

    def in_both(model: Path, weight_map: dict[str, Any]) -> None:
        extra = load_file(model / "b.safetensors")
        extra[names[0]] = torch.full_like(load_file(model / "a.safetensors")[names[0]], 0.5)
        save_file(extra, model / "b.safetensors", metadata={"format": "pt"})

    def beside_single(model: Path, weight_map: dict[str, Any]) -> None:
        save_file({name: torch.zeros(1) for name in names}, model / WEIGHTS, metadata={"format": "pt"})

    changes: dict[str, Callable[[Path, dict[str, Any]], object]] = {
        "shard-gone": lambda model, m: (model / "b.safetensors").unlink(),
        "shard-is-folder": lambda model, m: instead(model, lambda path: path.mkdir()),
        "shard-is-fifo": lambda model, m: instead(model, os.mkfifo),
        "shard-dangles": lambda model, m: instead(model, linked("nowhere")),
        "escapes": lambda model, m: m.update({names[0]: "../other.safetensors"}),
        "absolute": lambda model, m: m.update({names[0]: "/etc/passwd"}),
        "number": lambda model, m: m.update({names[0]: 5}),
        "wrong-shard": lambda model, m: m.update({names[0]: "b.safetensors"}),
        "extra-name": lambda model, m: m.update({"ghost.weight": "a.safetensors"}),
        "name-gone": lambda model, m: m.pop(names[0]),
        "in-both-shards": in_both,
        "stale-single-file": beside_single,
        "empty": lambda model, m: m.clear(),
    }
    for name, change in changes.items():
        expected = EITHER if name == "name-gone" else REFUSED  # the shard still holds it
        yield Case(name=f"index/{name}", prepare=with_model(material, "llama", split(change)), expected=expected)


def _place_cases(material: Path) -> Iterator[Case]:
    def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            path = folder / "model" / name
            path.unlink()
            make(path)

        return damage

    makes: dict[str, Callable[[Path], object]] = {
        "fifo": os.mkfifo,
        "folder": lambda path: path.mkdir(),
        "dangling": lambda path: path.symlink_to("nowhere"),
        "loop": lambda path: path.symlink_to(path.name),
        "endless": lambda path: path.symlink_to("/dev/zero"),
        "missing": lambda path: None,
    }
    for name in ("config.json", WEIGHTS, "tokenizer.json"):
        for what, make in makes.items():
            yield Case(name=f"place/{name}-{what}", prepare=with_model(material, "llama", replaced(name, make)))


def cases(material: Path) -> Iterator[Case]:
    """All cases of this file."""
    yield from _header_cases(material)
    yield from _byte_cases(material)
    yield from _value_cases(material)
    yield from _index_cases(material)
    yield from _place_cases(material)
