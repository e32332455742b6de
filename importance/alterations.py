"""Which altered models are measured: without a layer, with a layer at a smaller width, or without more and more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minipuzzle.architecture.kinds import LAYER_KINDS, TRUNK, prunable_axes
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.cut.plan import Plan
from minipuzzle.cut.scores import Scores
from minipuzzle.cut.selection import make_plan
from minipuzzle.errors import MinipuzzleError


@dataclass(frozen=True, kw_only=True)
class LayerRequest:
    """What to measure about layers.

    ``layers``: those to leave out (None: all). ``widths``: axis -> smaller widths at which each layer that has the
    axis runs. ``removals``: how many layers to remove one after another, always the cheapest by ``metric``, measuring
    the others again each time. ``is_compensated``: each altered model is mended before it is measured.
    """

    layers: tuple[int, ...] | None = None
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    removals: int = 0
    metric: str = "mse"
    is_compensated: bool = False

    def __post_init__(self) -> None:
        LAYER_METRICS.check(self.metric)
        assert self.removals >= 0

    def candidates(self, source: Architecture) -> tuple[int, ...]:
        """Indices of the layers to leave out.

        Raises: MinipuzzleError if as many layers are to be removed as there are.
        """
        layers = tuple(range(len(source.layers))) if self.layers is None else self.layers
        if self.removals >= len(layers):
            raise MinipuzzleError(
                f"‹iterative› {self.removals} leaves none of the {len(layers)} layers to be measured",
                f"give at most {len(layers) - 1}",
            )
        return layers

    def blocks(self, source: Architecture) -> tuple[tuple[int, ...], ...]:
        """Decoder blocks of several layers, which only go together where config.json knows no incomplete ones."""
        candidates = set(self.candidates(source))
        return tuple(block for block in source.blocks if len(block) > 1 and candidates >= set(block))

    def narrowings(self, source: Architecture) -> list[tuple[int, str, int]]:
        """(layer, axis, width) of every narrower form; a layer that is no wider than a width is not narrowed."""
        return [
            (layer_idx, axis, width)
            for layer_idx, layer in enumerate(source.layers)
            for axis, widths in self.widths.items()
            for width in widths
            if axis in LAYER_KINDS[layer.kind].prunable_axes and width < layer.sizes[axis]
        ]

    def num_alterations(self, source: Architecture) -> int:
        """Altered models of the first round."""
        return len(self.candidates(source)) + len(self.narrowings(source)) + len(self.blocks(source))

    def to_metadata(self) -> dict[str, str]:
        """What distinguishes this request from others, as strings."""
        return {
            "layers": "all" if self.layers is None else ",".join(map(str, self.layers)),
            "variants": " ".join(f"{axis}={','.join(map(str, widths))}" for axis, widths in self.widths.items()),
            "removals": str(self.removals),
            "removal_metric": self.metric,
            **({"compensated": "true"} if self.is_compensated else {}),
        }


def parse_layers(text: str, source: Architecture) -> tuple[int, ...]:
    """Layer indices, ascending, from a list of indices, ranges and kinds: ``0-5,9,attention``.

    Raises: MinipuzzleError for anything else, and for layers that do not exist.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if part.strip() in LAYER_KINDS:
            indices: Sequence[int] = source.layer_indices(part.strip())
        elif first.isdecimal() and (last.isdecimal() or not dash):
            indices = range(int(first), int(last or first) + 1)
        else:
            raise MinipuzzleError(
                f"‹layers›: {part.strip()!r} is no layer",
                f"use indices, ranges or kinds: 0-5,9,{source.layers[0].kind}",
            )
        if not indices or indices[-1] >= len(source.layers):
            raise MinipuzzleError(
                f"‹layers›: the model has no layer {part.strip()}", f"its layers are 0 to {len(source.layers) - 1}"
            )
        found |= set(indices)
    return tuple(sorted(found))


def parse_widths(texts: Sequence[str], source: Architecture) -> dict[str, tuple[int, ...]]:
    """Widths of axes, ascending, from such texts as ``ffn=75%,50%`` or ``kv_group=1``.

    A share is of the widest layer that has the axis, rounded down to whole units of every group.

    Raises: MinipuzzleError for an unknown axis, or a width that is not smaller than the whole.
    """
    widths: dict[str, set[int]] = {}
    axes = [axis for axis in prunable_axes() if axis not in TRUNK.prunable_axes]
    for text in texts:
        axis, _, values = text.partition("=")
        having = [layer for layer in source.layers if axis in LAYER_KINDS[layer.kind].prunable_axes]
        if axis not in axes or not having or not values:
            raise MinipuzzleError(
                f"‹variants›: {text!r} is no axis of this model with widths",
                f"write it like ffn=75%,50%; the axes are {', '.join(axes)}",
            )
        group_axis = LAYER_KINDS[having[0].kind].unit_groups.get(axis)
        step = having[0].sizes[group_axis] if group_axis else 1
        widest = max(layer.sizes[axis] for layer in having)
        for value in values.split(","):
            width = _width(value.strip(), widest, step)
            if width is None or not 0 < width < widest:
                raise MinipuzzleError(
                    f"‹variants›: {value.strip()!r} of {axis} is no width between 0 and {widest}",
                    "use a number of units or a share such as 75%",
                )
            widths.setdefault(axis, set()).add(width)
    return {axis: tuple(sorted(found)) for axis, found in widths.items()}


def _width(value: str, widest: int, step: int) -> int | None:
    try:
        width = int(widest * float(value[:-1]) / 100) // step * step if value.endswith("%") else int(value)
    except ValueError:
        return None
    return width


def narrowed_plans(source: Architecture, units: Scores, request: LayerRequest) -> list[Plan]:
    """One plan for each narrower form, which keeps the best units by their scores.

    Raises: MinipuzzleError if a width cannot be divided into the groups of an axis.
    """
    everything = range(len(source.layers))
    return [
        make_plan(source, units, kept_layers=everything, widths={layer_idx: {axis: width}})
        for layer_idx, axis, width in request.narrowings(source)
    ]


def plans_of_any_units(source: Architecture, request: LayerRequest) -> list[Plan]:
    """Plans of the same shapes before any unit is scored, to count work with."""
    return [
        Plan(
            source_fingerprint=source.fingerprint(),
            kept_layers=tuple(range(len(source.layers))),
            kept_units={axis: {layer_idx: tuple(range(width))}},
        )
        for layer_idx, axis, width in request.narrowings(source)
    ]
