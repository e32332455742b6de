"""What a model needs at serving time, term by term, each with its own precision. Exact bytes, no rounding.

Every tensor is priced by itself, from its shape, as files and engines store it. So memory adds up over layers, and
what the searches sum is what the whole model needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.model import CARRIED, Architecture, PlacedTensor
from minipuzzle.architecture.quantities import format_gib
from minipuzzle.errors import MinipuzzleError
from minipuzzle.table import Table

NVFP4_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bits of an element; elements along a row that share one 8-bit scale (0: none); and whether a quantised weight
    comes with two float32 scales, its own and that of its input, as in ModelOpt's FP8 and NVFP4 checkpoints."""

    name: str
    bits: int
    block: int = 0
    has_scales: bool = False

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one tensor without its float32 scales. Rows are padded to whole blocks and bytes."""
        if not shape:
            return -(-self.bits // 8)
        num_rows, row_elements = prod(shape[:-1]), shape[-1]
        num_blocks = -(-row_elements // self.block) if self.block else 0
        return num_rows * (-(-row_elements * self.bits // 8) + num_blocks)


_PRECISIONS = (
    Precision(name="fp32", bits=32),
    Precision(name="bf16", bits=16),
    Precision(name="fp16", bits=16),
    Precision(name="fp8", bits=8, has_scales=True),
    Precision(name="nvfp4", bits=4, block=NVFP4_BLOCK, has_scales=True),
)
PRECISIONS = Table("precision", "precisions", entries={precision.name: precision for precision in _PRECISIONS})
FROM_CONFIG = "config"  # the SSM state's precision as config.json has it

# Each term of memory by its name in a Deployment, and how it is called in tables.
TERMS: Mapping[str, str] = {
    "weights": "linear weights",
    "scales": "scales of weights and KV cache",
    "other": "norms, convolutions, vectors",
    "embeddings": "embeddings",
    "head": "LM head",
    "kv_cache": "KV cache",
    "ssm_state": "SSM state",
    "conv_state": "convolution state",
    CARRIED: "parts beside the language model",
}
WEIGHT_TERMS = ("weights", "scales", "other", "embeddings", "head", CARRIED)
_TERM_OF_CACHE = {"kv": "kv_cache"}
_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How a model will be served: context and batch, and the precision of each kind of memory.

    ``weights`` covers the linear layers that exports quantise; norms, convolutions and vectors stay at ``other``.
    ``ssm_state`` may be "config": what config.json asks for, float32 where it is silent.
    """

    context_tokens: int = 8192
    batch: int = 1
    weights: str = "bf16"
    embeddings: str = "bf16"
    head: str = "bf16"
    other: str = "bf16"
    kv_cache: str = "bf16"
    ssm_state: str = FROM_CONFIG
    conv_state: str = "bf16"

    def __post_init__(self) -> None:
        if self.context_tokens < 1 or self.batch < 1:
            raise MinipuzzleError("context and batch must be at least 1", "check ‹context› and ‹batch›")
        for term in PRECISION_FIELDS:
            name = getattr(self, term)
            if name not in PRECISIONS and not (term == "ssm_state" and name == FROM_CONFIG):
                error = PRECISIONS.unknown(name)
                raise MinipuzzleError(f"{error.problem} for {term}", error.hint)

    def precision_of(self, term: str, architecture: Architecture) -> Precision:
        """The precision of one term for a model."""
        name = "fp32" if term == "scales" else self.other if term == CARRIED else getattr(self, term)
        return PRECISIONS[architecture.ssm_state_precision if name == FROM_CONFIG else name]

    def describe(self) -> str:
        """One line for tables: what a memory figure assumes."""
        return (
            f"context {self.context_tokens:,}, batch {self.batch}, weights {self.weights}, "
            f"embeddings {self.embeddings}, head {self.head}, KV cache {self.kv_cache}, SSM state {self.ssm_state}"
        )


PRECISION_FIELDS = tuple(field.name for field in fields(Deployment) if field.name not in ("context_tokens", "batch"))


@dataclass(frozen=True, kw_only=True)
class MemoryTerm:
    """One line of a memory breakdown."""

    name: str
    num_bytes: int
    precision: str


@dataclass(frozen=True, kw_only=True)
class MemoryBreakdown:
    """All terms of a model at one deployment, and beside them estimates that budgets do not count."""

    terms: tuple[MemoryTerm, ...]
    estimates: tuple[MemoryTerm, ...] = ()

    @property
    def total_bytes(self) -> int:
        """The sum of the exact terms, which budgets are compared with."""
        return sum(term.num_bytes for term in self.terms)

    def describe(self) -> str:
        """The terms in one line, largest first."""
        ordered = sorted(self.terms, key=lambda term: -term.num_bytes)
        return ", ".join(f"{term.name} {format_gib(term.num_bytes)}" for term in ordered if term.num_bytes)


def memory_breakdown(architecture: Architecture, deployment: Deployment) -> MemoryBreakdown:
    """Every memory term of an architecture at a deployment."""
    total = outer_bytes(architecture, deployment)
    for layer_idx, times in architecture.distinct_layers():
        for term, num_bytes in layer_bytes(architecture, layer_idx, deployment).items():
            total[term] += num_bytes * times
    terms = tuple(
        MemoryTerm(name=label, num_bytes=total[term], precision=deployment.precision_of(term, architecture).name)
        for term, label in TERMS.items()
        if term != CARRIED or architecture.carried
    )
    return MemoryBreakdown(terms=terms, estimates=(_activations(architecture, deployment),))


def layer_bytes(architecture: Architecture, layer_idx: int, deployment: Deployment) -> Counter[str]:
    """Bytes by term of one layer: its weights and what it keeps while generating."""
    total: Counter[str] = Counter()
    for tensor in architecture.layer_tensors(layer_idx):
        _add_tensor(total, tensor, architecture, deployment)
    layer = architecture.layers[layer_idx]
    for cache in LAYER_KINDS[layer.kind].caches(layer):
        term = _TERM_OF_CACHE.get(cache.name, cache.name)
        precision = deployment.precision_of(term, architecture)
        tokens = cache.num_tokens(deployment.context_tokens)
        total[term] += precision.num_bytes((deployment.batch, tokens, cache.num_elements))
        if cache.per_token and precision.has_scales:
            total["scales"] += 2 * _SCALE_BYTES  # one for keys, one for values
    return total


def outer_bytes(architecture: Architecture, deployment: Deployment) -> Counter[str]:
    """Bytes by term of embeddings, final norm and LM head; a head tied to the embeddings is counted once, unless
    engines want one of its own, which exports then write.

    Of what is carried, heads that predict several tokens are not counted: engines load them only if asked.
    """
    total: Counter[str] = Counter()
    for tensor in architecture.deployed.outer_tensors():
        _add_tensor(total, tensor, architecture, deployment)
    for tensor in (tensor for tensor in architecture.carried if not tensor.spec.is_dispensable):
        total[CARRIED] += deployment.precision_of(CARRIED, architecture).num_bytes(tensor.shape)
    return total


def _add_tensor(total: Counter[str], tensor: PlacedTensor, architecture: Architecture, deployment: Deployment) -> None:
    is_quantizable = tensor.spec.quantized
    term = "weights" if is_quantizable else tensor.part if tensor.part in ("embeddings", "head") else "other"
    precision = deployment.precision_of(term, architecture)
    total[term] += precision.num_bytes(tensor.shape)
    if precision.has_scales and term != "other":
        # An embedding table is looked up, not multiplied, so it has no input to scale.
        total["scales"] += (1 if term == "embeddings" else 2) * _SCALE_BYTES


# vLLM prefills at most so many tokens at once by default (max_num_batched_tokens).
_PREFILL_TOKENS = 2048


def _activations(architecture: Architecture, deployment: Deployment) -> MemoryTerm:
    """An estimate of working memory: bf16 residual, inputs and outputs of the widest layer for one prefill chunk, and
    float32 logits of one token a sequence. Engines add their own buffers, which nothing here can know."""
    widest = max((_row_elements(architecture.layers[idx]) for idx, _ in architecture.distinct_layers()), default=0)
    chunk_tokens = min(_PREFILL_TOKENS, deployment.context_tokens * deployment.batch)
    num_bytes = chunk_tokens * (2 * architecture.hidden + widest) * 2 + deployment.batch * architecture.vocabulary * 4
    return MemoryTerm(name=f"activations, {chunk_tokens:,} tokens (estimate)", num_bytes=num_bytes, precision="bf16")


def _row_elements(layer: LayerSpec) -> int:
    linears = (spec.shape(layer.sizes) for spec in LAYER_KINDS[layer.kind].tensors(layer) if spec.quantized)
    return sum(shape[0] for shape in linears)
