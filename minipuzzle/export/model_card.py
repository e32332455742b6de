"""The README.md of an exported folder: front matter that model hubs read, and the facts a user needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minipuzzle.architecture.configs.per_layer import PER_LAYER_MODEL_TYPE
from minipuzzle.architecture.configs.puzzle import ARCHITECTURE, CONFIG_MODULE
from minipuzzle.architecture.kinds import prunable_axes
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.architecture.model import Architecture
from minipuzzle.architecture.quantities import format_count, format_gib
from minipuzzle.cut.plan import PLAN_FILE, Plan, read_plan
from minipuzzle.export.verify import Verification
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.formats.choices import FORMATS, PLAIN
from minipuzzle.formats.layout import ExportLayout
from minipuzzle.quality.record import LABELS
from minipuzzle.version import __version__

README = "README.md"
LICENSE_FILES = ("LICENSE", "LICENSE.txt")
_INHERITED_FIELDS = ("license", "license_name", "license_link", "language")
_QUALITY_COLUMNS = ("bits_per_byte", "perplexity", "next_token_accuracy", "kl", "top1_agreement", "num_tokens")


@dataclass(frozen=True, kw_only=True)
class PrecisionFacts:
    """What a quantised export stores how, what its scales were measured on; whether its recipe takes the head."""

    layout: ExportLayout
    recipe: str
    wants_head: bool
    calibration: str


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card says beyond what the folder itself tells.

    ``relation``: a hub's word for how this model came from its base, ``finetune`` or ``quantized``; said only if the
    base is known. ``quality``: data name -> metric -> value. ``verified_on``: what text. ``command``: the exact command
    line. ``is_puzzle``: config.json has ``block_configs``.
    """

    relation: str
    is_puzzle: bool = False
    base_model: str | None = None
    precision: PrecisionFacts | None = None
    verification: Verification | None = None
    verified_on: str = "the calibration text"
    quality: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    command: str | None = None


def write_model_card(folder: Path, source: Checkpoint, facts: CardFacts) -> list[str]:
    """Write README.md into an export of ``source``; returns warnings about what it could not say."""
    text, warnings = render_model_card(source, facts)
    (folder / README).write_text(text, encoding="utf-8")
    return warnings


def render_model_card(source: Checkpoint, facts: CardFacts) -> tuple[str, list[str]]:
    """The text of README.md, and warnings about what it could not say."""
    metadata, warnings = _front_matter(source, facts)
    sections = [
        metadata,
        f"# {source.folder.resolve().name}" + (f"-{facts.precision.layout.format.upper()}" if facts.precision else ""),
        _summary(source, facts),
    ]
    sections += [f"> **{warning[0].upper()}{warning[1:]}.**" for warning in warnings]
    sections.append("## Architecture\n\n" + _table(("", ""), architecture_rows(source.architecture)))
    if (source.folder / PLAN_FILE).is_file():
        sections.append("## What was cut\n\n" + _table(("", ""), plan_rows(read_plan(source.folder / PLAN_FILE))))
    if facts.precision:
        sections.append("## Precision\n\n" + _precision(facts.precision))
    if facts.verification:
        sections.append("## Quality before and after this export\n\n" + _verification(facts))
    if facts.quality:
        sections.append("## Measured quality\n\n" + _quality(facts.quality))
    sections.append("## Memory when served\n\n" + _memory(source, facts))
    sections.append("## Use\n\n" + (_use(source, facts) if loads_everywhere(source) else _use_of_unequal_layers(facts)))
    sections.append(f"## How it was made\n\nWith minipuzzle {__version__}" + _command(facts.command))
    return "\n\n".join(sections) + "\n", warnings


def architecture_rows(architecture: Architecture) -> list[tuple[str, str]]:
    """What the layers are, for people: (name, value) pairs."""
    counts = ", ".join(f"{count} {kind}" for kind, count in architecture.layer_counts.items())
    rows = [
        ("parameters", format_count(architecture.num_parameters)),
        ("layers", f"{len(architecture.layers)} ({counts})"),
        ("layer pattern", f"`{architecture.pattern}`"),
        ("vocabulary", f"{architecture.vocabulary:,}"),
    ]
    widths = ((axis, architecture.width(axis)) for axis in prunable_axes())
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


def _front_matter(source: Checkpoint, facts: CardFacts) -> tuple[str, list[str]]:
    inherited = read_front_matter(source.folder / README)
    warnings = []
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields |= {name: inherited[name] for name in _INHERITED_FIELDS if name in inherited}
    if "license" not in fields:
        found = next((name for name in LICENSE_FILES if (source.folder / name).is_file()), None)
        if found is None:
            warnings.append("the source states no licence: find out under which terms it may be used and passed on")
        else:
            fields |= {"license": "other", "license_name": "see-license-file", "license_link": found}
    base_model = facts.base_model
    if base_model is None and facts.relation == "finetune":
        base_model = inherited.get("base_model")  # a BF16 copy keeps its source's base; a quantised one has another
    if base_model:
        fields |= {"base_model": base_model, "base_model_relation": facts.relation}
    else:
        warnings.append("the base model's name is not known: give it with --base-model")
    if not loads_everywhere(source) and not facts.is_puzzle:
        warnings.append("its layers differ in width: only minipuzzle reads this folder (for nemotron_h see --puzzle)")
    if facts.precision and facts.precision.wants_head and source.architecture.deployed.tied_embeddings:
        warnings.append("the LM head is tied to the embeddings and stays BF16 as they do, although all was asked for")
    layout = facts.precision.layout if facts.precision else None
    tags = [source.architecture.model_type, "minipuzzle"]
    if layout is not None and layout.flavour is not None:
        tags += [layout.format, layout.flavour.name]
    # A JSON string is a YAML string, whatever it holds.
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"]), warnings


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
    stored = FORMATS[facts.precision.layout.format if facts.precision else PLAIN].title
    size = format_gib(2 * source.architecture.num_parameters)
    return f"A {source.architecture.model_type} language model with {stored} weights. In BF16 its weights take {size}."


def _precision(facts: PrecisionFacts) -> str:
    layout = facts.layout
    assert layout.scheme is not None and layout.flavour is not None
    rows = [
        ("linear layers", layout.scheme.weights),
        ("their inputs", layout.scheme.inputs),
        ("everything else", "BF16"),
        ("KV cache", "FP8, with stored scales" if layout.fp8_kv_cache else "not quantised"),
        ("layout", layout.flavour.name),
        ("recipe", facts.recipe),
        ("calibration", facts.calibration),
    ]
    ignored = "\n".join(f"- `{name}`" for name in layout.ignored)
    return f"{_table(('', ''), rows)}\n\nModules left in BF16:\n\n{ignored}"


def _verification(facts: CardFacts) -> str:
    assert facts.verification is not None and facts.verification.before is not None
    before, after = facts.verification.before, facts.verification.after
    rows = [
        (LABELS["loss"][0], f"{before.loss:.4f}", f"{after.loss:.4f}"),
        ("KL from before (nats/token)", "", f"{after.kl:.3g}"),
        ("agreement with before on the most likely token", "", f"{after.agreement:.2%}"),
    ]
    note = f"Before: {facts.verified_on}, {after.num_tokens:,} tokens, float32, with this export's source. After: this "
    return _table(("", "before", "after"), rows) + f"\n\n{note}folder, read back, rounding activations as engines do."


def _memory(source: Checkpoint, facts: CardFacts) -> str:
    layout = facts.precision.layout if facts.precision else None
    weights = PLAIN if layout is None else layout.format
    cache = "fp8" if layout is not None and layout.fp8_kv_cache else "bf16"
    longest = int(source.config.get("max_position_embeddings") or 0)
    rows = []
    for context in sorted({8192, longest} if longest else {8192}):
        deployment = Deployment(context_tokens=context, weights=weights, kv_cache=cache)
        breakdown = memory_breakdown(source.architecture, deployment)
        rows.append((f"{context:,} tokens, one sequence", format_gib(breakdown.total_bytes), breakdown.describe()))
    note = "Weights, caches and states; without activations and engine buffers."
    return _table(("context", "memory", "of which"), rows) + f"\n\n{note}"


def _quality(quality: Mapping[str, Mapping[str, float | None]]) -> str:
    shown = [column for column in _QUALITY_COLUMNS if any(row.get(column) is not None for row in quality.values())]
    rows = [(name, *(_number(row.get(column)) for column in shown)) for name, row in quality.items()]
    return _table(("data", *(LABELS[column][0] for column in shown)), rows)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _use(source: Checkpoint, facts: CardFacts) -> str:
    serve = "```\nvllm serve PATH_OF_THIS_FOLDER\n```"
    ours = (
        "`minipuzzle.load(PATH)` gives a transformers model that rounds as engines do; `minipuzzle verify` checks it."
    )
    if facts.precision is None:
        return f"It loads in transformers, vLLM, SGLang and other engines as it is:\n\n{serve}"
    flavour = facts.precision.layout.flavour
    assert flavour is not None
    text = f"The layout is {flavour.name}'s, read by {flavour.engines}:\n\n{serve}\n\n{ours}"
    # transformers 5.23 reads the experts of compressed-tensors, but not NVFP4's scale of whole tensors beside them.
    has_lost_scales = facts.precision.layout.format == "nvfp4" and "moe" in source.architecture.layer_counts
    if not flavour.loads_in_transformers or has_lost_scales:
        text += (
            " Plain transformers has no reader for this layout: it ignores the scales and computes nonsense without an "
            "error."
        )
    return text


def loads_everywhere(source: Checkpoint) -> bool:
    """Whether engines read the model by their own classes, which know one width an axis."""
    return bool(source.config["model_type"] != PER_LAYER_MODEL_TYPE)


def _use_of_unequal_layers(facts: CardFacts) -> str:
    ours = "`minipuzzle.load(PATH)` gives a transformers model; `minipuzzle verify` checks the folder."
    if not facts.is_puzzle:
        return f"Its layers differ in width, which no engine's config.json can say. {ours}"
    return (
        f"Its layers differ in width: config.json says so in `block_configs`, for `{ARCHITECTURE}`. vLLM (0.32 was "
        f"run; 0.17 and later by its source) reads it by the class in `{CONFIG_MODULE}.py`, which it must be told to "
        "trust:\n\n"
        "```\nvllm serve PATH_OF_THIS_FOLDER --trust-remote-code\n```\n\n"
        f"No other engine was tried; plain transformers has no such model. {ours}"
    )


def _command(command: str | None) -> str:
    return f":\n\n```\n{command}\n```" if command else "."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
