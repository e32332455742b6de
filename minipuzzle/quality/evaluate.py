"""Quality of a model on text: loss, bits per byte, accuracy, and how far it is from a teacher.

Shape suffixes: B windows of a batch, T tokens of a window, N tokens that count, C tokens of a chunk, H hidden,
V vocabulary. ``[N, V]`` never exists whole: LM heads are applied to C tokens at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from minipuzzle.architecture.families import Family
from minipuzzle.data.windows import IGNORE, PIECE_CHARACTERS, EvaluationWindows, document_tokens
from minipuzzle.devices import Device
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import Advance, no_progress
from minipuzzle.quality.record import ERRORS, Quality
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import ModelParts, parts_of
from minipuzzle.runtime.rounded_linear import RoundedLinear

_CHARACTERS_OF_TOKEN = 64  # at most, on average over a text
CHUNK_LOGITS = 2**25  # 128 MiB of float32 logits at a time
_LIMIT_BYTES_PER_LOGIT = 256  # under a limit: with what is computed from them, logits take a tenth of it
_MAX_LOSS_NATS = 700.0  # exp of more overflows float64; no sane model is near


class ReferenceLogits:
    """The next-token distributions that models are compared with on a chunk of tokens, made once for all of them."""

    def __init__(self, logits_CV: torch.Tensor) -> None:
        """From the reference model's float32 logits."""
        self.log_prob_CV = logits_CV.log_softmax(-1)
        self.prob_CV = self.log_prob_CV.exp()
        self.best_C = logits_CV.argmax(-1)


@dataclass(kw_only=True)
class WindowSums:
    """What standard errors are made of: how sums over a window's tokens vary from window to window, in float64.

    Tokens of a window are no independent draws, so windows are the units (a ratio estimator): with s a window's sum, n
    its tokens and r the mean over all tokens, the variance of r is m/(m-1) sum((s - r n)^2) / sum(n)^2.
    """

    num_windows: int = 0
    squared_tokens: float = 0.0
    squared: dict[str, float] = field(default_factory=dict)
    crossed: dict[str, float] = field(default_factory=dict)

    def add(self, tokens_B: NDArray[np.float64], sums_B: Mapping[str, NDArray[np.float64]]) -> None:
        """Add windows by their tokens and by what was summed over those."""
        self.num_windows += int((tokens_B > 0).sum())
        self.squared_tokens += float(tokens_B @ tokens_B)
        for name, values_B in sums_B.items():
            self.squared[name] = self.squared.get(name, 0.0) + float(values_B @ values_B)
            self.crossed[name] = self.crossed.get(name, 0.0) + float(values_B @ tokens_B)

    def error(self, name: str, mean: float, num_tokens: int) -> float | None:
        """The standard error of a mean over all tokens; None for a single window, and for what was not summed."""
        if self.num_windows < 2 or name not in self.squared:
            return None
        spread = self.squared[name] - 2 * mean * self.crossed[name] + mean**2 * self.squared_tokens
        return math.sqrt(max(0.0, spread) * self.num_windows / (self.num_windows - 1)) / num_tokens


@dataclass(kw_only=True)
class TokenSums:
    """Sums over tokens, float64: of the loss, its rise above a reference's and the forward KL in nats, and counts."""

    loss: float = 0.0
    loss_rise: float = 0.0
    num_correct: int = 0
    kl: float = 0.0
    num_agreed: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def add(
        self, logits_CV: torch.Tensor, labels_C: torch.Tensor, reference: ReferenceLogits | None = None
    ) -> dict[str, torch.Tensor]:
        """Add a chunk of tokens, by float32 logits and next tokens; rows that the reference lacks are not compared.

        Returns what was summed up, ``[C]`` by name.
        """
        log_prob_CV, best_C = logits_CV.log_softmax(-1), logits_CV.argmax(-1)
        loss_C = -log_prob_CV.gather(-1, labels_C[:, None])[:, 0]
        found = {"loss": loss_C}
        self.loss += float(_sum_float64(loss_C))
        self.num_correct += int((best_C == labels_C).sum())
        self.num_tokens += len(labels_C)
        if reference is not None:
            if (num_shared := reference.log_prob_CV.shape[1]) < logits_CV.shape[1]:
                log_prob_CV = logits_CV[:, :num_shared].log_softmax(-1)
                best_C = log_prob_CV.argmax(-1)
            rise_CV = reference.log_prob_CV - log_prob_CV
            kl_C = torch.linalg.vecdot(reference.prob_CV, rise_CV)
            self.kl += float(_sum_float64(kl_C))
            self.num_agreed += int((best_C == reference.best_C).sum())
            # A next token that the reference does not know has no loss there: it counts as no rise.
            is_known_C = labels_C < num_shared
            known_C = labels_C.clamp(max=num_shared - 1)[:, None]
            rise_C = (loss_C + reference.log_prob_CV.gather(-1, known_C)[:, 0]) * is_known_C
            self.loss_rise += float(_sum_float64(rise_C))
            found |= {"kl": kl_C, "loss_rise": rise_C}
        return found


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    family: Family,
    windows: EvaluationWindows,
    compute: Compute = Compute(),
    *,
    against: nn.Module | None = None,
    against_family: Family | None = None,
    batch: int = 4,
    advance: Advance = no_progress,
) -> Quality:
    """Measure a model on windows, and its distance from a teacher that shares its vocabulary if one is given.

    Where heads are padded to different numbers of rows, the distance is over the rows that both have.

    Each trunk runs once a batch. Logits are float32, sums float64; padding counts nowhere. ``advance`` is called with
    the number of windows done. ``against_family`` is needed only where the teacher is of another family.

    Raises: MinipuzzleError if the model's loss is not a finite number.
    """
    student = _Scored(parts_of(model, family))
    teacher = _Scored(parts_of(against, against_family or family)) if against is not None else None
    sums, spread = TokenSums(), WindowSums()
    device, max_logits = compute.torch_device, CHUNK_LOGITS
    if compute.memory_bytes is not None:
        max_logits = min(max_logits, compute.memory_bytes // _LIMIT_BYTES_PER_LOGIT)
    for token_ids_BT, labels_BT in _batches_without_padding(windows, batch):
        found = _add_batch(sums, student, teacher, token_ids_BT.to(device), labels_BT.to(device), max_logits)
        window_N = (labels_BT != IGNORE).nonzero()[:, 0].numpy()
        size = len(token_ids_BT)
        by_window = {name: _sums_by(window_N, values_N, size) for name, values_N in found.items()}
        spread.add(_sums_by(window_N, np.ones(len(window_N)), size), by_window)
        advance(size)
    quality = _finish(sums, windows.num_bytes, has_teacher=teacher is not None)
    means = {"loss": quality.loss, "kl": quality.kl or 0.0, "loss_rise": quality.loss_rise or 0.0}
    errors = {f"{name}_error": spread.error(name, mean, sums.num_tokens) for name, mean in means.items()}
    return replace(quality, **errors)  # type: ignore[arg-type] # mypy takes them for any of the fields


def _sums_by(window_N: NDArray[np.int64], values_N: NDArray[np.float64], num_windows: int) -> NDArray[np.float64]:
    return np.bincount(window_N, values_N, num_windows).astype(np.float64)


def _batches_without_padding(windows: EvaluationWindows, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels ``[B, T]`` of windows of about equal lengths, up to the last position that counts: causal
    layers do not see what follows it, and short documents would be padding for the most part."""
    positions_T = torch.arange(1, windows.labels.shape[1] + 1)
    lengths_B = (positions_T * (windows.labels != IGNORE)).amax(1)
    for rows in lengths_B.argsort(stable=True).split(batch):
        end = int(lengths_B[rows].max())
        yield windows.token_ids[rows, :end], windows.labels[rows, :end]


def combine(evaluations: Sequence[Quality]) -> Quality:
    """The quality on several sets of windows together, weighted by their tokens; each as ``evaluate`` gives it."""
    sums = TokenSums()
    for part in evaluations:
        num_tokens = part.num_tokens or 0
        sums.loss += part.loss * num_tokens
        sums.num_correct += round((part.accuracy or 0.0) * num_tokens)
        sums.kl += (part.kl or 0.0) * num_tokens
        sums.loss_rise += (part.loss_rise or 0.0) * num_tokens
        sums.num_agreed += round((part.agreement or 0.0) * num_tokens)
        sums.num_tokens += num_tokens
        sums.seconds += part.seconds or 0.0
    has_teacher = all(part.kl is not None for part in evaluations)
    combined = _finish(sums, sum(part.num_bytes or 0 for part in evaluations), has_teacher=has_teacher)
    errors = {error: _combined_error(evaluations, error, sums.num_tokens) for error in ERRORS.values()}
    return replace(combined, **errors)  # type: ignore[arg-type] # mypy takes them for any of the fields


def _combined_error(evaluations: Sequence[Quality], error: str, num_tokens: int) -> float | None:
    """Errors of texts that were measured independently of each other add up by their squares."""
    found = [(getattr(part, error), part.num_tokens or 0) for part in evaluations]
    if any(value is None for value, _ in found):
        return None
    return math.sqrt(sum((value * tokens) ** 2 for value, tokens in found)) / num_tokens


def documents_within(tokenizer: Any, documents: Sequence[str], max_tokens: int) -> list[str]:
    """The first documents that hold about ``max_tokens`` tokens; the last is cut so that its bytes stay known."""
    kept: list[str] = []
    remaining_tokens = max_tokens
    for whole in documents:
        # No need to tokenise all of a long text for its beginning.
        text = whole[: _CHARACTERS_OF_TOKEN * remaining_tokens] if len(whole) > PIECE_CHARACTERS else whole
        num_tokens = len(document_tokens(tokenizer, text))
        if num_tokens >= remaining_tokens:
            return [*kept, text[: max(1, len(text) * remaining_tokens // num_tokens)]]
        kept.append(text)
        remaining_tokens -= num_tokens
    return kept


def head_chunks(num_tokens: int, vocabulary: int, max_logits: int = CHUNK_LOGITS) -> Iterator[slice]:
    """Consecutive slices of tokens, each with no more than so many logits."""
    chunk_tokens = max(1, max_logits // vocabulary)
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def divergence_sums(teacher_logits_CV: torch.Tensor, student_logits_CV: torch.Tensor) -> tuple[float, int]:
    """Sum over tokens of KL(teacher || student) in nats, and the number of tokens on whose best next token they agree.

    Shapes: both float32 [tokens, vocabulary].
    """
    sums = TokenSums()
    sums.add(student_logits_CV, student_logits_CV.argmax(-1), ReferenceLogits(teacher_logits_CV))
    return sums.kl, sums.num_agreed


def _sum_float64(values: torch.Tensor) -> torch.Tensor:
    if Device.of(values).has_float64:
        return values.sum(dtype=torch.float64)
    return values.sum(-1).cpu().double().sum()


class _Scored:
    """A model's parts with its head in float32, made once: a bfloat16 product would bury small divergences."""

    def __init__(self, parts: ModelParts) -> None:
        self.parts = parts
        self.weight_VH = parts.head.weight.float()
        self.bias_V = None if parts.head.bias is None else parts.head.bias.float()

    def hidden(self, token_ids_BT: torch.Tensor, counts_BT: torch.Tensor) -> torch.Tensor:
        """What the head sees of the tokens that count, ``[N, H]``."""
        return self.parts.logits_input(token_ids_BT)[counts_BT]

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """Float32 logits of some tokens."""
        hidden_CH = hidden_CH.float()
        if isinstance(self.parts.head, RoundedLinear):  # an export's
            hidden_CH = self.parts.head.round_inputs(hidden_CH)
        return F.linear(hidden_CH, self.weight_VH, self.bias_V)


def _add_batch(
    sums: TokenSums,
    student: _Scored,
    teacher: _Scored | None,
    token_ids_BT: torch.Tensor,
    labels_BT: torch.Tensor,
    max_logits: int,
) -> dict[str, NDArray[np.float64]]:
    """Add a batch to the sums; what was summed up for each token that counts, ``[N]`` by name."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    counts_BT = labels_BT != IGNORE
    labels_N = labels_BT[counts_BT]
    student_hidden_NH = _timed(sums, labels_N.device, lambda: student.hidden(token_ids_BT, counts_BT))
    teacher_hidden_NH = teacher.hidden(token_ids_BT, counts_BT) if teacher else None
    for chunk in head_chunks(len(labels_N), student.weight_VH.shape[0], max_logits):
        labels_C = labels_N[chunk]
        logits_CV = _timed(sums, labels_C.device, lambda chunk=chunk: student.logits(student_hidden_NH[chunk]))
        reference = None
        if teacher is not None and teacher_hidden_NH is not None:
            num_rows = student.weight_VH.shape[0]
            reference = ReferenceLogits(teacher.logits(teacher_hidden_NH[chunk])[:, :num_rows])
        for name, values_C in sums.add(logits_CV, labels_C, reference).items():
            found.setdefault(name, []).append(values_C.cpu().double().numpy())
    return {name: np.concatenate(pieces) for name, pieces in found.items()}


def _timed(sums: TokenSums, device: torch.device, compute: Callable[..., torch.Tensor]) -> torch.Tensor:
    Device(str(device)).synchronise()
    start = time.perf_counter()
    result = compute()
    Device(str(device)).synchronise()
    sums.seconds += time.perf_counter() - start
    return result


def _finish(sums: TokenSums, num_bytes: int, *, has_teacher: bool) -> Quality:
    loss = sums.loss / sums.num_tokens
    if not loss < _MAX_LOSS_NATS:  # also true for NaN
        raise MinipuzzleError(
            f"the model's loss is {loss} nats/token: it computes NaN, infinite or senseless values",
            "check the weights, or try ‹dtype› float32",
        )
    return Quality(
        loss=loss,
        kl=sums.kl / sums.num_tokens if has_teacher else None,
        loss_rise=sums.loss_rise / sums.num_tokens if has_teacher else None,
        agreement=sums.num_agreed / sums.num_tokens if has_teacher else None,
        accuracy=sums.num_correct / sums.num_tokens,
        num_tokens=sums.num_tokens,
        num_bytes=num_bytes,
        seconds=sums.seconds,
    )
