"""What a user asks of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.architecture.model import PER_LAYER, UNIFORM, Architecture
from minipuzzle.architecture.quantities import parse_budget_bytes, parse_share_or_count
from minipuzzle.architecture.timings import Timings
from minipuzzle.errors import MinipuzzleError
from minipuzzle.search.costs import Limits

LAYOUTS = (UNIFORM, PER_LAYER)
DEFAULT_GRANULARITY = 128


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What a user asks for: limits, fixed numbers, bounds, or any mix of them.

    ``memory``: a size or a share of the source such as ``75%``; ``params``, ``active_params``: a count or a share;
    ``throughput``: at least so many tokens a second; ``latency_ms``: a step takes at most so long; the latter two need
    ``timings``. Without any of these limits, everything that is not fixed stays. ``keep``, ``width``: fixed counts by
    kind and widths by axis. ``minimum``, ``maximum``: bounds on counts. ``widths``: allowed widths by axis, as text.
    ``keep_layers``: positions that stay in any case. ``diversity``: layers in which candidates differ at least.
    """

    memory: str | None = None
    params: str | None = None
    active_params: str | None = None
    throughput: float | None = None
    latency_ms: float | None = None
    timings: Timings | None = None
    keep: Mapping[str, int] = field(default_factory=dict)
    width: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, str] = field(default_factory=dict)
    minimum: Mapping[str, int] = field(default_factory=dict)
    maximum: Mapping[str, int] = field(default_factory=dict)
    keep_layers: tuple[int, ...] = ()
    min_kept_fraction: float = 0.5
    min_ffn_fraction: float = 0.75
    depth_step: int = 1
    granularity: int = DEFAULT_GRANULARITY
    metric: str = "mse"
    layout: str = UNIFORM
    diversity: int = 1

    def __post_init__(self) -> None:
        if not self.is_limited and not self.keep and not self.width:
            raise MinipuzzleError("nothing says how small the model should be", "give --memory, --keep or --width")
        if self.layout not in LAYOUTS:
            raise MinipuzzleError(f"unknown layout {self.layout!r}", f"use one of {', '.join(LAYOUTS)}")
        if (self.throughput is not None or self.latency_ms is not None) and self.timings is None:
            raise MinipuzzleError("a throughput needs measured times of layers", "give them with --timings FILE.csv")

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit to search under."""
        limits = (self.memory, self.params, self.active_params, self.throughput, self.latency_ms)
        return any(limit is not None for limit in limits)

    def budget_bytes(self, source_bytes: int) -> int:
        """The memory budget in bytes; without one, what the source needs."""
        return source_bytes if self.memory is None else parse_budget_bytes(self.memory, source_bytes)

    def limits(self, source: Architecture, deployment: Deployment) -> Limits:
        """The limits in numbers, shares taken of the source at that deployment."""
        times = [self.latency_ms * 1e6] if self.latency_ms is not None else []
        times += [deployment.batch * 1e9 / self.throughput] if self.throughput else []
        source_bytes = memory_breakdown(source, deployment).total_bytes
        active = source.num_active_parameters
        return Limits(
            memory_bytes=inf if self.memory is None else self.budget_bytes(source_bytes),
            num_parameters=inf if self.params is None else parse_share_or_count(self.params, source.num_parameters),
            num_active_parameters=inf
            if self.active_params is None
            else parse_share_or_count(self.active_params, active),
            step_nanoseconds=min(times, default=inf),
        )
