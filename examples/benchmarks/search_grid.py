"""Search speed: grids of a 118-layer model, point by point and at once, and the per-layer programme for the same model.

Nemotron-H 56B from its config.json, scores drawn at random (with scores of neurons, so that narrowing is predicted from
them), FP4 on a context of one million tokens. Seconds are those of the search itself, the best of three runs.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from minipuzzle.architecture.deployments import DEPLOYMENTS
from minipuzzle.architecture.families import read_architecture
from minipuzzle.architecture.model import PER_LAYER
from minipuzzle.cut.scores import Scores
from minipuzzle.files.json_files import read_json
from minipuzzle.search.candidates import Candidate
from minipuzzle.search.engine import find_candidates
from minipuzzle.search.request import SearchRequest
from minipuzzle.search.space import requested_space

CONFIG = Path(__file__).parents[1] / "nemotron_h_56b" / "config.json"
DEPLOYMENT = DEPLOYMENTS["rtx5090-fp4-1M"].deployment
BOUNDS: dict[str, Any] = {"min_kept_fraction": 0.25, "minimum": {"attention": 3}}
GRIDS: dict[str, dict[str, Any]] = {
    "counts and FFN width (step 512)": {"widths": {"ffn": "75%:100%:512"}},
    "the same under three limits": {"widths": {"ffn": "75%:100%:512"}, "params": "85%", "active_params": "85%"},
    "counts and five axes (depth step 4)": {
        "depth_step": 4,
        "widths": {
            "ffn": "75%:100%:1024",
            "ssm_head": "192:256:32",
            "ssm_head_channel": "48,64",
            "kv_group": "4,8",
            "hidden": "6144:8192:1024",
        },
    },
}
SOLUTIONS = 8
NAIVE_POINTS = 100


def random_scores(seed: int = 0) -> Scores:
    """Scores of all layers and units of the model."""
    source, generator = read_architecture(read_json(CONFIG)), np.random.default_rng(seed)
    units = {
        f"{axis}.{idx}": (generator.random(layer.sizes[axis]) ** 4).astype(np.float32)
        for idx, layer in enumerate(source.layers)
        for axis in ("ffn", "ssm_head", "ssm_head_channel", "kv_group")
        if axis in layer.sizes
    }
    units["hidden"] = generator.random(source.hidden).astype(np.float32)
    return Scores(layer={"mse": generator.random(len(source.layers))}, units=units)


def best_seconds(search: Callable[[], list[Candidate]]) -> tuple[float, list[Candidate]]:
    """The least time of three runs, and what the last one found."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = search()
        seconds.append(time.perf_counter() - start)
    return min(seconds), found


def point_by_point_seconds(candidates: list[Candidate]) -> float:
    """Seconds to build and price one candidate as a whole model, mean over some."""
    some = candidates[:NAIVE_POINTS]
    start = time.perf_counter()
    for candidate in some:
        candidate.check()
    return (time.perf_counter() - start) / len(some)


def run() -> str:
    """The result page."""
    source, scores = read_architecture(read_json(CONFIG)), random_scores()
    rows = []
    for name, fields in GRIDS.items():
        request = SearchRequest(memory="31.7GiB", **BOUNDS, **fields)
        space = requested_space(source, request)
        num_points = prod(len(values) for values in (*space.counts.values(), *space.widths.values()))

        def search(request: SearchRequest = request) -> list[Candidate]:
            return find_candidates(source, scores, request, DEPLOYMENT)

        seconds, found = best_seconds(search)
        alone = point_by_point_seconds(found) * num_points
        rows.append(f"| {name} | {num_points:,} | {len(found):,} | {seconds:.2f} | {alone:,.0f} |")
    per_layer = SearchRequest(memory="31.7GiB", layout=PER_LAYER, **BOUNDS, widths={"ffn": "75%:100%:1024"})
    num_options = sum(10 if layer.kind == "mlp" else 2 for layer in source.layers)
    programme = []
    for number in (1, SOLUTIONS):

        def solve(number: int = number) -> list[Candidate]:
            return find_candidates(source, scores, per_layer, DEPLOYMENT, max_candidates=number)

        programme.append(best_seconds(solve)[0])
    return f"""# Search speed

Written by `search_grid.py` on {os.cpu_count()} CPU cores ({platform.machine()}), numpy {np.__version__}, at a load
average of {os.getloadavg()[0]:.1f} (above 1, other work ran beside it). Nemotron-H 56B (118 layers) from its
config.json, random scores, NVFP4 on a context of one million tokens within 31.7 GiB; best of three runs. All candidates
returned were priced, filtered and sorted; *one by one* is the time that building each point as a whole model and adding
up its tensors would take, from a sample of {NAIVE_POINTS}.

| grid | points | undominated that fit | seconds | seconds one by one |
|---|---:|---:|---:|---:|
{chr(10).join(rows)}

## Per-layer layout

One exact integer programme, {num_options} options for 118 layers: the best solution in {programme[0]:.2f} s, the
{SOLUTIONS} best in {programme[1]:.2f} s.
"""


if __name__ == "__main__":
    page = run()
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
