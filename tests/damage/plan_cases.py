"""Plans, score files and timings: what one command writes and another believes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minipuzzle.files.digests import CHECKSUM
from tests.damage.config_cases import broken_json
from tests.damage.material import copy
from tests.damage.runner import DONE, EITHER, REFUSED, Case
from tests.damage.ways import GONE, Record, flipped, holding, setting

SCORES = "scores.safetensors"
NO_FINGERPRINT = [("model_fingerprint", "text"), ("model_fingerprint", "null")]  # of other weights, and of none known
SEARCH = ["search", "nemotron_h/config.json", "--keep", "mlp=2", "--granularity", "16", "--json", "-o", "out.json"]


def _planned(material: Path, damage: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        copy(material, folder, "nemotron_h", "plan.json")
        damage(folder / "plan.json")
        return ["prune", "nemotron_h", "--plan", "plan.json", "-o", "out", "--json"]

    return prepare


def _changed(change: Callable[[Record], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        record = json.loads(path.read_text(encoding="utf-8"))
        del record[CHECKSUM]  # as someone would who changes it by hand
        change(record)
        path.write_text(json.dumps(record), encoding="utf-8")

    return damage


def _plan_cases(material: Path) -> Iterator[Case]:
    whole = json.loads((material / "plan.json").read_text(encoding="utf-8"))
    layers: dict[str, Any] = {
        "empty": [],
        "negative": [-1, 0, 1],
        "beyond": [0, 1, 99],
        "twice": [0, 0, 1],
        "descending": [2, 1, 0],
        "fraction": [0, 1.5],
        "text": ["0", "1"],
        "booleans": [True, False],
        "null": None,
        "number": 3,
        "nested": [[0], [1]],
        "huge": [10**30],
    }
    for name, value in layers.items():
        yield Case(name=f"plan/layers-{name}", prepare=_planned(material, _changed(setting("kept_layers", value))))
    units: dict[str, Any] = {
        "unknown-axis": {"colour": {"1": [0]}},
        "unknown-layer": {"ffn": {"99": [0]}},
        "layer-text": {"ffn": {"first": [0]}},
        "layer-negative": {"ffn": {"-1": [0]}},
        "beyond": {"ffn": {"1": [0, 9999]}},
        "negative": {"ffn": {"1": [-1]}},
        "empty": {"ffn": {"1": []}},
        "twice": {"ffn": {"1": [3, 3]}},
        "descending": {"ffn": {"1": [5, 4]}},
        "fraction": {"ffn": {"1": [0.5]}},
        "not-a-list": {"ffn": {"1": 7}},
        "not-an-object": {"ffn": [1, 2]},
        "axis-of-other-kind": {"ffn": {"0": [0, 1]}},
        "hidden-beyond": {"hidden": {"model": [0, 10**6]}},
        "hidden-of-layer": {"hidden": {"1": [0, 1]}},
        "unequal-groups": {"ssm_head": {"0": [0, 1, 2]}},
        "null": None,
        "list": [],
    }
    for name, value in units.items():
        yield Case(name=f"plan/units-{name}", prepare=_planned(material, _changed(setting("kept_units", value))))
    norm = "backbone.layers.0.norm.weight"
    scales: dict[str, Any] = {
        "zero": {norm: [0.0]},
        "negative": {norm: [-1.0]},
        "huge": {norm: [1e30]},
        "text": {norm: ["a"]},
        "nan": {norm: [float("nan")]},
        "infinite": {norm: [float("inf")]},
        "too-many": {norm: [1.0] * 7},
        "none": {norm: []},
        "unknown-tensor": {"nothing.weight": [1.0]},
        "not-a-norm": {"lm_head.weight": [1.0]},
        "number": {norm: 1.0},
        "list": [1.0],
    }
    for name, value in scales.items():
        yield Case(name=f"plan/scales-{name}", prepare=_planned(material, _changed(setting("norm_scales", value))))
    for field in (name for name in whole if name != CHECKSUM):
        expected = EITHER if field in ("notes", "figures", "chosen_units", "model_fingerprint") else REFUSED
        yield Case(
            name=f"plan/{field}-missing",
            prepare=_planned(material, _changed(setting(field, GONE))),
            expected=expected,
        )
        for name, value in {"number": 7, "text": "x", "null": None}.items():
            kind = EITHER if field == "notes" or (field, name) in NO_FINGERPRINT else REFUSED
            yield Case(
                name=f"plan/{field}-{name}",
                prepare=_planned(material, _changed(setting(field, value))),
                expected=kind,
            )
    yield Case(name="plan/unknown-key", prepare=_planned(material, _changed(lambda r: r.update(surprise=1))))
    yield Case(
        name="plan/other-model", prepare=_planned(material, _changed(lambda r: r.update(source_fingerprint="0" * 16)))
    )
    for number, position in enumerate(sorted(random.Random(4).random() for _ in range(24))):
        content = flipped((material / "plan.json").read_bytes(), [position], bit=number % 8)
        # A number may be written in two ways.
        yield Case(name=f"plan/flip-{number}", prepare=_planned(material, holding(content)), expected=EITHER)
    yield Case(name="plan/whole", prepare=_planned(material, lambda path: None), expected=DONE)
    for name, content in broken_json((material / "plan.json").read_bytes()).items():
        yield Case(name=f"plan/json-{name}", prepare=_planned(material, holding(content)))


def _scored(material: Path, damage: Callable[[Path], object], *options: str) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        copy(material, folder, "nemotron_h", SCORES)
        damage(folder / SCORES)
        return [*SEARCH, "--scores", SCORES, *options]

    return prepare


def _with_scores(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata())
        del metadata[CHECKSUM]
        change(tensors, metadata)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)

    return damage


def _with_metadata(change: Callable[[Record], object]) -> Callable[[Path], None]:
    return _with_scores(lambda _tensors, metadata: change(metadata))


def _score_cases(material: Path) -> Iterator[Case]:
    tensors = load_file(material / SCORES)
    with safe_open(material / SCORES, "pt") as file:
        metadata = dict(file.metadata())
    del metadata[CHECKSUM]
    for name, tensor in sorted(tensors.items()):
        if name == "token_ids" or not tensor.is_floating_point():
            continue
        ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "short": lambda t: t[:-1],
            "long": lambda t: torch.cat([t, t[:1]]),
            "square": lambda t: torch.stack([t, t]),
            "nan": lambda t: torch.full_like(t, float("nan")),
            "infinite": lambda t: torch.full_like(t, float("inf")),
            "booleans": lambda t: t > 0,
        }
        if not name.startswith("layer.delta"):
            ways["negative"] = lambda t: -t.abs() - 1
        for what, way in ways.items():

            def change(t: dict[str, torch.Tensor], _m: dict[str, str], name: str = name, way: Any = way) -> None:
                t[name] = way(t[name])

            yield Case(name=f"scores/{name}-{what}", prepare=_scored(material, _with_scores(change)))
    for key in metadata:
        for what, value in {"empty": "", "text": "surprise", "nested": "[" * 5000}.items():
            yield Case(
                name=f"scores/metadata-{key}-{what}",
                prepare=_scored(material, _with_metadata(setting(key, value))),
                expected=EITHER,
            )
        yield Case(
            name=f"scores/metadata-{key}-missing",
            prepare=_scored(material, _with_metadata(setting(key, GONE))),
            expected=EITHER,
        )
    unknown = _with_scores(lambda t, m: t.update({"unit.colour.0": torch.ones(3)}))
    yield Case(name="scores/unknown-axis", prepare=_scored(material, unknown))
    for number, position in enumerate(sorted(random.Random(5).random() for _ in range(24))):
        content = flipped((material / SCORES).read_bytes(), [position], bit=number % 8)
        yield Case(name=f"scores/flip-{number}", prepare=_scored(material, holding(content)))
    yield Case(name="scores/whole", prepare=_scored(material, lambda path: None), expected=DONE)
    for what, text in {
        "plain": '{"layer": {"mse": [1, 2, 3, 4, 5, 6, 7]}}',
        "short": '{"layer": {"mse": [1, 2]}}',
        "text": '{"layer": {"mse": ["a", 2, 3, 4, 5, 6, 7]}}',
        "negative": '{"layer": {"mse": [-1, 2, 3, 4, 5, 6, 7]}}',
        "booleans": '{"layer": {"mse": [true, true, true, true, true, true, true]}}',
        "nan": '{"layer": {"mse": [NaN, 2, 3, 4, 5, 6, 7]}}',
        "no-layer": '{"unit": {}}',
        "list": "[1, 2, 3]",
        "nested": '{"layer": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "unknown-metric": '{"layer": {"beauty": [1, 2, 3, 4, 5, 6, 7]}}',
        "empty": "",
    }.items():

        def as_json(folder: Path, text: str = text) -> list[str]:
            copy(material, folder, "nemotron_h")
            (folder / "scores.json").write_text(text, encoding="utf-8")
            return [*SEARCH, "--scores", "scores.json"]

        yield Case(name=f"scores/json-{what}", prepare=as_json, expected=DONE if what == "plain" else REFUSED)


def _timing_cases(material: Path) -> Iterator[Case]:
    rows = {"outer": "1e-3", "mamba": "1e-5", "attention": "2e-5", "mlp": "1e-5"}
    good = "kind,step_seconds\n" + "".join(f"{kind},{seconds}\n" for kind, seconds in rows.items())
    texts = {
        "whole": good,
        "empty": "",
        "no-header": "mamba,1e-5\n",
        "missing-kind": "kind,step_seconds\nmamba,1e-5\n",
        "twice": good + "mamba,9e-5\n",
        "negative": good.replace("1e-5", "-1"),
        "zero": good.replace("1e-5", "0"),
        "nan": good.replace("1e-5", "nan"),
        "infinite": good.replace("1e-5", "inf"),
        "text": good.replace("1e-5", "fast"),
        "unknown-kind": good + "colour,1e-5\n",
        "width-zero": "kind,ffn,step_seconds\nmlp,0,1e-5\n",
        "unknown-column": good.replace("kind,step_seconds", "kind,step_seconds,beauty").replace("\n", ",1\n"),
        "ragged": good.replace("mamba,1e-5", "mamba"),
        "nul": "\0" * 100,
        "wide": "kind,step_seconds\nmamba," + "1" * 200_000 + "\n",
    }
    for name, text in texts.items():

        def prepare(folder: Path, text: str = text) -> list[str]:
            copy(material, folder, "nemotron_h", SCORES)
            (folder / "timings.csv").write_text(text, encoding="utf-8")
            return [*SEARCH, "--scores", SCORES, "--latency", "100", "--timings", "timings.csv"]

        expected = {"whole": DONE, "zero": EITHER}.get(name, REFUSED)
        yield Case(name=f"timings/{name}", prepare=prepare, expected=expected)


def cases(material: Path) -> Iterator[Case]:
    """All cases of this file."""
    yield from _plan_cases(material)
    yield from _score_cases(material)
    yield from _timing_cases(material)
