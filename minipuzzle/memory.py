"""What a model needs at serving time, term by term, each with its own precision. Exact bytes, no rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from minipuzzle.architecture import Architecture
from minipuzzle.errors import MinipuzzleError


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bits per element, and bytes of scales per tensor (FP8 and NVFP4 keep one float32 for each weight)."""

    name: str
    bits_per_element: float
    scale_bytes_per_tensor: int = 0

    def num_bytes(self, num_elements: int, num_tensors: int = 0) -> int:
        """Bytes of some tensors with that many elements together."""
        bits = num_elements * self.bits_per_element
        return int(bits / 8) + num_tensors * self.scale_bytes_per_tensor


# NVFP4: 4 bits and one 8-bit scale for 16 elements.
PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        precision.name: precision
        for precision in (
            Precision(name="fp32", bits_per_element=32),
            Precision(name="bf16", bits_per_element=16),
            Precision(name="fp8", bits_per_element=8, scale_bytes_per_tensor=4),
            Precision(name="nvfp4", bits_per_element=4.5, scale_bytes_per_tensor=4),
        )
    }
)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How a model will be served: context and batch, and the precision of each kind of memory.

    ``weights`` covers the linear layers that exports quantise; norms, convolutions and vectors stay at ``other``.
    """

    context_tokens: int = 8192
    batch: int = 1
    weights: str = "bf16"
    embeddings: str = "bf16"
    head: str = "bf16"
    other: str = "bf16"
    kv_cache: str = "bf16"
    ssm_state: str = "fp32"
    conv_state: str = "bf16"

    def __post_init__(self) -> None:
        if self.context_tokens < 1 or self.batch < 1:
            raise MinipuzzleError("context and batch must be at least 1", "check --context and --batch")
        for term in ("weights", "embeddings", "head", "other", "kv_cache", "ssm_state", "conv_state"):
            name = getattr(self, term)
            if name not in PRECISIONS:
                raise MinipuzzleError(f"unknown precision {name!r} for {term}", f"use one of {', '.join(PRECISIONS)}")

    def describe(self) -> str:
        """One line for tables: what a memory figure assumes."""
        return (
            f"context {self.context_tokens:,}, batch {self.batch}, weights {self.weights}, "
            f"embeddings {self.embeddings}, head {self.head}, KV cache {self.kv_cache}, SSM state {self.ssm_state}"
        )


@dataclass(frozen=True, kw_only=True)
class MemoryTerm:
    """One line of a memory breakdown."""

    name: str
    num_bytes: int
    precision: str


@dataclass(frozen=True, kw_only=True)
class MemoryBreakdown:
    """All terms of a model at one deployment. Activations and engine buffers are not in it."""

    terms: tuple[MemoryTerm, ...]

    @property
    def total_bytes(self) -> int:
        """The sum that budgets are compared with."""
        return sum(term.num_bytes for term in self.terms)


def memory_breakdown(architecture: Architecture, deployment: Deployment) -> MemoryBreakdown:
    """Every memory term of an architecture at a deployment."""
    elements: Counter[str] = Counter()
    num_quantized = 0
    for tensor, times in architecture.distinct_tensors():
        if tensor.spec.quantized:
            num_quantized += times
        term = "weights" if tensor.spec.quantized else tensor.part if tensor.part in ("embeddings", "head") else "other"
        elements[term] += tensor.num_elements * times
    for cache, times in architecture.distinct_caches():
        tokens = deployment.context_tokens if cache.per_token else 1
        elements["kv_cache" if cache.name == "kv" else cache.name] += (
            cache.num_elements * times * tokens * deployment.batch
        )
    labels = {
        "weights": "linear weights",
        "other": "norms, convolutions, vectors",
        "embeddings": "embeddings",
        "head": "LM head",
        "kv_cache": "KV cache",
        "ssm_state": "SSM state",
        "conv_state": "convolution state",
    }
    terms = []
    for term, label in labels.items():
        precision = PRECISIONS[getattr(deployment, term)]
        num_tensors = num_quantized if term == "weights" else 0
        num_bytes = precision.num_bytes(elements[term], num_tensors)
        terms.append(MemoryTerm(name=label, num_bytes=num_bytes, precision=precision.name))
    return MemoryBreakdown(terms=tuple(terms))
