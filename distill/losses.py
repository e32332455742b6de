"""The distillation loss from hidden states and LM heads, in chunks of rows, with its gradient in closed form.

``[rows, vocabulary]`` never exists whole: each chunk of logits is turned into its share of the loss and of the
gradients and then forgotten. Logits and sums are float32 (float64 for float64 inputs) whatever the inputs are, because
logits rounded to bfloat16 spoil the gradient once student and teacher are close.

Shape suffixes: N rows (tokens), C rows of one chunk, V vocabulary, H student's hidden size, G teacher's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minipuzzle.corpus import IGNORE
from minipuzzle.units import MIB

# Small chunks stay in a CPU's caches; a GPU needs enough rows to keep its matrix units busy.
CPU_CHUNK_BYTES = 16 * MIB
ACCELERATOR_CHUNK_BYTES = 1024 * MIB
_BUFFERS_PER_CHUNK = 4  # student, teacher, one of them as probabilities, and one in passing


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised: (1 - ce_weight) * temperature**2 * KL(teacher || student) + ce_weight * cross-entropy.

    The factor temperature**2 keeps the size of the gradient when the temperature changes. ``chunk_bytes`` bounds the
    working memory (None: by device). ``matmul_dtype`` casts the operands of the head products (None: as given).
    """

    temperature: float = 1.0
    ce_weight: float = 0.0
    chunk_bytes: int | None = None
    matmul_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        assert self.temperature > 0 and 0 <= self.ce_weight <= 1

    def chunk_rows(self, vocabulary: int, device: torch.device, dtype: torch.dtype) -> int:
        """Rows whose logits are held at once."""
        by_device = CPU_CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
        bytes_per_row = _BUFFERS_PER_CHUNK * vocabulary * dtype.itemsize
        return max(1, (self.chunk_bytes or by_device) // bytes_per_row)


class LossTerms(NamedTuple):
    """Scalars, each a sum over rows divided by the denominator; only ``loss`` carries a gradient.

    ``kl`` is in nats at the temperature of the settings, without the factor temperature**2; ``cross_entropy`` is 0
    where its weight is 0.
    """

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor


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
    """Forward KL of the teacher's next-token distribution from the student's, with an optional label loss.

    Rows whose label is IGNORE do not count and are dropped before any product; without ``labels_N`` all rows count.
    ``denominator`` is the number of rows of the whole optimiser step, over all micro-batches and processes, so that
    partial losses add up to the mean. Gradients flow to the student's hidden states and head.

    Shapes: hidden states ``[rows, hidden]``, heads ``[vocabulary, hidden]``, labels ``[rows]``.
    Source: distillation on logits alone as in Minitron (arXiv 2407.14679, section 3); temperature after Hinton et al.
    (arXiv 1503.02531, section 2).
    """
    settings = settings or LossSettings()
    assert student_head_VH.shape[0] == teacher_head_VG.shape[0], "vocabularies differ"
    assert labels_N is not None or settings.ce_weight == 0, "cross-entropy needs labels"
    if labels_N is not None:
        valid_N = labels_N != IGNORE
        if not bool(valid_N.all()):
            student_hidden_NH, teacher_hidden_NG = student_hidden_NH[valid_N], teacher_hidden_NG[valid_N]
            labels_N = labels_N[valid_N]
    # Whether a gradient is wanted at all is not visible inside the function: there it is always switched off.
    want_gradient = torch.is_grad_enabled()
    loss, kl, cross_entropy = _ChunkedKL.apply(  # type: ignore[no-untyped-call]
        student_hidden_NH,
        student_head_VH,
        teacher_hidden_NG.detach(),
        teacher_head_VG.detach(),
        labels_N,
        denominator,
        settings,
        want_gradient,
    )
    return LossTerms(loss, kl, cross_entropy)


class _ChunkedKL(torch.autograd.Function):
    """Computes the gradients together with the loss: the logits are at hand only then."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_NH: Tensor,
        student_head_VH: Tensor,
        teacher_hidden_NG: Tensor,
        teacher_head_VG: Tensor,
        labels_N: Tensor | None,
        denominator: float,
        settings: LossSettings,
        want_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if student_hidden_NH.dtype == torch.float64 else torch.float32
        hidden_NH, head_VH = _matmul_operands(student_hidden_NH, student_head_VH, settings, dtype)
        teacher_NG, teacher_VG = _matmul_operands(teacher_hidden_NG, teacher_head_VG, settings, dtype)
        want_hidden, want_head = (want_gradient and wanted for wanted in ctx.needs_input_grad[:2])
        hidden_gradient_NH = torch.zeros_like(hidden_NH, dtype=dtype) if want_hidden else None
        head_gradient_VH = torch.zeros_like(head_VH, dtype=dtype) if want_head else None
        kl = ce = torch.zeros((), dtype=dtype, device=hidden_NH.device)
        num_rows, chunk_rows = len(hidden_NH), settings.chunk_rows(len(head_VH), hidden_NH.device, dtype)
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk_kl, chunk_ce, gradient_CV = _chunk_terms(
                _product(hidden_NH[rows], head_VH.T, dtype),
                _product(teacher_NG[rows], teacher_VG.T, dtype),
                None if labels_N is None else labels_N[rows],
                settings,
            )
            kl, ce = kl + chunk_kl, ce + chunk_ce
            gradient_CV = gradient_CV.to(hidden_NH.dtype)
            if hidden_gradient_NH is not None:
                hidden_gradient_NH[rows] = _product(gradient_CV, head_VH, dtype)
            if head_gradient_VH is not None:
                _add_product(head_gradient_VH, gradient_CV.T, hidden_NH[rows])
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
        return (*inputs, None, None, None, None, None, None)


def _matmul_operands(
    hidden_NH: Tensor, head_VH: Tensor, settings: LossSettings, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    operand_dtype = settings.matmul_dtype or hidden_NH.dtype
    hidden_NH, head_VH = hidden_NH.to(operand_dtype), head_VH.to(operand_dtype)
    if hidden_NH.is_cuda:
        return hidden_NH, head_VH
    return hidden_NH.to(dtype), head_VH.to(dtype)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    # Only CUDA has low-precision operands with a float32 result; elsewhere the operands were widened.
    return left @ right if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))


def _chunk_terms(
    student_logits_CV: Tensor, teacher_logits_CV: Tensor, labels_C: Tensor | None, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of KL and cross-entropy over one chunk, and the gradient of the mixed loss by the student's logits."""
    temperature, ce_weight = settings.temperature, settings.ce_weight
    ce, ce_gradient_CV = student_logits_CV.new_zeros(()), None
    if ce_weight and labels_C is not None:
        log_q_CV = student_logits_CV.log_softmax(-1)
        label_C1 = labels_C[:, None]
        ce = -log_q_CV.gather(1, label_C1).sum()
        ce_gradient_CV = log_q_CV.exp_().scatter_add_(1, label_C1, -torch.ones_like(label_C1, dtype=log_q_CV.dtype))
    if temperature != 1:
        student_logits_CV, teacher_logits_CV = student_logits_CV / temperature, teacher_logits_CV / temperature
    log_q_CV = student_logits_CV.log_softmax(-1)
    log_p_CV = teacher_logits_CV.log_softmax(-1)
    p_CV = log_p_CV.exp()
    kl = torch.linalg.vecdot(p_CV, log_p_CV.sub_(log_q_CV)).sum()
    gradient_CV = log_q_CV.exp_().sub_(p_CV)
    scale = (1 - ce_weight) * temperature  # temperature**2 from the loss, 1 / temperature from the softmax
    if scale != 1:
        gradient_CV.mul_(scale)
    if ce_gradient_CV is not None:
        gradient_CV.add_(ce_gradient_CV, alpha=ce_weight)
    return kl, ce, gradient_CV
