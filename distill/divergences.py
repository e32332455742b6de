"""Distances between two next-token distributions, with their gradients in closed form.

Every form is a function of log-probabilities: teacher p, student q, both over the same outcomes. Those may be a whole
vocabulary, or the teacher's K likeliest tokens and one outcome more for all the rest.

Shape suffixes: C rows of a chunk, V outcomes (tokens of the vocabulary), K likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Log-probability of an outcome that cannot be: far below any real one, and finite, so that 0 x log 0 is 0.
LOG_ZERO = -1e4


class Divergence(NamedTuple):
    """Nats summed over rows, and the gradient ``[C, V]`` by the student's logits over the temperature."""

    nats: Tensor
    gradient: Tensor


def forward_kl(log_p_CV: Tensor, log_q_CV: Tensor, _share: float) -> Divergence:
    """KL(p || q): the student covers all that the teacher may say. Overwrites both arguments."""
    p_CV = log_p_CV.exp()
    nats = torch.linalg.vecdot(p_CV, log_p_CV.sub_(log_q_CV)).sum()
    return Divergence(nats, log_q_CV.exp_().sub_(p_CV))


def reverse_kl(log_p_CV: Tensor, log_q_CV: Tensor, _share: float) -> Divergence:
    """KL(q || p): the student says nothing that the teacher would not. Overwrites both arguments.

    Source: MiniLLM (arXiv 2306.08543), here on given text instead of the student's own.
    """
    log_ratio_CV = torch.sub(log_q_CV, log_p_CV, out=log_p_CV)
    q_CV = log_q_CV.exp_()
    nats_C1 = torch.linalg.vecdot(q_CV, log_ratio_CV)[:, None]
    return Divergence(nats_C1.sum(), log_ratio_CV.sub_(nats_C1).mul_(q_CV))


def jensen_shannon(log_p_CV: Tensor, log_q_CV: Tensor, share: float) -> Divergence:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q and b = ``share``. Overwrites both arguments.

    Source: generalised knowledge distillation (arXiv 2306.13649).
    """
    log_m_CV = _log_mixture(log_p_CV, log_q_CV, share)
    log_p_over_m_CV = log_p_CV - log_m_CV
    nats = share * torch.linalg.vecdot(log_p_CV.exp_(), log_p_over_m_CV).sum()
    log_q_over_m_CV = torch.sub(log_q_CV, log_m_CV, out=log_m_CV)
    q_CV = log_q_CV.exp_()
    by_q_CV = log_q_over_m_CV.mul_(1 - share)
    return Divergence(nats + torch.linalg.vecdot(q_CV, by_q_CV).sum(), _through_softmax(q_CV, by_q_CV))


def skewed_kl(log_p_CV: Tensor, log_q_CV: Tensor, share: float) -> Divergence:
    """KL(p || m) with m = a p + (1 - a) q and a = ``share``: forward, with bounded gradients. Overwrites both.

    Source: DistiLLM (arXiv 2402.03898).
    """
    log_m_CV = _log_mixture(log_p_CV, log_q_CV, share)
    log_p_over_m_CV = torch.sub(log_p_CV, log_m_CV, out=log_m_CV)
    nats = torch.linalg.vecdot(log_p_CV.exp_(), log_p_over_m_CV).sum()
    by_q_CV = log_p_over_m_CV.exp_().mul_(share - 1)
    return Divergence(nats, _through_softmax(log_q_CV.exp_(), by_q_CV))


def reverse_skewed_kl(log_p_CV: Tensor, log_q_CV: Tensor, share: float) -> Divergence:
    """KL(q || m) with m = a q + (1 - a) p and a = ``share``. Overwrites both arguments.

    Source: DistiLLM (arXiv 2402.03898).
    """
    log_m_CV = _log_mixture(log_q_CV, log_p_CV, share)
    log_q_over_m_CV = torch.sub(log_q_CV, log_m_CV, out=log_m_CV)
    q_CV = log_q_CV.exp_()
    nats = torch.linalg.vecdot(q_CV, log_q_over_m_CV).sum()
    # The derivative by q but for its constant term, which the softmax takes away.
    by_q_CV = log_q_over_m_CV.sub_(torch.exp(log_q_over_m_CV, out=log_p_CV), alpha=share)
    return Divergence(nats, _through_softmax(q_CV, by_q_CV))


class Form(NamedTuple):
    """How to compare, the share of the first distribution in a mixture, and ``[C, V]`` buffers alive at once."""

    measure: Callable[[Tensor, Tensor, float], Divergence]
    default_share: float
    num_buffers: int


FORMS: dict[str, Form] = {
    "forward": Form(forward_kl, 0.0, 4),
    "reverse": Form(reverse_kl, 0.0, 4),
    "jsd": Form(jensen_shannon, 0.5, 5),
    "skewed": Form(skewed_kl, 0.1, 5),
    "reverse-skewed": Form(reverse_skewed_kl, 0.1, 5),
}


def _log_mixture(log_first_CV: Tensor, log_second_CV: Tensor, share: float) -> Tensor:
    first_CV, second_CV = log_first_CV + math.log(share), log_second_CV + math.log1p(-share)
    return torch.logaddexp(first_CV, second_CV, out=first_CV)


def _through_softmax(q_CV: Tensor, by_q_CV: Tensor) -> Tensor:
    """The gradient by logits from the derivative by their softmax. Overwrites ``by_q_CV``."""
    return by_q_CV.sub_(torch.linalg.vecdot(q_CV, by_q_CV)[:, None]).mul_(q_CV)


class CoarseStudent(NamedTuple):
    """A student's distribution over the teacher's K likeliest tokens and one outcome for all others.

    Shapes: ``log_q`` ``[rows, K + 1]``; ``log_others`` ``[rows, vocabulary]``, -inf at the K tokens.
    """

    log_q: Tensor
    log_others: Tensor


def coarsen(log_q_CV: Tensor, token_ids_CK: Tensor) -> CoarseStudent:
    """Gather all but K tokens into one outcome. Overwrites ``log_q_CV``."""
    log_top_CK = log_q_CV.gather(1, token_ids_CK)
    log_others_CV = log_q_CV.scatter_(1, token_ids_CK, -torch.inf)
    log_rest_C1 = log_others_CV.logsumexp(1, keepdim=True).clamp_min_(LOG_ZERO)
    return CoarseStudent(torch.cat([log_top_CK, log_rest_C1], 1), log_others_CV)


def refine_gradient(gradient_CR: Tensor, log_rest_C1: Tensor, log_others_CV: Tensor, token_ids_CK: Tensor) -> Tensor:
    """The gradient by all logits from that by K + 1 outcomes: each of the others bears its share of the last one."""
    gradient_CV = log_others_CV.sub_(log_rest_C1).exp_().mul_(gradient_CR[:, -1:])
    return gradient_CV.scatter_(1, token_ids_CK, gradient_CR[:, :-1])
