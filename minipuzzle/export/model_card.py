"""The README.md of an exported folder: front matter that model hubs read, and the facts a user needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minipuzzle import __version__
from minipuzzle.architecture import Architecture
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.layer_kinds import PRUNABLE_AXES
from minipuzzle.plan import Plan, read_plan
from minipuzzle.pruning import PLAN_FILE
from minipuzzle.units import format_count, format_gib

README = "README.md"
_INHERITED_FIELDS = ("license", "license_name", "license_link", "language")
_QUALITY_COLUMNS = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "next_token_accuracy": "next-token accuracy",
    "kl": "KL from teacher (nats/token)",
    "top1_agreement": "agreement with teacher",
    "num_tokens": "tokens",
}


@dataclass(frozen=True, kw_only=True)
class PrecisionFacts:
    """What a quantised export stores how, and what that was measured to cost on a slice of the calibration text."""

    recipe: str
    ignored_modules: Sequence[str]
    fp8_kv_cache: bool
    calibration: str
    kl_from_source: float
    agreement_with_source: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card says beyond what the folder itself tells.

    ``relation``: a hub's word for how this model came from its base, ``finetune`` or ``quantized``; said only if
    ``base_model`` is known. ``quality``: data name -> metric -> value. ``command``: the exact command line.
    """

    relation: str
    base_model: str | None = None
    precision: PrecisionFacts | None = None
    quality: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    command: str | None = None


def write_model_card(folder: Path, source: Checkpoint, facts: CardFacts) -> None:
    """Write README.md into an export of ``source``."""
    (folder / README).write_text(render_model_card(source, facts), encoding="utf-8")


def render_model_card(source: Checkpoint, facts: CardFacts) -> str:
    """The text of README.md."""
    sections = [
        _front_matter(source, facts),
        f"# {source.folder.resolve().name}{'-FP8' if facts.precision else ''}",
        _summary(source, facts),
        "## Architecture\n\n" + _table(("", ""), architecture_rows(source.architecture)),
    ]
    if (source.folder / PLAN_FILE).is_file():
        sections.append("## What was cut\n\n" + _table(("", ""), plan_rows(read_plan(source.folder / PLAN_FILE))))
    if facts.precision:
        sections.append("## Precision\n\n" + _precision(facts.precision))
    if facts.quality:
        sections.append("## Measured quality\n\n" + _quality(facts.quality))
    sections.append("## Use\n\n" + _use(facts))
    sections.append(f"## How it was made\n\nWith minipuzzle {__version__}" + _command(facts.command))
    return "\n\n".join(sections) + "\n"


def architecture_rows(architecture: Architecture) -> list[tuple[str, str]]:
    """What the layers are, for people: (name, value) pairs."""
    counts = ", ".join(f"{count} {kind}" for kind, count in architecture.layer_counts.items())
    rows = [
        ("parameters", format_count(architecture.num_parameters)),
        ("layers", f"{len(architecture.layers)} ({counts})"),
        ("layer pattern", f"`{architecture.pattern}`"),
        ("vocabulary", f"{architecture.vocabulary:,}"),
    ]
    widths = ((axis, architecture.width(axis)) for axis in PRUNABLE_AXES)
    return rows + [(axis.replace("_", " "), f"{width:,}") for axis, width in widths if width is not None]


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """What a plan kept of the original model, for people: (name, value) pairs."""
    rows = [("layers kept, by their index in the original", index_ranges(plan.kept_layers))]
    for axis, by_layer in plan.kept_units.items():
        counts = sorted({len(units) for units in by_layer.values()})
        rows.append((f"{axis.replace('_', ' ')} kept", " or ".join(f"{count:,}" for count in counts)))
    return rows


def index_ranges(indices: Sequence[int]) -> str:
    """Ascending indices in short: ``0-3, 5, 7-8``."""
    parts: list[str] = []
    start = previous = indices[0]
    for index in (*indices[1:], None):
        if index is not None and index == previous + 1:
            previous = index
            continue
        parts.append(f"{start}-{previous}" if previous > start else f"{start}")
        if index is not None:
            start = previous = index
    return ", ".join(parts)


def _front_matter(source: Checkpoint, facts: CardFacts) -> str:
    inherited = read_front_matter(source.folder / README)
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields |= {name: inherited[name] for name in _INHERITED_FIELDS if name in inherited}
    base_model = facts.base_model
    if base_model is None and facts.relation == "finetune":
        base_model = inherited.get("base_model")  # a BF16 copy keeps its source's base; a quantised one has another
    if base_model:
        fields |= {"base_model": base_model, "base_model_relation": facts.relation}
    tags = [source.architecture.model_type, "minipuzzle", *(("fp8", "modelopt") if facts.precision else ())]
    # A JSON string is a YAML string, whatever it holds.
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def read_front_matter(path: Path) -> dict[str, str]:
    """The one-line ``name: value`` fields at the top of a README; empty if there is none."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    fields: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            return fields
        name, colon, value = line.partition(":")
        if colon and value.strip() and not name.startswith((" ", "-", "#")):
            fields[name.strip()] = value.strip().strip("\"'")
    return {}


def _summary(source: Checkpoint, facts: CardFacts) -> str:
    stored = "FP8 (E4M3) weights and activations" if facts.precision else "BF16 weights"
    size = format_gib(2 * source.architecture.num_parameters)
    return f"A {source.architecture.model_type} language model with {stored}. In BF16 its weights take {size}."


def _precision(facts: PrecisionFacts) -> str:
    cache = "FP8, with stored scales" if facts.fp8_kv_cache else "not quantised"
    rows = [
        ("linear layers", "FP8 E4M3, one static scale a tensor for weights and for inputs"),
        ("everything else", "BF16"),
        ("KV cache", cache),
        ("recipe", facts.recipe),
        ("calibration", facts.calibration),
        ("KL from the unquantised model", f"{facts.kl_from_source:.3g} nats/token"),
        ("agreement on the most likely token", f"{facts.agreement_with_source:.2%}"),
    ]
    ignored = "\n".join(f"- `{name}`" for name in facts.ignored_modules)
    note = f"The last two: on {facts.num_tokens:,} tokens of the calibration text, rounding as engines do."
    return f"{_table(('', ''), rows)}\n\n{note}\n\nModules left in BF16:\n\n{ignored}"


def _quality(quality: Mapping[str, Mapping[str, float | None]]) -> str:
    shown = [column for column in _QUALITY_COLUMNS if any(row.get(column) is not None for row in quality.values())]
    rows = [(name, *(_number(row.get(column)) for column in shown)) for name, row in quality.items()]
    return _table(("data", *(_QUALITY_COLUMNS[column] for column in shown)), rows)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _use(facts: CardFacts) -> str:
    serve = "```\nvllm serve PATH_OF_THIS_FOLDER\n```"
    if facts.precision is None:
        return f"It loads in transformers, vLLM, SGLang and other engines as it is:\n\n{serve}"
    return (
        "The layout is that of NVIDIA ModelOpt, which vLLM, SGLang and TensorRT-LLM read:\n\n"
        f"{serve}\n\n"
        "transformers has no reader for this layout: it ignores the scales and computes nonsense without an error. "
        "`minipuzzle evaluate` reads it."
    )


def _command(command: str | None) -> str:
    return f":\n\n```\n{command}\n```" if command else "."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
