"""Named deployments: machines and how a model is served on them, in a small table that a TOML file extends.

A table of the file is one deployment; what it leaves out has the default of ``Deployment``::

    [our-server]
    memory = "40GiB"     # what weights, caches and states may need together; optional
    context = "128k"
    batch = 4
    weights = "fp8"      # and embeddings, head, other, kv_cache, ssm_state, conv_state
    source = "nvidia-smi on the server, less 10 %"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipuzzle.architecture.memory import PRECISION_FIELDS, Deployment
from minipuzzle.architecture.quantities import parse_bytes, parse_count
from minipuzzle.errors import MinipuzzleError
from minipuzzle.table import Table
from minipuzzle.toml_files import read_toml

SERVING_FIELDS = ("context", "batch", *PRECISION_FIELDS)


@dataclass(frozen=True, kw_only=True)
class NamedDeployment:
    """A deployment with the memory its machine has for it (None: the user says) and where the figures come from."""

    name: str
    deployment: Deployment
    memory: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_bytes(self.memory)


# GPU memory as NVML reports it (thundergolfer.com/blog/nvidia-gpu-memory-capacity); vLLM uses 90 % of it by default.
_NVML = "NVML reports {mib:,} MiB, of which vLLM uses 90 % by default"


def _gpu(name: str, mib: int, **serving: Any) -> NamedDeployment:
    return NamedDeployment(
        name=name,
        deployment=Deployment(**serving),
        memory=f"{mib * 9 // 10}MiB",
        source=_NVML.format(mib=mib),
    )


_TABLE = (
    NamedDeployment(
        name="rtx5090-fp4-1M",
        deployment=Deployment(context_tokens=1_000_000, weights="nvfp4", kv_cache="fp8"),
        memory="31.7GiB",
        source="budget of Nemotron-H 47B: FP4 inference on 1 million tokens (arXiv 2504.03624, section 3); the report "
        "gives no precision for single terms, so they are as `export --nvfp4 --kv-cache fp8` writes them",
    ),
    NamedDeployment(
        name="a10g-bf16-128k",
        deployment=Deployment(context_tokens=128 * 1024),
        memory="19.66GiB",
        source="budget of Nemotron Nano 2: 22.06 GiB less 5 % and 1.3 GiB for an encoder (arXiv 2508.14444)",
    ),
    _gpu("l4-fp8-32k", 23_034, context_tokens=32 * 1024, weights="fp8", kv_cache="fp8"),
    _gpu("l40s-fp8-128k", 46_068, context_tokens=128 * 1024, weights="fp8", kv_cache="fp8"),
    _gpu("h100-bf16-128k", 81_559, context_tokens=128 * 1024),
    _gpu("h100-fp8-1M", 81_559, context_tokens=1_000_000, weights="fp8", kv_cache="fp8"),
    _gpu("h200-fp8-128k-batch32", 143_771, context_tokens=128 * 1024, batch=32, weights="fp8", kv_cache="fp8"),
)
DEPLOYMENTS = Table("deployment", "deployments", entries={named.name: named for named in _TABLE})


def read_deployments(path: Path) -> dict[str, NamedDeployment]:
    """The deployments of a TOML file.

    Raises: MinipuzzleError naming what the file says wrong.
    """
    found = {}
    for name, table in read_toml(path, "‹deployments›").items():
        if not isinstance(table, dict):
            raise MinipuzzleError(f"{path}: {name!r} is not a table", f"write [{name}] and its fields below")
        try:
            found[name] = _named_deployment(name, table)
        except MinipuzzleError as error:
            raise MinipuzzleError(f"{path}, [{name}]: {error.problem}", error.hint) from None
    return found


def _named_deployment(name: str, table: Mapping[str, Any]) -> NamedDeployment:
    known = {*SERVING_FIELDS, "memory", "source"}
    if unknown := set(table) - known:
        raise MinipuzzleError(f"unknown field {sorted(unknown)[0]!r}", f"fields are {', '.join(sorted(known))}")
    serving = {field: table[field] for field in PRECISION_FIELDS if field in table}
    if "context" in table:
        serving["context_tokens"] = parse_count(str(table["context"]))
    if "batch" in table:
        serving["batch"] = parse_count(str(table["batch"]))
    memory = str(table["memory"]) if "memory" in table else None
    return NamedDeployment(
        name=name, deployment=Deployment(**serving), memory=memory, source=str(table.get("source", ""))
    )


def find_deployment(name: str, file: Path | None = None) -> NamedDeployment:
    """A deployment by name, from a user's file or the table; the file wins.

    Raises: MinipuzzleError for an unknown name or a file with errors.
    """
    of_user = read_deployments(file) if file is not None else {}
    table = Table(DEPLOYMENTS.sort, DEPLOYMENTS.plural, entries={**DEPLOYMENTS, **of_user})
    if name not in table:
        error = table.unknown(name)
        raise MinipuzzleError(error.problem, f"{error.hint}; add yours with ‹deployments› FILE.toml")
    return table[name]
