"""Write the support matrix in docs/families.md from the registry; with --check, fail if it is out of date."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from minipuzzle.architecture.families import FAMILIES, Family
from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.model import Architecture
from minipuzzle.errors import MinipuzzleError
from minipuzzle.formats.choices import PLAIN, SCHEMES
from minipuzzle.formats.layout import export_layout

PAGE = Path(__file__).parent / "families.md"
BEGIN, END = "<!-- written by docs/write_families.py -->\n", "<!-- end -->\n"


def render() -> str:
    """The tables: what each family is made of and where it can go, and what each kind of layer can lose."""
    families = [FAMILIES[model_type] for model_type in sorted(FAMILIES)]
    by_family = _table(
        ("family", "kinds in a block", "cut", "layouts", "biases, norms and options of the tests", "exports"),
        [
            (
                f"`{family.model_type}`",
                _blocks(family),
                ", ".join(f"`{axis}`" for axis in _axes(family)),
                "uniform (by block), per-layer"
                if _architectures(family)[0].names.layers_per_block > 1
                else "uniform, per-layer",
                ", ".join(sorted({option for a in _architectures(family) for la in a.layers for option in la.options})),
                ", ".join(_exports(family)),
            )
            for family in families
        ],
    )
    by_kind = _table(
        ("kind", "symbol", "cut", "as many in each", "kept while generating"),
        [
            (
                kind.name,
                f"`{kind.symbol}`",
                ", ".join(f"`{axis}`" for axis in kind.prunable_axes),
                ", ".join(f"`{axis}` a `{group}`" for axis, group in kind.unit_groups.items()),
                ", ".join(_caches(kind.name)),
            )
            for kind in LAYER_KINDS.values()
        ],
    )
    return f"{by_family}\n\n{by_kind}\n"


def _architectures(family: Family) -> list[Architecture]:
    return [family.read(config) for config in family.tiny_configs.values()]


def _layouts(family: Family) -> str:
    goes_by_block = _architectures(family)[0].names.layers_per_block > 1
    return "uniform (by block), per-layer" if goes_by_block else "uniform, per-layer"


def _blocks(family: Family) -> str:
    found = {
        " + ".join(architecture.layers[idx].kind for idx in block)
        for architecture in _architectures(family)
        for block in architecture.blocks
    }
    return " or ".join(sorted(found))


def _axes(family: Family) -> list[str]:
    layers = [layer for architecture in _architectures(family) for layer in architecture.layers]
    having = {(layer.kind, axis) for layer in layers for axis in layer.sizes}
    axes = ((kind.name, axis) for kind in LAYER_KINDS.values() for axis in kind.prunable_axes)
    return [*(axis for kind, axis in axes if (kind, axis) in having), "hidden"]


def _caches(kind: str) -> list[str]:
    layers = (la for family in FAMILIES.values() for a in _architectures(family) for la in a.layers if la.kind == kind)
    return [cache.name for cache in LAYER_KINDS[kind].caches(next(layers))]


def _exports(family: Family) -> list[str]:
    """Formats that the exporter accepts, with an FP8 cache where it measures scales for one."""
    architecture = _architectures(family)[0]
    found = [PLAIN, *SCHEMES]
    try:
        export_layout(architecture, scheme="fp8", flavour="modelopt", recipe="default", overrides=(), fp8_kv_cache=True)
    except MinipuzzleError:
        return found
    return [*found, "FP8 KV cache"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    page = before + BEGIN + "\n" + render() + "\n" + END + rest.partition(END)[2]
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    elif page != text:
        click.echo("docs/families.md is out of date: run `make docs`", err=True)
        sys.exit(1)
