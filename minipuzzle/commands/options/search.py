"""Options of a search: limits, targets, bounds and layout, with the deployment that they hold for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from minipuzzle.architecture.model import UNIFORM
from minipuzzle.architecture.timings import read_timings
from minipuzzle.commands.options.shared import (
    COUNT,
    FOLDER_OR_FILE,
    deployment_option_list,
    pop_deployment,
    with_options,
)
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.errors import MinipuzzleError
from minipuzzle.search.request import DEFAULT_GRANULARITY, LAYOUTS, SearchRequest

Function = TypeVar("Function", bound=Callable[..., Any])


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """NAME=TEXT pairs."""
    found = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not text.strip():
            raise click.BadParameter(f"{value!r} is not {param.metavar}", ctx, param)
        found[name.strip()] = text.strip()
    return found


def _numbers(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    """NAME=COUNT pairs."""
    return {name: COUNT.convert(text, param, ctx) for name, text in _pairs(ctx, param, values).items()}


def _positions(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Positions of layers: 0,5,51."""
    try:
        return tuple(sorted({int(part) for part in value.split(",")})) if value else ()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of layers such as 0,5,51", ctx, param) from None


_NUMBERS: dict[str, Any] = {"multiple": True, "callback": _numbers}
_FRACTION = click.FloatRange(min=0, max=1)
_POSITIVE = click.FloatRange(min=0, min_open=True)
_AT_LEAST_1 = click.IntRange(min=1)

_LIMITS = (
    click.option("--memory", default=None, help="Budget: 31.7GiB, or a share of the source such as 75%."),
    click.option("--params", default=None, metavar="N", help="At most so many parameters: 47B, or a share: 80%."),
    click.option("--active-params", default=None, metavar="N", help="At most so many for a token, likewise."),
    click.option("--throughput", type=_POSITIVE, default=None, help="At least so many tokens/s; needs --timings."),
    click.option("--latency", "latency_ms", type=_POSITIVE, default=None, help="A step in at most so many ms."),
    click.option(
        "--timings",
        "timings_path",
        type=FOLDER_OR_FILE,
        default=None,
        help="Measured times: CSV with columns kind, step_seconds and one for each axis that was varied.",
    ),
)
_TARGETS = (
    click.option("--keep", metavar="KIND=N", help="Keep exactly N layers of a kind. Repeatable.", **_NUMBERS),
    click.option("--width", metavar="AXIS=N", help="Cut an axis (ffn, ssm_head, ...) to N. Repeatable.", **_NUMBERS),
)
_BOUNDS = (
    click.option("--min", "minimum", metavar="KIND=N", help="Keep at least N of a kind. Repeatable.", **_NUMBERS),
    click.option("--max", "maximum", metavar="KIND=N", help="Keep at most N of a kind. Repeatable.", **_NUMBERS),
    click.option("--keep-layers", metavar="I,J,...", callback=_positions, help="Layers that stay, by index from 0."),
    click.option(
        "--widths",
        metavar="AXIS=WIDTHS",
        multiple=True,
        callback=_pairs,
        help="Search an axis: a range 75%:100%:1024 or a list 24576,32768. Repeatable.",
    ),
    click.option(
        "--min-kept",
        type=_FRACTION,
        default=0.5,
        help="Share of each kind that stays, if no --min, and of KV groups, if those are searched.",
        show_default=True,
    ),
    click.option(
        "--min-ffn", type=_FRACTION, default=0.75, help="Narrowest FFN, if no --widths ffn.", show_default=True
    ),
    click.option("--depth-step", type=_AT_LEAST_1, default=1, help="Step of counts, from above.", show_default=True),
    click.option(
        "--granularity",
        type=_AT_LEAST_1,
        default=DEFAULT_GRANULARITY,
        help="Step of widths of ffn and hidden; FP8 kernels and tensor parallelism like 128.",
        show_default=True,
    ),
    click.option("--metric", type=click.Choice(LAYER_METRICS.names()), default="mse", show_default=True),
    click.option(
        "--layout",
        type=click.Choice(LAYOUTS),
        default=UNIFORM,
        help="uniform: one width for all layers, which every engine loads; per-layer: each layer its own.",
        show_default=True,
    ),
    click.option(
        "--diversity", type=_AT_LEAST_1, default=1, help="Layers in which candidates differ.", show_default=True
    ),
)
_FIELDS = (
    *("memory", "params", "active_params", "throughput", "latency_ms", "keep", "width", "minimum", "maximum"),
    *("keep_layers", "widths", "depth_step", "granularity", "metric", "layout", "diversity"),
)


def search_options(function: Function) -> Function:
    """Limits, targets and bounds of a search with the deployment they hold for; passed on as ``request`` (None where
    nothing was asked) and ``deployment``. A named deployment brings its machine's budget, unless --memory says else."""

    @wraps(function)
    def with_request(**params: Any) -> Any:
        named = pop_deployment(params)
        chosen = {name: params.pop(name) for name in _FIELDS}
        fractions = {"min_kept_fraction": params.pop("min_kept"), "min_ffn_fraction": params.pop("min_ffn")}
        timings_path: Path | None = params.pop("timings_path")
        if (sweep := params.get("sweep")) is not None:
            if chosen["memory"] is not None:
                raise MinipuzzleError("--sweep and --memory both set the budget", "give one of them")
            chosen["memory"] = sweep.split(":")[1] if sweep.count(":") == 2 else sweep
        is_targeted = chosen["memory"] is not None or chosen["keep"] or chosen["width"]
        if not is_targeted and params.get("plan_path") is None:
            chosen["memory"] = named.memory
        limits = ("memory", "params", "active_params", "throughput", "latency_ms")
        is_asked = is_targeted or any(chosen[name] is not None for name in limits)
        chosen["timings"] = read_timings(timings_path) if timings_path is not None else None
        request = SearchRequest(**chosen, **fractions) if is_asked else None
        return function(request=request, deployment=named.deployment, **params)

    options = (*_LIMITS, *_TARGETS, *_BOUNDS, *deployment_option_list())
    return with_options(with_request, options)  # type: ignore[no-any-return]


def require_request(request: SearchRequest | None) -> SearchRequest:
    """The request.

    Raises: MinipuzzleError if nothing was asked.
    """
    if request is None:
        raise MinipuzzleError("nothing says how small the model should be", "give --memory, --keep or --width")
    return request
