"""What a search may vary: how many layers of each kind stay, how wide each axis may be, which layers must stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from minipuzzle.architecture.families import FAMILIES
from minipuzzle.architecture.kinds import TRUNK, VOCABULARY, kind_of_axis
from minipuzzle.architecture.model import PER_LAYER, UNIFORM, Architecture
from minipuzzle.architecture.quantities import parse_share_or_count
from minipuzzle.cut.expert_criteria import EXPERT
from minipuzzle.errors import MinipuzzleError

if TYPE_CHECKING:
    from minipuzzle.search.request import SearchRequest

# Axes whose widths follow the granularity; others are cut unit by unit.
WIDE_AXES = ("ffn", "hidden", "expert_ffn", "shared_ffn")


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What may vary. ``counts``: kind -> allowed numbers of layers; ``widths``: axis -> allowed widths. Ascending.

    Layers that can only go together count as one, of the kind of the first of them. ``keep_layers``: positions of
    layers that stay in any case.
    """

    counts: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, tuple[int, ...]]
    layout: str = UNIFORM
    keep_layers: frozenset[int] = frozenset()


def requested_space(source: Architecture, request: SearchRequest) -> SearchSpace:
    """The grid of the published search (layer counts by kind, one FFN width), widened and narrowed by the request.

    Where blocks pair attention and MLP, most have a KV cache, and dropping whole blocks is coarse: the number of KV
    groups varies too.

    Raises: MinipuzzleError for kinds, axes, layers and numbers that the model does not have.
    """
    available = source.removable_counts(request.layout)
    for kind in (*request.keep, *request.minimum, *request.maximum):
        _check_kind(source, kind, available)
    for layer_idx in request.keep_layers:
        if not 0 <= layer_idx < len(source.layers):
            raise MinipuzzleError(
                f"there is no layer {layer_idx} to keep: the model has {len(source.layers)}", "see ‹keep_layers›"
            )
    keep_layers = frozenset(request.keep_layers)
    counts = {
        kind: _allowed_counts(kind, number, _num_kept_in_any_case(source, request, kind), request)
        for kind, number in available.items()
    }
    return SearchSpace(
        counts=counts, widths=_allowed_widths(source, request), layout=request.layout, keep_layers=keep_layers
    )


def _check_kind(source: Architecture, kind: str, available: Mapping[str, int]) -> None:
    if kind not in source.layer_counts:
        raise MinipuzzleError(f"the model has no {kind} layers", f"it has {', '.join(source.layer_counts)}")
    if kind not in available:
        raise MinipuzzleError(
            f"{kind} layers of this model stay or go with the layer before them in their block",
            f"give a number for {' and '.join(available)} layers only, or use ‹layout› per-layer",
        )


def _num_kept_in_any_case(source: Architecture, request: SearchRequest, kind: str) -> int:
    kept = set(request.keep_layers)
    together = source.removable(request.layout)
    return sum(1 for indices in together if source.layers[indices[0]].kind == kind and kept & set(indices))


def _allowed_counts(kind: str, available: int, num_must_stay: int, request: SearchRequest) -> tuple[int, ...]:
    if kind in request.keep:
        wanted = request.keep[kind]
        if not num_must_stay <= wanted <= available:
            raise MinipuzzleError(
                f"cannot keep {wanted} {kind} layers: the model has {available}, and ‹keep_layers› names "
                f"{num_must_stay}",
                "change ‹keep›",
            )
        return (wanted,)
    highest = min(available, request.maximum.get(kind, available))
    lowest = highest if not request.is_limited else ceil(available * request.min_kept_fraction)
    if kind in request.minimum:
        lowest = request.minimum[kind]
        if lowest > available:
            raise MinipuzzleError(
                f"cannot keep at least {lowest} {kind} layers: the model has {available}", "lower ‹minimum›"
            )
    lowest = max(min(lowest, highest), num_must_stay)
    if lowest > highest:
        raise MinipuzzleError(
            f"at most {highest} {kind} layers may stay, but ‹keep_layers› names {lowest}", "raise ‹maximum›"
        )
    if request.minimum.get(kind, 0) > highest:
        raise MinipuzzleError(
            f"‹minimum› {kind}={request.minimum[kind]} is above ‹maximum› {kind}={highest}", "change one"
        )
    return tuple(range(highest, lowest - 1, -request.depth_step))[::-1]


def _allowed_widths(source: Architecture, request: SearchRequest) -> dict[str, tuple[int, ...]]:
    widths: dict[str, tuple[int, ...]] = {}
    if VOCABULARY in request.width or VOCABULARY in request.widths:
        raise MinipuzzleError("which tokens stay is no matter of scores", "cut the vocabulary by ‹vocab›")
    for axis, size in request.width.items():
        _check_width(source, axis, size)
        widths[axis] = (size,)
    if request.experts is not None:
        if EXPERT in widths:
            raise MinipuzzleError("both ‹width› and ‹experts› speak of expert", "give one of them")
        widths[EXPERT] = (num_experts(source, request.experts),)
    for axis, text in request.widths.items():
        if axis in widths:
            raise MinipuzzleError(f"both ‹width› and ‹widths› speak of {axis}", "give one of them")
        widths[axis] = parse_widths(source, axis, text, request.granularity)
    if request.is_limited:
        widths = {**_default_widths(source, request), **widths}
    for axis in TRUNK.prunable_axes:
        if request.layout == PER_LAYER and len(widths.get(axis, ())) > 1:
            raise MinipuzzleError(f"all layers share one {axis} width", f"fix it with ‹width› {axis}=N")
    return widths


def num_experts(source: Architecture, text: str) -> int:
    """A number of experts, or a share of them, rounded up to as many in each group.

    Raises: MinipuzzleError where the model has no experts, or the router needs more.
    """
    full = source.width(EXPERT)
    if full is None:
        raise MinipuzzleError("the model has no routed experts of one number", "see `minipuzzle inspect`")
    step = default_step(source, EXPERT, 1)
    number = -(-parse_share_or_count(text, full) // step) * step
    _check_width(source, EXPERT, number)
    return number


def _default_widths(source: Architecture, request: SearchRequest) -> dict[str, tuple[int, ...]]:
    """What varies unless the request says else: FFN width, and KV groups where blocks pair attention and MLP and all
    engines would load what is left."""
    found: dict[str, tuple[int, ...]] = {}
    if (ffn := source.width("ffn")) is not None:
        multiples = range(request.granularity, ffn, request.granularity)
        found["ffn"] = (*(size for size in multiples if size >= ffn * request.min_ffn_fraction), ffn)
    groups = source.width("kv_group")
    derives = FAMILIES[source.model_type].head_dim_derived_by
    if groups is not None and not derives and any(len(block) > 1 for block in source.blocks):
        found["kv_group"] = tuple(range(max(1, ceil(groups * request.min_kept_fraction)), groups + 1))
    return found


def parse_widths(source: Architecture, axis: str, text: str, granularity: int) -> tuple[int, ...]:
    """Widths of an axis: a list ``24576,28672,32768`` or a range ``75%:100%:1024``, ascending.

    Raises: MinipuzzleError for text that is neither, and for widths that the model cannot have.
    """
    full = source.width(axis)
    if full is None:
        raise MinipuzzleError(f"the model has no axis {axis!r} of one width", "see `minipuzzle inspect`")
    parts = text.split(":")
    if len(parts) == 1:
        sizes = sorted({parse_share_or_count(part, full) for part in text.split(",")})
    elif len(parts) in (2, 3):
        low, high = (parse_share_or_count(part, full) for part in parts[:2])
        step = parse_share_or_count(parts[2], full) if len(parts) == 3 else default_step(source, axis, granularity)
        if step < 1 or low > high:
            raise MinipuzzleError(f"{text!r} is not a range of widths", "write LOW:HIGH:STEP, e.g. 75%:100%:1024")
        sizes = sorted({*range(-(-low // step) * step, high + 1, step), high})
    else:
        raise MinipuzzleError(f"{text!r} names no widths", "write a list 24576,32768 or a range 75%:100%:1024")
    for size in sizes:
        _check_width(source, axis, size)
    return tuple(sizes)


def default_step(source: Architecture, axis: str, granularity: int) -> int:
    """The step of an axis: the granularity where kernels like round widths, else one unit of each group."""
    full = source.width(axis) or 1
    if axis in WIDE_AXES:
        return min(granularity, full)
    group_axis = kind_of_axis(axis).unit_groups.get(axis)
    return (source.width(group_axis) or 1) if group_axis else 1


def _check_width(source: Architecture, axis: str, width: int) -> None:
    available = source.width(axis)
    if available is None:
        raise MinipuzzleError(f"the model has no axis {axis!r} of one width", "see `minipuzzle inspect`")
    if width < available:
        source.require_free(axis)
    if not 0 < width <= available:
        raise MinipuzzleError(f"cannot cut {axis} to {width}: the model has {available}", "lower ‹width›")
    if axis == "expert" and width < (used := source.width("experts_per_token") or 1):
        raise MinipuzzleError(f"cannot cut expert to {width}: the router picks {used} a token", "keep more experts")
    if group_axis := kind_of_axis(axis).unit_groups.get(axis):
        groups = source.width(group_axis) or 1
        if width % groups:
            raise MinipuzzleError(f"{axis}={width} does not divide into the model's {groups} groups", "change ‹width›")
