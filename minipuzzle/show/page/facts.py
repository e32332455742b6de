"""What outputs keep of themselves for a page, and what a page finds in the folders of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from minipuzzle.architecture.families import read_architecture
from minipuzzle.architecture.memory import Deployment, layer_bytes, memory_breakdown
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan
from minipuzzle.cut.scores import Scores, read_scores
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import read_config
from minipuzzle.files.json_files import read_json
from minipuzzle.files.outputs import PROVENANCE_FILE
from minipuzzle.files.records import history_of

PAGE_FILE = "report.html"
SCORES_FILE = "minipuzzle/scores.safetensors"  # vLLM takes every such file beside config.json for weights
_TABLES = ("candidates.json", "compensation.json", "frontier.json")
_METRICS_FILE = "metrics.jsonl"
MOST_POINTS = 200  # of a curve: more cannot be told apart


def model_facts(
    architecture: Architecture, deployment: Deployment, formats: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """A model layer by layer, with what it takes at a deployment. ``formats``: of weights that are not plain."""
    breakdown = memory_breakdown(architecture, deployment)
    layers = [
        {
            "kind": layer.kind,
            "sizes": architecture.own_sizes(idx),
            "parameters": sum(tensor.num_elements for tensor in architecture.layer_tensors(idx)),
            "memory_bytes": sum(layer_bytes(architecture, idx, deployment).values()),
            "format": (formats or {}).get(idx, "bf16"),
        }
        for idx, layer in enumerate(architecture.layers)
    ]
    return {
        "model_type": architecture.model_type,
        "hidden": architecture.hidden,
        "vocabulary": architecture.vocabulary,
        "num_parameters": architecture.num_parameters,
        "num_active_parameters": architecture.num_active_parameters,
        "memory_bytes": breakdown.total_bytes,
        "memory": {term.name: term.num_bytes for term in breakdown.terms},
        "deployment": asdict(deployment),
        "layers": layers,
    }


def cut_facts(source: Architecture, plan: Plan, deployment: Deployment, scores: Scores | None) -> dict[str, Any]:
    """A model before and after a cut, and by what its layers were chosen. ``budget_bytes``: None without a limit."""
    limit = inf if plan.figures is None else plan.figures.limits.get("memory_bytes", inf)
    by_metric = {} if scores is None else scores.layer
    return {
        "source": model_facts(source, deployment),
        "model": model_facts(plan.apply(source), deployment),
        "kept_layers": list(plan.kept_layers),
        "budget_bytes": limit if limit < inf else None,
        "layer_scores": {
            name: [value if value == value else None for value in values.tolist()] for name, values in by_metric.items()
        },
    }


def deployment_of(folder: Path) -> Deployment:
    """The deployment that a folder was cut for, by its record; the default one where it says nothing."""
    found = (step.get("results") or {} for step in reversed(history_of(folder)))
    model = next((results["model"] for results in found if "model" in results), None)
    return Deployment() if model is None else Deployment(**model["deployment"])


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a run by its record, and what its folder holds beside it, where the folder is there.

    ``tables``: by file name without ending. ``curve``: lines of the training's metrics.
    """

    name: str
    record: Mapping[str, Any]
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curve: Sequence[Mapping[str, Any]] = ()
    scores: Scores | None = None

    @property
    def command(self) -> str:
        """The verb that made it; empty for a model that minipuzzle did not make."""
        return str(self.record.get("command", ""))

    @property
    def results(self) -> Mapping[str, Any]:
        """What came out, by its record."""
        found: Mapping[str, Any] = self.record.get("results") or {}
        return found

    @property
    def model(self) -> Mapping[str, Any] | None:
        """The model that the step left."""
        found: Mapping[str, Any] | None = self.results.get("model")
        return found


def read_run(folders: Sequence[Path]) -> tuple[Step, ...]:
    """All steps that folders are results of, each once, in order: their own and those before them.

    Raises: MinipuzzleError for a folder that holds neither a record nor a model.
    """
    steps: dict[str, Step] = {}
    for folder in folders:
        history = history_of(folder)
        for record in history[:-1]:
            steps.setdefault(_key(record), Step(name=record.get("command", ""), record=record))
        step = _step(folder, history[-1] if history else None)
        steps[_key(step.record) if history else str(folder)] = step
    return tuple(steps.values())


def _key(record: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in record.items() if name != "lineage"}, sort_keys=True)


def _step(folder: Path, record: Mapping[str, Any] | None) -> Step:
    name = folder.resolve().name.removesuffix(".partial")
    if record is None:
        if not (folder / "config.json").is_file():
            raise MinipuzzleError(
                f"{folder} holds neither {PROVENANCE_FILE} nor a model", "give folders that minipuzzle wrote"
            )
        model = model_facts(read_architecture(read_config(folder)), Deployment())
        return Step(name=name, record={"results": {"model": model}})
    tables = {Path(file).stem: read_json(folder / file) for file in _TABLES if (folder / file).is_file()}
    scores = read_scores(folder / SCORES_FILE) if (folder / SCORES_FILE).is_file() else None
    return Step(name=name, record=record, tables=tables, curve=thinned_curve(folder), scores=scores)


def thinned_curve(folder: Path) -> list[dict[str, Any]]:
    """Some lines of the metrics that training left in a folder, evenly spaced, and all with a validation figure."""
    path = folder / _METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    stride = -(-len(lines) // MOST_POINTS) if lines else 1
    records = (json.loads(line) for line in lines)
    return [item for idx, item in enumerate(records) if idx % stride == 0 or "validation_kl" in item]
