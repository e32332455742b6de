"""How far apart two models are, from what their LM heads see: sums over tokens, gathered chunk by chunk.

Logits exist for one chunk of tokens of one stream at a time, and for the full model beside it; they are float32 (or
float64, if the hidden states are), and sums over tokens are float64.

Shape suffixes: S streams (one a removed layer), T tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from minipuzzle.corpus import IGNORE
from minipuzzle.scores import LAYER_METRICS

LOGIT_BUFFERS = 6  # of [chunk, vocabulary] in float32, alive at once at the worst moment
MAX_BUFFER_BYTES = 2**30  # for all of them; larger chunks are no faster
MIN_CHUNK_TOKENS = 16
MAX_RISE = 40.0  # nats by which a log-probability may rise before its token is treated as a large change
SUMS = ("squared_difference", "cosine_distance", "kl", "loss_rise")
_COUNTS = ("num_tokens", "_num_labels", "_num_elements", "_full_energy")


def chunk_tokens(vocabulary: int, num_tokens: int, memory_bytes: int) -> int:
    """Tokens a chunk, so that the logits take little of the memory given."""
    buffer_bytes = min(MAX_BUFFER_BYTES, memory_bytes // 16)
    return min(num_tokens, max(MIN_CHUNK_TOKENS, buffer_bytes // (LOGIT_BUFFERS * vocabulary * 4)))


def logit_bytes(vocabulary: int, num_chunk_tokens: int) -> int:
    """Memory that one chunk takes at the worst moment."""
    return LOGIT_BUFFERS * num_chunk_tokens * vocabulary * 4


def next_token_labels(token_ids: torch.Tensor) -> torch.Tensor:
    """The token after each, along the last dimension; the last one of a window predicts nothing."""
    labels = torch.full_like(token_ids, IGNORE)
    labels[..., :-1] = token_ids[..., 1:]
    return labels


class HeadInputMetrics:
    """Sums of all metrics between a full model and several altered ones, over as many tokens as are given."""

    def __init__(self, num_streams: int) -> None:
        self._sums_MS = torch.zeros(len(SUMS), num_streams, dtype=torch.float64)
        self._full_energy = 0.0
        self._num_labels = 0
        self._num_elements = 0  # of the hidden states
        self.num_tokens = 0

    def to_record(self) -> dict[str, Any]:
        """The sums as JSON values, exactly."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "sums": dict(zip(SUMS, self._sums_MS.tolist(), strict=True))}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> HeadInputMetrics:
        """The sums that ``to_record`` gave, to be continued."""
        sums_MS = torch.tensor([record["sums"][name] for name in SUMS], dtype=torch.float64)
        metrics = cls(sums_MS.shape[1])
        metrics._sums_MS = sums_MS
        for name in _COUNTS:
            setattr(metrics, name, record[name])
        return metrics

    @torch.no_grad()
    def add(
        self, full_CH: torch.Tensor, altered_SCH: torch.Tensor, head_VH: torch.Tensor, labels_C: torch.Tensor
    ) -> None:
        """Add one chunk of tokens. Hidden states are those after the final norm; a label may be IGNORE."""
        precision = torch.promote_types(full_CH.dtype, torch.float32)
        full_logprob_CV = _logits(full_CH, head_VH).log_softmax(-1)
        full_prob_CV = full_logprob_CV.exp()
        full_wide_CH = full_CH.to(precision)
        token_sums = []
        for altered_CH in altered_SCH:
            altered_wide_CH = altered_CH.to(precision)
            rise_CV = _logits(altered_CH, head_VH).log_softmax(-1).sub_(full_logprob_CV)
            per_token = (
                (altered_wide_CH - full_wide_CH).square().sum(-1),
                _cosine_distance(full_wide_CH, altered_wide_CH),
                _forward_kl(full_prob_CV, rise_CV),
                _loss_rise(rise_CV, labels_C),
            )
            token_sums.append(torch.stack(per_token))
        self._sums_MS += torch.stack(token_sums, dim=1).cpu().double().sum(-1)
        self._full_energy += full_wide_CH.square().sum(-1).cpu().double().sum().item()
        self.num_tokens += len(full_CH)
        self._num_labels += int((labels_C != IGNORE).sum())
        self._num_elements += full_CH.numel()

    def result(self) -> dict[str, NDArray[np.float64]]:
        """Every metric of LAYER_METRICS for each stream."""
        sums = dict(zip(SUMS, self._sums_MS.numpy(), strict=True))
        metrics = {
            "mse": sums["squared_difference"] / self._num_elements,
            "nmse": sums["squared_difference"] / self._full_energy,
            "cosine": sums["cosine_distance"] / self.num_tokens,
            "kl": sums["kl"] / self.num_tokens,
            "delta_loss": sums["loss_rise"] / max(1, self._num_labels),
        }
        assert metrics.keys() == LAYER_METRICS.keys()
        return metrics


def _logits(hidden_CH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least: rounding them to bfloat16 would drown small divergences."""
    if hidden_CH.dtype in (torch.float32, torch.float64):
        return F.linear(hidden_CH, head_VH)
    if hidden_CH.is_cuda:
        return torch.mm(hidden_CH, head_VH.T, out_dtype=torch.float32)
    return F.linear(hidden_CH.float(), head_VH.float())


def _cosine_distance(first_CH: torch.Tensor, second_CH: torch.Tensor) -> torch.Tensor:
    """1 - cos, as half the squared distance of the unit vectors, which does not cancel where they nearly agree."""
    return (F.normalize(first_CH, dim=-1) - F.normalize(second_CH, dim=-1)).square().sum(-1) / 2


def _forward_kl(full_prob_CV: torch.Tensor, rise_CV: torch.Tensor) -> torch.Tensor:
    """KL(full || altered) of each token, from the rise d of the log-probabilities.

    sum p (-d) equals sum p (exp(d) - 1 - d), since the altered probabilities p exp(d) also add up to one. The terms
    of the second form are never negative: nothing cancels, and small divergences keep their digits. Tokens at which
    exp(d) could leave the range of float32 take the first form.
    """
    terms_CV = rise_CV.clamp(max=MAX_RISE).expm1_().sub_(rise_CV)
    small_C = torch.linalg.vecdot(full_prob_CV, terms_CV)
    large_C = -torch.linalg.vecdot(full_prob_CV, rise_CV)
    return torch.where(rise_CV.amax(-1) < MAX_RISE, small_C, large_C)


def _loss_rise(rise_CV: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
    has_label_C = labels_C != IGNORE
    at_label_C = rise_CV.gather(-1, labels_C.clamp(min=0)[:, None])[:, 0]
    return torch.where(has_label_C, -at_label_C, torch.zeros_like(at_label_C))
