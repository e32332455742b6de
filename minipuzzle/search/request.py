"""What a user asks of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path

from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.architecture.model import PER_LAYER, UNIFORM, Architecture
from minipuzzle.architecture.quantities import parse_budget_bytes, parse_share_or_count
from minipuzzle.architecture.timings import Timings, read_timings
from minipuzzle.cut.expert_criteria import DEFAULT_CRITERION, EXPERT_CRITERIA
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.errors import MinipuzzleError
from minipuzzle.option import option
from minipuzzle.search.costs import Limits

LAYOUTS = (UNIFORM, PER_LAYER)
DEFAULT_GRANULARITY = 128


LIMITS = ("memory", "params", "active_params", "throughput", "latency_ms")
_LIMITS, _BOUNDS = "Limits and targets", "Bounds of the search"


@dataclass(frozen=True, kw_only=True)
class SearchTargets:
    """What a search may be asked for: limits, fixed numbers, bounds, or any mix of them; all may be left open.

    Without any limit, everything that is not fixed stays.
    """

    memory: str | None = option(None, "Budget: 31.7GiB, or a share of the source such as 75%.")
    params: str | None = option(None, "At most so many parameters: 47B, or a share: 80%.", metavar="N", section=_LIMITS)
    active_params: str | None = option(None, "At most so many for a token, likewise.", metavar="N", section=_LIMITS)
    throughput: float | None = option(
        None, "At least so many tokens/s; needs --timings.", takes="number", above=0, section=_LIMITS
    )
    latency_ms: float | None = option(
        None, "A step in at most so many ms.", name="latency", takes="number", above=0, section=_LIMITS
    )
    timings: Timings | str | Path | None = option(
        None,
        "Measured times: CSV with columns kind, step_seconds and one for each axis that was varied.",
        takes="path",
        section=_LIMITS,
    )
    keep: Mapping[str, int] = option(
        {}, "Keep exactly N layers of a kind. Repeatable.", takes="numbers", metavar="KIND=N", section=_LIMITS
    )
    width: Mapping[str, int] = option(
        {}, "Cut an axis (ffn, ssm_head, ...) to N. Repeatable.", takes="numbers", metavar="AXIS=N", section=_LIMITS
    )
    experts: str | None = option(
        None, "Keep so many routed experts in each layer: 96, or a share such as 75%.", metavar="N", section=_LIMITS
    )
    vocab: str | None = option(
        None,
        "Cut the vocabulary to N tokens, 32k or 50%: bytes, special tokens and the most frequent of the text stay, and "
        "the tokenizer is cut with the embeddings.",
        metavar="N",
        section=_LIMITS,
    )
    minimum: Mapping[str, int] = option(
        {}, "Keep at least N of a kind. Repeatable.", name="min", takes="numbers", metavar="KIND=N", section=_BOUNDS
    )
    maximum: Mapping[str, int] = option(
        {}, "Keep at most N of a kind. Repeatable.", name="max", takes="numbers", metavar="KIND=N", section=_BOUNDS
    )
    keep_layers: tuple[int, ...] = option(
        (), "Layers that stay, by index from 0.", takes="positions", metavar="I,J,...", section=_BOUNDS
    )
    widths: Mapping[str, str] = option(
        {},
        "Search an axis: a range 75%:100%:1024 or a list 24576,32768. Repeatable.",
        takes="pairs",
        metavar="AXIS=WIDTHS",
        section=_BOUNDS,
    )
    min_kept_fraction: float = option(
        0.5,
        "Share of each kind that stays, if no --min, and of KV groups, if those are searched.",
        name="min-kept",
        at_least=0,
        at_most=1,
        section=_BOUNDS,
    )
    min_ffn_fraction: float = option(
        0.75, "Narrowest FFN, if no --widths ffn.", name="min-ffn", at_least=0, at_most=1, section=_BOUNDS
    )
    depth_step: int = option(1, "Step of counts, from above.", at_least=1, section=_BOUNDS)
    granularity: int = option(
        DEFAULT_GRANULARITY,
        "Step of widths of ffn and hidden; FP8 kernels and tensor parallelism like 128.",
        at_least=1,
        section=_BOUNDS,
    )
    metric: str = option("mse", "Layer score that the prediction adds up.", choices=LAYER_METRICS, section=_BOUNDS)
    layout: str = option(
        UNIFORM,
        "uniform: one width for all layers, which every engine loads; per-layer: each layer its own.",
        choices=LAYOUTS,
        section=_BOUNDS,
    )
    expert_criterion: str = option(
        DEFAULT_CRITERION, "Score by which experts are ranked.", choices=EXPERT_CRITERIA, section=_BOUNDS
    )
    diversity: int = option(1, "Layers in which candidates differ.", at_least=1, section=_BOUNDS)

    @property
    def is_targeted(self) -> bool:
        """Whether a budget or fixed numbers are asked for, beside which that of a named deployment does not count."""
        return self.memory is not None or self.is_fixed or self.vocab is not None

    @property
    def is_fixed(self) -> bool:
        """Whether numbers of layers or widths are asked for."""
        return bool(self.keep or self.width or self.experts)

    def request(self, budget: str | None = None, sweep: str | None = None) -> SearchRequest | None:
        """What is asked for, None if nothing is.

        ``budget``: of a named deployment, for where there is no target. ``sweep``: LOW:HIGH:STEP, of which the highest
        budget is asked for.

        Raises: MinipuzzleError for two budgets, or times that cannot be read.
        """
        asked = {item.name: getattr(self, item.name) for item in fields(SearchTargets)}
        if sweep is not None and self.memory is not None:
            raise MinipuzzleError("‹sweep› and ‹memory› both set the budget", "give one of them")
        if sweep is not None:
            asked["memory"] = sweep.split(":")[1] if sweep.count(":") == 2 else sweep
        elif not self.is_targeted:
            asked["memory"] = budget
        if not self.is_fixed and all(asked[name] is None for name in (*LIMITS, "vocab")):
            return None
        if isinstance(self.timings, str | Path):
            asked["timings"] = read_timings(Path(self.timings))
        return SearchRequest(**asked)


@dataclass(frozen=True, kw_only=True)
class PruneTargets(SearchTargets):
    """The same with text, which says what of the vocabulary is needed."""

    keep_vocab_from: str | Path | Sequence[str | Path] = option(
        (),
        "Cut the vocabulary to the tokens of this text, or with --vocab to its most frequent ones (default for that: "
        "--data). Repeatable.",
        takes="paths",
        section="Cutting",
    )


@dataclass(frozen=True, kw_only=True)
class SearchRequest(SearchTargets):
    """Targets that ask for something: the least of a search.

    Raises: MinipuzzleError for targets that ask for nothing, an unknown layout or times without measurements.
    """

    timings: Timings | None = None

    def __post_init__(self) -> None:
        if self.only_cuts_vocabulary and self.vocab is None:
            raise MinipuzzleError("nothing says how small the model should be", "give ‹memory›, ‹keep› or ‹width›")
        if self.layout not in LAYOUTS:
            raise MinipuzzleError(f"unknown layout {self.layout!r}", f"use one of {', '.join(LAYOUTS)}")
        if (self.throughput is not None or self.latency_ms is not None) and self.timings is None:
            raise MinipuzzleError("a throughput needs measured times of layers", "give them with ‹timings› FILE.csv")

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit to search under."""
        return any(getattr(self, name) is not None for name in LIMITS)

    @property
    def only_cuts_vocabulary(self) -> bool:
        """Whether nothing else is asked for."""
        return not self.is_limited and not self.is_fixed

    def vocabulary_of(self, source: Architecture) -> int:
        """How many tokens stay; all where nothing is asked of them.

        Raises: MinipuzzleError for more than there are.
        """
        if self.vocab is None:
            return source.vocabulary
        number = parse_share_or_count(self.vocab, source.vocabulary)
        if not 0 < number <= source.vocabulary:
            raise MinipuzzleError(
                f"cannot cut the vocabulary to {number:,}: the model has {source.vocabulary:,} tokens", "change ‹vocab›"
            )
        return number

    def of_source(self, source: Architecture, deployment: Deployment) -> SearchRequest:
        """The same with every share as the number that it is of a source, for the search in a part of that."""
        limits = self.limits(source, deployment)
        active = limits.num_active_parameters
        return replace(
            self,
            memory=None if self.memory is None else f"{int(limits.memory_bytes)}B",
            params=None if self.params is None else str(int(limits.num_parameters)),
            active_params=None if self.active_params is None else str(int(active)),
        )

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
