"""Distances between two next-token distributions, with their gradients in closed form.

Every form is a function of two distributions over the same outcomes: teacher p, student q. Outcomes may be a whole
vocabulary, or the teacher's K likeliest tokens and one outcome more for all the rest.

Shape suffixes: C rows of a chunk, V outcomes (tokens of the vocabulary), K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

# Log-probability of an outcome that cannot be: far below any real one, and finite, so that 0 x log 0 is 0.
LOG_ZERO = -1e4


class Distribution(NamedTuple):
    """``[C, V]`` log-probabilities, and the probabilities themselves: together they cost one exponential."""

    log: Tensor
    probability: Tensor


class Divergence(NamedTuple):
    """Nats summed over rows, and the gradient ``[C, V]`` by the student's logits over the temperature."""

    nats: Tensor
    gradient: Tensor


class ChunkBuffers:
    """``[C, V]`` tensors by name that every chunk uses again: fresh memory costs a CPU more than what is done in it."""

    def __init__(self, num_rows: int, vocabulary: int, like: Tensor, dtype: torch.dtype) -> None:
        self._new = partial(torch.empty, num_rows, vocabulary, dtype=dtype, device=like.device)
        self._tensors: dict[str, Tensor] = {}

    def get(self, name: str, num_rows: int) -> Tensor:
        """Its first rows, with whatever was left there."""
        if name not in self._tensors:
            self._tensors[name] = self._new()
        return self._tensors[name][:num_rows]


def softmax_(logits_CV: Tensor, out_CV: Tensor | None = None) -> Distribution:
    """The distribution of logits, which are overwritten; its probabilities go to ``out_CV``."""
    logits_CV.sub_(logits_CV.amax(-1, keepdim=True))
    p_CV = torch.exp(logits_CV, out=out_CV)
    sum_C1 = p_CV.sum(-1, keepdim=True)
    return Distribution(logits_CV.sub_(sum_C1.log()), p_CV.div_(sum_C1))


def forward_kl(p: Distribution, q: Distribution, _share: float) -> Divergence:
    """KL(p || q): the student covers all that the teacher may say. Overwrites both arguments."""
    nats = p.log.sub_(q.log).mul_(p.probability).sum()
    return Divergence(nats, q.probability.sub_(p.probability))


def reverse_kl(p: Distribution, q: Distribution, _share: float) -> Divergence:
    """KL(q || p): the student says nothing that the teacher would not. Overwrites both arguments.

    Source: MiniLLM (arXiv 2306.08543), here on given text instead of the student's own.
    """
    log_ratio_CV = q.log.sub_(p.log)
    nats_C1 = _row_products(q.probability, log_ratio_CV, out=p.log)
    return Divergence(nats_C1.sum(), log_ratio_CV.sub_(nats_C1).mul_(q.probability))


def jensen_shannon(p: Distribution, q: Distribution, share: float) -> Divergence:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q and b = ``share``. Overwrites both arguments.

    Source: generalised knowledge distillation (arXiv 2306.13649).
    """
    log_m_CV = _log_mixture(p, q, share)
    nats = share * p.log.sub_(log_m_CV).mul_(p.probability).sum()
    by_q_CV = q.log.sub_(log_m_CV).mul_(1 - share)
    mean_C1 = _row_products(q.probability, by_q_CV, out=p.log)
    return Divergence(nats + mean_C1.sum(), by_q_CV.sub_(mean_C1).mul_(q.probability))


def skewed_kl(p: Distribution, q: Distribution, share: float) -> Divergence:
    """KL(p || m) with m = a p + (1 - a) q and a = ``share``: forward, with bounded gradients. Overwrites both.

    Source: DistiLLM (arXiv 2402.03898).
    """
    log_p_over_m_CV = p.log.sub_(_log_mixture(p, q, share))
    nats = _row_products(p.probability, log_p_over_m_CV, out=p.probability).sum()
    by_q_CV = log_p_over_m_CV.exp_().mul_(share - 1)
    mean_C1 = _row_products(q.probability, by_q_CV, out=p.probability)
    return Divergence(nats, by_q_CV.sub_(mean_C1).mul_(q.probability))


def reverse_skewed_kl(p: Distribution, q: Distribution, share: float) -> Divergence:
    """KL(q || m) with m = a q + (1 - a) p and a = ``share``. Overwrites both arguments.

    Source: DistiLLM (arXiv 2402.03898).
    """
    log_q_over_m_CV = q.log.sub_(_log_mixture(q, p, share))
    nats = _row_products(q.probability, log_q_over_m_CV, out=p.log).sum()
    # The derivative by q but for its constant term, which the softmax takes away.
    by_q_CV = log_q_over_m_CV.sub_(torch.exp(log_q_over_m_CV, out=p.log), alpha=share)
    mean_C1 = _row_products(q.probability, by_q_CV, out=p.log)
    return Divergence(nats, by_q_CV.sub_(mean_C1).mul_(q.probability))


class Form(NamedTuple):
    """How to compare, the share of the first distribution in a mixture, and ``[C, V]`` buffers alive at once."""

    measure: Callable[[Distribution, Distribution, float], Divergence]
    default_share: float
    num_buffers: int


FORWARD = Form(forward_kl, 0.0, 4)
REVERSE = Form(reverse_kl, 0.0, 4)
JSD = Form(jensen_shannon, 0.5, 5)
SKEWED = Form(skewed_kl, 0.1, 5)
REVERSE_SKEWED = Form(reverse_skewed_kl, 0.1, 5)


def _log_mixture(first: Distribution, second: Distribution, share: float) -> Tensor:
    mixture_CV = (first.probability * share).add_(second.probability, alpha=1 - share)
    # Where both are too small for a number, their terms are 0 x log 0.
    return mixture_CV.clamp_min_(torch.finfo(mixture_CV.dtype).tiny).log_()


def _row_products(left_CV: Tensor, right_CV: Tensor, *, out: Tensor) -> Tensor:
    """Inner products of rows, ``[C, 1]``, without memory of their own as vecdot would take."""
    return torch.mul(left_CV, right_CV, out=out).sum(-1, keepdim=True)


class CoarseStudent(NamedTuple):
    """A student's distribution over the teacher's K likeliest tokens and one outcome for all others.

    Shapes: ``log_q`` ``[rows, K + 1]``; ``log_others`` ``[rows, vocabulary]``, -inf at the K tokens.
    """

    log_q: Tensor
    log_others: Tensor


def coarsen(q: Distribution, token_ids_CK: Tensor) -> CoarseStudent:
    """Gather all but K tokens into one outcome. Overwrites ``q``."""
    log_top_CK = q.log.gather(1, token_ids_CK)
    log_others_CV = q.log.scatter_(1, token_ids_CK, -torch.inf)
    largest_C1 = log_others_CV.amax(1, keepdim=True).clamp_min_(LOG_ZERO)  # there may be no others
    shares_CV = torch.sub(log_others_CV, largest_C1, out=q.probability).exp_()
    log_rest_C1 = shares_CV.sum(1, keepdim=True).log_().add_(largest_C1).clamp_min_(LOG_ZERO)
    return CoarseStudent(torch.cat([log_top_CK, log_rest_C1], 1), log_others_CV)


def refine_gradient(gradient_CR: Tensor, log_rest_C1: Tensor, log_others_CV: Tensor, token_ids_CK: Tensor) -> Tensor:
    """The gradient by all logits from that by K + 1 outcomes: each of the others bears its share of the last one."""
    gradient_CV = log_others_CV.sub_(log_rest_C1).exp_().mul_(gradient_CR[:, -1:])
    return gradient_CV.scatter_(1, token_ids_CK, gradient_CR[:, :-1])
