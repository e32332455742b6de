"""Exports whose content is not what it was: scales, codes, weights, configuration. ``verify`` must notice each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.damage.config_cases import broken_json
from tests.damage.material import LENGTH, copy
from tests.damage.runner import DONE, EITHER, REFUSED, Case
from tests.damage.ways import GONE, holding, setting

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"


def _verified(
    material: Path, name: str, damage: Callable[[Path], object], *, against: bool
) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        copy(material, folder, name, "text.jsonl", *(["pruned"] if against else []))
        damage(folder / name)
        source = ["--against", "pruned"] if against else []
        run = ["--data", "text.jsonl", "--samples", "2", "--sequence-length", str(LENGTH), "--device", "cpu", "--json"]
        return ["verify", name, *source, *run]

    return prepare


def _tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
        )

    return damage


def _json(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return damage


def flip(tensor: torch.Tensor, generator: random.Random) -> torch.Tensor:
    """A copy with one bit of one byte flipped, such that its value changes."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).clone()
    raw[generator.randrange(raw.numel())] ^= 1 << generator.randrange(1, 6)
    return raw.view(tensor.dtype).view(tensor.shape)


def _content_cases(material: Path) -> Iterator[Case]:
    generator = random.Random(1)
    for export in ("fp8", "ct", "bf16"):
        tensors = load_file(material / export / WEIGHTS)
        for against in (False, True):
            way = "against" if against else "alone"
            scales = [name for name in sorted(tensors) if name.endswith("scale")]
            for number, name in enumerate(scales):
                factor = (4.0, 0.25, 100.0, -1.0, 0.0)[number % 5]

                def scaled(t: Tensors, name: str = name, factor: float = factor) -> None:
                    t[name] = (t[name].float() * factor).to(t[name].dtype)

                yield Case(
                    name=f"export/{export}-{way}-{name}-x{factor}",
                    prepare=_verified(material, export, _tensors(scaled), against=against),
                )
            for name in generator.sample(sorted(tensors), 12):
                flipped = flip(tensors[name], generator)
                yield Case(
                    name=f"export/{export}-{way}-{name}-flipped",
                    prepare=_verified(material, export, _tensors(setting(name, flipped)), against=against),
                )
            for name in generator.sample(sorted(tensors), 3):
                yield Case(
                    name=f"export/{export}-{way}-{name}-gone",
                    prepare=_verified(material, export, _tensors(setting(name, GONE)), against=against),
                )
            yield Case(
                name=f"export/{export}-{way}-whole",
                prepare=_verified(material, export, lambda folder: None, against=against),
                expected=DONE,
            )


def _config_cases(material: Path) -> Iterator[Case]:
    for export in ("fp8", "ct"):
        changes: dict[str, Callable[[Any], object]] = {
            "method": lambda c: c["quantization_config"].update(quant_method="magic"),
            "method-number": lambda c: c["quantization_config"].update(quant_method=5),
            "config-list": lambda c: c.update(quantization_config=[1]),
            "config-text": lambda c: c.update(quantization_config="fp8"),
            "config-empty": lambda c: c.update(quantization_config={}),
            "ignore-number": lambda c: c["quantization_config"].update(ignore=7),
            "ignore-nul": lambda c: c["quantization_config"].update(ignore=["a\0b"]),
            "ignore-broken-pattern": lambda c: c["quantization_config"].update(ignore=["re:["]),
            "ignore-everything": lambda c: c["quantization_config"].update(ignore=["re:.*", "*"]),
            "ignore-nothing": lambda c: c["quantization_config"].update(ignore=[]),
            "groups-list": lambda c: c["quantization_config"].update(config_groups=[1]),
            "groups-gone": lambda c: c["quantization_config"].pop("config_groups"),
        }
        for name, change in changes.items():
            expected = EITHER if name.startswith("groups") and export == "fp8" else REFUSED
            yield Case(
                name=f"export/{export}-{name}",
                prepare=_verified(material, export, _json("config.json", change), against=False),
                expected=expected,
            )
        for file in ("config.json", "hf_quant_config.json", "minipuzzle.json"):
            if not (material / export / file).is_file():
                continue
            for name, content in broken_json((material / export / file).read_bytes()).items():
                yield Case(
                    name=f"export/{export}-{file}-{name}",
                    prepare=_verified(material, export, holding(content, file), against=False),
                )


def cases(material: Path) -> Iterator[Case]:
    """All cases of this file."""
    yield from _content_cases(material)
    yield from _config_cases(material)
