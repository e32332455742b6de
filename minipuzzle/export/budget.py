"""Whether an export keeps to the budget that its model was cut for, and what that budget asks an export for."""

from __future__ import annotations

from dataclasses import replace

from minipuzzle.architecture.memory import TERMS, WEIGHT_TERMS, Deployment, memory_breakdown
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.budget import ServingBudget
from minipuzzle.errors import MinipuzzleError, warn
from minipuzzle.export.write import export_headers
from minipuzzle.formats.choices import FORMATS, PLAIN
from minipuzzle.formats.flavours import FLAVOURS
from minipuzzle.formats.layout import ExportLayout, cache_scales_obstacle

FP8_CACHE = "fp8"


def exported_bytes(architecture: Architecture, layout: ExportLayout, deployment: Deployment) -> int:
    """What an export takes when it is served: its files' tensors, and caches and states at a deployment.

    The KV cache has the precision that the folder asks engines for; where it can ask for none, that of the deployment.
    """
    could_ask = layout.flavour is not None and cache_scales_obstacle(architecture, layout.flavour) is None
    kv_cache = FP8_CACHE if layout.fp8_kv_cache else "bf16" if could_ask else deployment.kv_cache
    outside_files = {label for term, label in TERMS.items() if term not in WEIGHT_TERMS}
    breakdown = memory_breakdown(architecture.deployed, replace(deployment, kv_cache=kv_cache))
    weight_bytes = sum(header.num_bytes for header in export_headers(architecture, layout).values())
    return weight_bytes + sum(term.num_bytes for term in breakdown.terms if term.name in outside_files)


def format_of_budget(made_for: ServingBudget | None) -> str:
    """The format that a model was cut for.

    Raises: MinipuzzleError if nothing says which, or exports have no such format.
    """
    if made_for is not None and made_for.deployment.weights in FORMATS:
        return made_for.deployment.weights
    problem = "nothing says in which format" if made_for is None else f"{made_for.deployment.weights} is no format"
    raise MinipuzzleError(problem, f"say which: {', '.join(FORMATS)}")


def recipe_of_budget(made_for: ServingBudget | None, format_name: str) -> str:
    """The recipe that a model was cut for: with the LM head, if that was counted in the export's format."""
    counts_head = made_for is not None and made_for.deployment.head == format_name != PLAIN
    return "all" if counts_head else "default"


def asks_for_fp8_cache(made_for: ServingBudget | None, architecture: Architecture, flavour: str) -> bool:
    """Whether a model was cut for an FP8 cache, and a flavour has scales for it; says so where it has none."""
    if made_for is None or made_for.deployment.kv_cache != FP8_CACHE:
        return False
    if (obstacle := cache_scales_obstacle(architecture, FLAVOURS[flavour])) is None:
        return True
    warn(f"the model was cut for an FP8 KV cache, which this folder will not ask engines for: {obstacle[0]}")
    return False


def require_budget(architecture: Architecture, layout: ExportLayout, made_for: ServingBudget | None) -> None:
    """Refuse an export that takes more than its model was cut for.

    Raises: InfeasibleBudgetError with both numbers.
    """
    if made_for is not None:
        needed_bytes = exported_bytes(architecture, layout, made_for.deployment)
        made_for.require(needed_bytes, f"this {layout.format} export", "export without a format, as it was cut for")
