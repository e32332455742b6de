"""What an export may be asked for, by name: formats, and recipes that say which layers get them; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minipuzzle.architecture.families import FAMILIES
from minipuzzle.architecture.memory import TERMS, Deployment
from minipuzzle.errors import warn
from minipuzzle.option import option
from minipuzzle.table import Table

if TYPE_CHECKING:
    from minipuzzle.architecture.model import Architecture
    from minipuzzle.formats.schemes import Scheme

PLAIN = "bf16"
# How NVFP4 scales blocks of weights: by their largest value, or so that the squared error is least.
MAX, CLOSEST = BLOCK_SCALES = ("max", "mse")


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """How weights are encoded and written, of what all exports are asked for."""

    block_scales: str = option(
        MAX,
        "NVFP4: a block's largest value becomes 6 (max), or 6 or 4, whichever leaves the smaller squared error (mse).",
        choices=BLOCK_SCALES,
        section="Format",
    )
    workers: int = option(1, "Threads that encode and write.", at_least=1, section="Computing")


# How weights become codes and scales, and back.
SCHEMES: Table[Scheme] = Table(
    "scheme",
    "schemes",
    lazy={
        "fp8": "minipuzzle.formats.schemes:FP8",
        "fp8-dynamic": "minipuzzle.formats.schemes:FP8_DYNAMIC",
        "nvfp4": "minipuzzle.formats.schemes:NVFP4",
    },
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a user asks for. ``schemes``: by the rounding of activations, static or dynamic; none where none is rounded.

    A format is priced by the memory precision of its name, and what has one scheme only uses it whatever is asked.
    """

    title: str
    help: str
    schemes: Mapping[str, str] = field(default_factory=dict)


FORMATS = Table(
    "format",
    "formats",
    entries={
        PLAIN: Format(title="BF16", help="BF16 weights, for every engine."),
        "fp8": Format(
            title="FP8 E4M3",
            help="FP8 weights and activations of linear layers.",
            schemes={"static": "fp8", "dynamic": "fp8-dynamic"},
        ),
        "nvfp4": Format(
            title="NVFP4",
            help="4-bit weights and activations of linear layers, for NVIDIA Blackwell.",
            schemes={"static": "nvfp4"},
        ),
    },
)


def format_of(scheme: str) -> str:
    """The name of the format that a scheme belongs to."""
    return next(name for name, form in FORMATS.items() if scheme in (name, *form.schemes.values()))


def warn_of_terms_not_exported(architecture: Architecture, deployment: Deployment) -> None:
    """Say what a deployment counts in a precision that no export of a model writes."""
    caches = ("bf16",) if FAMILIES[architecture.model_type].modules.rotary else ("bf16", "fp8")
    written = {
        "weights": FORMATS.names(),
        "embeddings": (PLAIN,),
        "head": (PLAIN, deployment.weights),
        "other": (PLAIN,),
        "kv_cache": caches,
    }
    counted = {term: getattr(deployment, term) for term in written}
    if found := [f"{TERMS[term]} in {name}" for term, name in counted.items() if name not in written[term]]:
        warn(f"memory is counted with {', '.join(found)}, which `minipuzzle export` does not write for this model")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which layers are quantised: all linear ones inside the model's layers but those of the kinds in ``skips``, and
    those in ``adds``."""

    description: str
    skips: frozenset[str] = frozenset()
    adds: frozenset[str] = frozenset()

    def takes(self, part: str, *, is_linear: bool) -> bool:
        """Whether a matrix of a part of the model is quantised."""
        return part in self.adds or (is_linear and part not in self.skips)


RECIPES = Table(
    "recipe",
    "recipes",
    entries={
        "default": Recipe(description="all linear layers inside the model's layers; the LM head stays BF16"),
        "mamba-safe": Recipe(
            description="linear layers of Mamba and MLP; attention and the LM head stay BF16",
            skips=frozenset({"attention"}),
        ),
        "all": Recipe(description="all linear layers and the LM head", adds=frozenset({"head"})),
    },
)
