"""The distillation loss from hidden states and LM heads, in chunks of rows, with its gradient in closed form.

``[rows, vocabulary]`` never exists whole: each chunk of logits is turned into its share of the loss and of the
gradients and then forgotten. Logits and sums are float32 (float64 for float64 inputs) whatever the inputs are, because
logits rounded to bfloat16 spoil the gradient once student and teacher are close.

Shape suffixes: N rows (tokens), C rows of one chunk, V vocabulary, H student's hidden size, G teacher's hidden size, K
likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.objective.divergences import ChunkBuffers, Distribution, coarsen, refine_gradient, softmax_
from distill.settings import FORMS
from minipuzzle.architecture.quantities import MIB
from minipuzzle.data.windows import IGNORE
from minipuzzle.devices import Device

# Small chunks stay in a CPU's caches; a GPU needs enough rows to keep its matrix units busy.
CPU_CHUNK_BYTES = 16 * MIB
CPU_CHUNK_ROWS = 128  # at least, because each chunk reads both heads and writes the gradient of one
ACCELERATOR_CHUNK_BYTES = 1024 * MIB


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised: (1 - ce_weight) * temperature**2 * divergence + ce_weight * cross-entropy + hidden_weight *
    cosine distance.

    ``form``: a name in FORMS; ``mixture_share``: the share of the first distribution in the mixture of ``jsd``,
    ``skewed`` and ``reverse-skewed`` (None: the form's own). The factor temperature**2 keeps the size of the gradient
    when the temperature changes. ``top_k``: of the teacher, keep its K likeliest tokens and one outcome for all others.
    ``chunk_bytes`` bounds the working memory (None: by device). ``matmul_dtype`` casts the operands of the head
    products (None: as given).
    """

    form: str = "forward"
    mixture_share: float | None = None
    temperature: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    top_k: int | None = None
    chunk_bytes: int | None = None
    matmul_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        FORMS.check(self.form)
        assert self.temperature > 0 and 0 <= self.ce_weight <= 1 and self.hidden_weight >= 0
        assert self.mixture_share is None or 0 < self.mixture_share < 1
        assert self.top_k is None or self.top_k > 0

    def chunk_rows(self, vocabulary: int, dtype: torch.dtype, *, on_cpu: bool) -> int:
        """Rows whose logits are held at once."""
        bytes_per_row = (FORMS[self.form].num_buffers + (self.ce_weight > 0)) * vocabulary * dtype.itemsize
        if self.chunk_bytes is not None:
            return max(1, self.chunk_bytes // bytes_per_row)
        if on_cpu:
            return max(CPU_CHUNK_ROWS, CPU_CHUNK_BYTES // bytes_per_row)
        return max(1, ACCELERATOR_CHUNK_BYTES // bytes_per_row)


class LossTerms(NamedTuple):
    """Scalars, each a sum over rows divided by the denominator; only ``loss`` carries a gradient.

    ``kl`` is the divergence in nats at the temperature of the settings, without the factor temperature**2;
    ``cross_entropy`` is 0 where its weight is 0.
    """

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor


@dataclass(frozen=True, kw_only=True)
class TopKTargets:
    """A teacher's distribution by its K likeliest tokens and the mass of all others, at one temperature.

    Shapes: ``token_ids`` int64 ``[rows, K]``, likeliest first; ``log_p`` ``[rows, K + 1]``, the last outcome is
    all other tokens below ``vocabulary``; each row sums to one.
    """

    token_ids: Tensor
    log_p: Tensor
    vocabulary: int
    temperature: float

    def rows(self, rows: slice | Tensor) -> TopKTargets:
        """Some of the rows."""
        return TopKTargets(
            token_ids=self.token_ids[rows],
            log_p=self.log_p[rows],
            vocabulary=self.vocabulary,
            temperature=self.temperature,
        )


def chunked_kl(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_head_VG: Tensor,
    *,
    denominator: float,
    labels_N: Tensor | None = None,
    settings: LossSettings | None = None,
) -> LossTerms:
    """Divergence of the teacher's next-token distribution from the student's, with an optional label loss.

    Rows whose label is IGNORE do not count and are dropped before any product; without ``labels_N`` all rows count.
    ``denominator`` is the number of rows of the whole optimiser step, over all micro-batches and processes, so that
    partial losses add up to the mean. Gradients flow to the student's hidden states and head. Where one head has more
    rows, these are padding of the vocabulary (the caller made sure) and have no logits.

    Shapes: hidden states ``[rows, hidden]``, heads ``[vocabulary, hidden]``, labels ``[rows]``.
    Source: distillation on logits alone as in Minitron (arXiv 2407.14679, section 3); temperature after Hinton et al.
    (arXiv 1503.02531, section 2).
    """
    settings = settings or LossSettings()
    student_NH, labels_N, valid_N = _counted(student_hidden_NH, labels_N, settings)
    teacher_NG = (teacher_hidden_NG if valid_N is None else teacher_hidden_NG[valid_N]).detach()
    vocabulary = min(len(student_head_VH), len(teacher_head_VG))
    teacher = _TeacherHead(teacher_NG, teacher_head_VG.detach()[:vocabulary], settings, _wide_dtype(student_NH))
    return _divergence(student_NH, student_head_VH, teacher, labels_N, denominator, settings)


def chunked_topk_kl(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    targets: TopKTargets,
    *,
    denominator: float,
    labels_N: Tensor | None = None,
    settings: LossSettings | None = None,
) -> LossTerms:
    """The same from targets that were computed before, ``[rows]`` of them, at the temperature of the settings.

    The student's tokens outside the teacher's K are one outcome too, so no part of its mass goes unseen.
    """
    settings = settings or LossSettings()
    assert targets.temperature == settings.temperature, "the targets were computed at another temperature"
    student_NH, labels_N, valid_N = _counted(student_hidden_NH, labels_N, settings)
    teacher = _TeacherTargets(targets if valid_N is None else targets.rows(valid_N), _wide_dtype(student_NH))
    return _divergence(student_NH, student_head_VH, teacher, labels_N, denominator, settings)


def hidden_cosine_distance(
    student_hidden_NH: Tensor,
    teacher_hidden_NG: Tensor,
    *,
    denominator: float,
    labels_N: Tensor | None = None,
    kept_channels_H: Tensor | None = None,
) -> Tensor:
    """Sum over rows of 1 - cosine between what the two LM heads see, over ``denominator``.

    Where the hidden axis was cut, student channel i is compared with the teacher's channel ``kept_channels_H[i]``, the
    one it was; the teacher's other channels do not count. Without that list the two must be equally wide.
    """
    if kept_channels_H is not None:
        teacher_hidden_NG = teacher_hidden_NG[:, kept_channels_H]
    assert student_hidden_NH.shape == teacher_hidden_NG.shape, "widths differ: say which channels were kept"
    dtype = _wide_dtype(student_hidden_NH)
    student_NH, teacher_NH = student_hidden_NH.to(dtype), teacher_hidden_NG.detach().to(dtype)
    distance_N = 1 - F.cosine_similarity(student_NH, teacher_NH, dim=-1)
    if labels_N is not None:
        distance_N = distance_N * (labels_N != IGNORE)
    return distance_N.sum() / denominator


@torch.no_grad()
def topk_targets(
    teacher_hidden_NG: Tensor,
    teacher_head_VG: Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> TopKTargets:
    """The K likeliest tokens of every row and the mass of all others, in chunks of rows."""
    settings = LossSettings(temperature=temperature, top_k=top_k, chunk_bytes=chunk_bytes, matmul_dtype=matmul_dtype)
    dtype = _wide_dtype(teacher_hidden_NG)
    teacher = _TeacherHead(teacher_hidden_NG, teacher_head_VG, settings, dtype)
    chunk_rows = settings.chunk_rows(len(teacher_head_VG), dtype, on_cpu=teacher_hidden_NG.is_cpu)
    buffers = ChunkBuffers(min(chunk_rows, len(teacher_hidden_NG)), len(teacher_head_VG), teacher_hidden_NG, dtype)
    parts = [teacher.coarse(rows, buffers) for rows in _chunks(len(teacher_hidden_NG), chunk_rows)]
    return TopKTargets(
        token_ids=torch.cat([token_ids_CK for token_ids_CK, _ in parts]),
        log_p=torch.cat([log_p_CR for _, log_p_CR in parts]),
        vocabulary=len(teacher_head_VG),
        temperature=temperature,
    )


class _TeacherHead:
    """Teacher's distributions from hidden states and a head, a chunk at a time."""

    def __init__(self, hidden_NG: Tensor, head_VG: Tensor, settings: LossSettings, dtype: torch.dtype) -> None:
        self.hidden_NG, self.head_VG = _matmul_operands(hidden_NG, head_VG, settings, dtype)
        self.vocabulary = len(head_VG)
        self._temperature, self._dtype = settings.temperature, dtype
        self._top_k = None if settings.top_k is None else min(settings.top_k, self.vocabulary)

    def all_tokens(self, rows: slice, buffers: ChunkBuffers) -> Distribution:
        """Over the whole vocabulary."""
        hidden_CG = self.hidden_NG[rows]
        logits_CV, p_CV = (buffers.get(name, len(hidden_CG)) for name in ("teacher logits", "teacher"))
        logits_CV = _product(hidden_CG, self.head_VG.T, self._dtype, out=logits_CV)
        return softmax_(logits_CV.div_(self._temperature), p_CV)

    def coarse(self, rows: slice, buffers: ChunkBuffers) -> tuple[Tensor, Tensor]:
        """Token ids ``[C, K]`` and ``[C, K + 1]`` log-probabilities."""
        assert self._top_k is not None
        p = self.all_tokens(rows, buffers)
        token_ids_CK = p.log.topk(self._top_k, dim=-1).indices
        return token_ids_CK, coarsen(p, token_ids_CK).log_q

    def targets(self, rows: slice, buffers: ChunkBuffers) -> tuple[Tensor | None, Distribution]:
        """Token ids (None: all), and the distribution over the outcomes."""
        if self._top_k is None:
            return None, self.all_tokens(rows, buffers)
        token_ids_CK, log_p_CR = self.coarse(rows, buffers)
        return token_ids_CK, Distribution(log_p_CR, log_p_CR.exp())


class _TeacherTargets:
    """Teacher's distributions that are known already."""

    def __init__(self, targets: TopKTargets, dtype: torch.dtype) -> None:
        self.vocabulary = targets.vocabulary
        self._targets, self._dtype = targets, dtype

    def targets(self, rows: slice, _buffers: ChunkBuffers) -> tuple[Tensor | None, Distribution]:
        """Token ids, and a copy of the distribution that may be overwritten."""
        log_p_CR = self._targets.log_p[rows].to(self._dtype, copy=True)
        return self._targets.token_ids[rows], Distribution(log_p_CR, log_p_CR.exp())


_Teacher = _TeacherHead | _TeacherTargets


def _counted(
    student_NH: Tensor, labels_N: Tensor | None, settings: LossSettings
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Student's rows and labels that count, and which these are (None: all)."""
    assert labels_N is not None or settings.ce_weight == 0, "cross-entropy needs labels"
    if labels_N is None or bool((valid_N := labels_N != IGNORE).all()):
        return student_NH, labels_N, None
    return student_NH[valid_N], labels_N[valid_N], valid_N


def _divergence(
    student_NH: Tensor,
    head_VH: Tensor,
    teacher: _Teacher,
    labels_N: Tensor | None,
    denominator: float,
    settings: LossSettings,
) -> LossTerms:
    assert teacher.vocabulary <= len(head_VH), "the student knows fewer tokens than the teacher's targets"
    # Whether a gradient is wanted at all is not visible inside the function: there it is always switched off.
    want_gradient = torch.is_grad_enabled()
    return LossTerms(
        *_ChunkedKL.apply(  # type: ignore[no-untyped-call]
            student_NH, head_VH, teacher, labels_N, denominator, settings, want_gradient
        )
    )


class _ChunkedKL(torch.autograd.Function):
    """Computes the gradients together with the loss: the logits are at hand only then."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_NH: Tensor,
        student_head_VH: Tensor,
        teacher: _Teacher,
        labels_N: Tensor | None,
        denominator: float,
        settings: LossSettings,
        want_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _wide_dtype(student_hidden_NH)
        known_head_VH = student_head_VH[: teacher.vocabulary]
        hidden_NH, head_VH = _matmul_operands(student_hidden_NH, known_head_VH, settings, dtype)
        want_hidden, want_head = (want_gradient and wanted for wanted in ctx.needs_input_grad[:2])
        hidden_gradient_NH = torch.zeros_like(hidden_NH, dtype=dtype) if want_hidden else None
        head_gradient_VH = torch.zeros_like(student_head_VH, dtype=dtype) if want_head else None
        kl = ce = torch.zeros((), dtype=dtype, device=hidden_NH.device)
        chunk_rows = settings.chunk_rows(len(head_VH), dtype, on_cpu=hidden_NH.is_cpu)
        buffers = ChunkBuffers(min(chunk_rows, len(hidden_NH)), len(head_VH), hidden_NH, dtype)
        for rows in _chunks(len(hidden_NH), chunk_rows):
            hidden_CH = hidden_NH[rows]
            logits_CV = _product(hidden_CH, head_VH.T, dtype, out=buffers.get("student logits", len(hidden_CH)))
            labels_C = None if labels_N is None else labels_N[rows]
            chunk_kl, chunk_ce, gradient_CV = _chunk_terms(logits_CV, teacher, rows, labels_C, settings, buffers)
            kl, ce = kl + chunk_kl, ce + chunk_ce
            gradient_CV = gradient_CV.to(hidden_NH.dtype)
            if hidden_gradient_NH is not None:
                hidden_gradient_NH[rows] = _product(gradient_CV, head_VH, dtype)
            if head_gradient_VH is not None:
                _add_product(head_gradient_VH[: len(head_VH)], gradient_CV.T, hidden_CH)
        for gradient in (hidden_gradient_NH, head_gradient_VH):
            if gradient is not None:
                gradient.div_(denominator)
        ctx.gradients = (hidden_gradient_NH, head_gradient_VH)
        ctx.input_dtypes = (student_hidden_NH.dtype, student_head_VH.dtype)
        kl, ce = kl / denominator, ce / denominator
        loss = (1 - settings.ce_weight) * settings.temperature**2 * kl + settings.ce_weight * ce
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # freed as soon as autograd has used them
        assert gradients is not None, "the loss can be differentiated once"
        inputs = (
            None if gradient is None else gradient.mul_(output_gradients[0]).to(dtype)
            for gradient, dtype in zip(gradients, ctx.input_dtypes, strict=True)
        )
        return (*inputs, None, None, None, None, None)


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, start + chunk_rows)


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _matmul_operands(
    hidden_NH: Tensor, head_VH: Tensor, settings: LossSettings, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    operand_dtype = settings.matmul_dtype or hidden_NH.dtype
    hidden_NH, head_VH = hidden_NH.to(operand_dtype), head_VH.to(operand_dtype)
    return (hidden_NH, head_VH) if Device.of(hidden_NH).widens_products else (hidden_NH.to(dtype), head_VH.to(dtype))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The product in ``dtype``; ``out``: memory that it may take."""
    # Only CUDA has low-precision operands with a float32 result; elsewhere the operands were widened.
    return torch.mm(left, right, out=out) if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))


def _chunk_terms(
    logits_CV: Tensor,
    teacher: _Teacher,
    rows: slice,
    labels_C: Tensor | None,
    settings: LossSettings,
    buffers: ChunkBuffers,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of divergence and cross-entropy over one chunk, and the gradient of the mixed loss by the logits."""
    ce_weight, form = settings.ce_weight, FORMS[settings.form]
    ce, ce_gradient_CV = logits_CV.new_zeros(()), None
    q_CV = buffers.get("student", len(logits_CV))
    if ce_weight and labels_C is not None:
        plain = softmax_(q_CV.copy_(logits_CV), buffers.get("labels", len(logits_CV)))
        label_C1 = labels_C[:, None]
        ce = -plain.log.gather(1, label_C1).sum()
        ce_gradient_CV = plain.probability.scatter_add_(1, label_C1, -torch.ones_like(label_C1, dtype=q_CV.dtype))
    q = softmax_(logits_CV.div_(settings.temperature), q_CV)
    token_ids_CK, p = teacher.targets(rows, buffers)
    share = form.default_share if settings.mixture_share is None else settings.mixture_share
    if token_ids_CK is None:
        nats, gradient_CV = form.measure(p, q, share)
    else:
        coarse = coarsen(q, token_ids_CK)
        log_rest_C1 = coarse.log_q[:, -1:].clone()
        nats, gradient_CR = form.measure(p, Distribution(coarse.log_q, coarse.log_q.exp()), share)
        gradient_CV = refine_gradient(gradient_CR, log_rest_C1, coarse.log_others, token_ids_CK)
    scale = (1 - ce_weight) * settings.temperature  # temperature**2 from the loss, 1 / temperature from the softmax
    if scale != 1:
        gradient_CV.mul_(scale)
    if ce_gradient_CV is not None:
        gradient_CV.add_(ce_gradient_CV, alpha=ce_weight)
    return nats, ce, gradient_CV
