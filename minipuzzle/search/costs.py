"""What a model may cost: memory, parameters, active parameters, time of a step. What it does cost, and why not.

All costs add up over layers. The searches sum them layer by layer; ``model_costs`` computes them anew from a whole
architecture, and every plan is checked by that before it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.memory import Deployment, layer_bytes, memory_breakdown, outer_bytes
from minipuzzle.architecture.model import Architecture
from minipuzzle.architecture.quantities import format_count, format_gib
from minipuzzle.architecture.timings import Timings
from minipuzzle.errors import MinipuzzleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# All costs are whole numbers, and float64 holds those below 2**53, so their sums in it are exact.
Floats: TypeAlias = "NDArray[np.float64]"


def _format_whole(count: float) -> str:
    return format_count(int(count))


# Costs in the order of every array of costs: how each is called and printed, and which option limits it.
COSTS: Mapping[str, tuple[str, Callable[[float], str], str]] = {
    "memory_bytes": ("memory", lambda value: format_gib(int(value)), "‹memory›"),
    "num_parameters": ("parameters", _format_whole, "‹params›"),
    "num_active_parameters": ("active parameters", _format_whole, "‹active_params›"),
    "step_nanoseconds": (
        "time of a step",
        lambda nanoseconds: f"{nanoseconds / 1e6:.4g} ms",
        "‹throughput› or ‹latency_ms›",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper limits, of which any may be absent. A throughput is a limit on the time of a step."""

    memory_bytes: float = inf
    num_parameters: float = inf
    num_active_parameters: float = inf
    step_nanoseconds: float = inf

    def as_array(self) -> Floats:
        """The limits in the order of COSTS."""
        import numpy as np

        return np.array([getattr(self, name) for name in COSTS], dtype=np.float64)

    def given(self) -> dict[str, float]:
        """The limits that there are, by cost."""
        return {name: limit for name in COSTS if (limit := getattr(self, name)) < inf}

    def violated(self, costs: Costs) -> list[str]:
        """A sentence for each limit that costs exceed."""
        return [
            f"{COSTS[name][0]} {COSTS[name][1](getattr(costs, name))} exceeds {COSTS[name][1](limit)}"
            for name, limit in self.given().items()
            if (getattr(costs, name) or 0) > limit
        ]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one model costs. ``step_nanoseconds``: None without a table of times."""

    memory_bytes: int
    num_parameters: int
    num_active_parameters: int
    step_nanoseconds: int | None = None

    @classmethod
    def from_array(cls, costs: Floats, *, is_timed: bool) -> Costs:
        """Costs from numbers in the order of COSTS."""
        memory_bytes, num_parameters, num_active, nanoseconds = map(int, costs)
        return cls(
            memory_bytes=memory_bytes,
            num_parameters=num_parameters,
            num_active_parameters=num_active,
            step_nanoseconds=nanoseconds if is_timed else None,
        )


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """How costs are counted: the deployment for memory, and measured times where there are any."""

    source: Architecture
    deployment: Deployment
    timings: Timings | None = None
    _priced: dict[Any, Floats] = field(default_factory=dict, repr=False, compare=False)

    def layer(self, layer: LayerSpec) -> Floats:
        """Costs of one layer, in the order of COSTS. Equal layers are priced once."""
        import numpy as np

        key = (layer.kind, tuple(layer.sizes.items()), layer.options)
        if key not in self._priced:
            alone = replace(self.source, layers=(layer,), hidden=layer.sizes["hidden"])
            tensors = list(alone.layer_tensors(0))
            self._priced[key] = np.array(
                [
                    layer_bytes(alone, 0, self.deployment).total(),
                    sum(tensor.num_elements for tensor in tensors),
                    sum(tensor.num_active_elements for tensor in tensors),
                    self.timings.layer_nanoseconds(layer) if self.timings else 0,
                ],
                dtype=np.float64,
            )
        return self._priced[key]

    def outer(self, hidden: int) -> Floats:
        """Costs of all that lies around the layers, in the order of COSTS."""
        import numpy as np

        outer = replace(self.source, layers=(), hidden=hidden)
        elements = sum(tensor.num_elements for tensor in outer.outer_tensors())
        time = self.timings.outer_nanoseconds if self.timings else 0
        return np.array([outer_bytes(outer, self.deployment).total(), elements, elements, time], dtype=np.float64)

    def model(self, architecture: Architecture) -> Costs:
        """Costs of a whole model, counted anew and not by layers."""
        time = None
        if self.timings is not None:
            layers = architecture.layers
            time = self.timings.outer_nanoseconds + sum(self.timings.layer_nanoseconds(layer) for layer in layers)
        return Costs(
            memory_bytes=memory_breakdown(architecture, self.deployment).total_bytes,
            num_parameters=architecture.num_parameters,
            num_active_parameters=architecture.num_active_parameters,
            step_nanoseconds=time,
        )

    def throughput(self, costs: Costs) -> float | None:
        """Tokens a second over the batch; None without a table of times."""
        return self.deployment.batch * 1e9 / costs.step_nanoseconds if costs.step_nanoseconds else None


def check_limits(costs: Costs, limits: Limits) -> None:
    """Refuse costs beyond a limit.

    Raises: MinipuzzleError naming each limit that is exceeded.
    """
    if violated := limits.violated(costs):
        raise MinipuzzleError("; ".join(violated), "raise the limit, or search again")
