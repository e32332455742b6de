"""How far apart two models are, from what their LM heads see: sums over tokens, gathered chunk by chunk.

With z the logits of the full model, p its probabilities and d the change of the logits, everything about the next
token follows from three numbers a token: mu = sum p d, q = sum p (exp(d) - 1 - d), and d at the label. The KL is
log1p(mu + q) - mu and the rise of the loss log1p(mu + q) - d(label). Every term of q is positive and mu hardly counts
in the KL, so small divergences keep their digits; mu needs no logits, only the mean of the head's rows under p. The
full model's logits are computed once for all altered models, and those of an altered model are never normalised: their
change, head times change of the hidden state, exists in tiles that fit the CPU's caches. Logits are float32 (or
float64, if the hidden states are); sums over tokens are float64.

Shape suffixes: S streams (one an altered model), T tokens, C tokens of a chunk, H hidden, V vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from minipuzzle.cut.layer_metrics import LAYER_METRICS, LayerSums
from minipuzzle.data.windows import IGNORE
from minipuzzle.devices import Device
from minipuzzle.runtime.processes import Processes

LOGIT_BUFFERS = 3  # of [chunk, vocabulary] in float32, alive at once at the worst moment
STREAM_BUFFERS = 6  # of [streams, chunk, hidden], likewise
MAX_BUFFER_BYTES = 2**28  # for all of them; larger chunks are no faster
MIN_CHUNK_TOKENS = 16
# Of a tile, in float32: the CPU's is what its second-level cache holds, a GPU wants enough work for each kernel.
TILE_ELEMENTS_CPU, TILE_ELEMENTS = 2**18, 2**26
TILE_VOCABULARY_CPU = 1024
MIN_GROWTH = -0.9  # of sum p exp(d), which is 1 without a change; below, too few of its digits are left
SUMS = ("squared_difference", "cosine_distance", "kl", "loss_rise")
_COUNTS = ("num_tokens", "_num_labels", "_num_elements", "_full_energy")


def chunk_tokens(num_tokens: int, memory_bytes: int, *, num_streams: int, hidden: int, vocabulary: int) -> int:
    """Tokens a chunk, so that their logits and streams take little of the memory given."""
    buffer_bytes = min(MAX_BUFFER_BYTES, memory_bytes // 16)
    token_bytes = _token_bytes(num_streams=num_streams, hidden=hidden, vocabulary=vocabulary)
    return min(num_tokens, max(MIN_CHUNK_TOKENS, buffer_bytes // token_bytes))


def chunk_bytes(num_chunk_tokens: int, *, on_cpu: bool, num_streams: int, hidden: int, vocabulary: int) -> int:
    """Memory that one chunk takes at the worst moment: its tokens, a tile, and a tile's rows of the head."""
    token_bytes = _token_bytes(num_streams=num_streams, hidden=hidden, vocabulary=vocabulary)
    tile_tokens, tile_vocabulary = _tile_shape(num_streams, vocabulary, on_cpu=on_cpu)
    tile = 2 * min(tile_tokens, num_chunk_tokens) * num_streams * tile_vocabulary
    return num_chunk_tokens * token_bytes + 4 * (tile + tile_vocabulary * hidden)


def _token_bytes(*, num_streams: int, hidden: int, vocabulary: int) -> int:
    return 4 * (LOGIT_BUFFERS * vocabulary + STREAM_BUFFERS * (num_streams + 1) * hidden)


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

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """The sums, exactly, for a file."""
        return {"sums": self._sums_MS.numpy().copy(), "counts": np.array([float(getattr(self, n)) for n in _COUNTS])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float64]]) -> HeadInputMetrics:
        """The sums that ``to_arrays`` gave, to be continued."""
        metrics = cls(arrays["sums"].shape[1])
        metrics._sums_MS = torch.tensor(arrays["sums"])
        for name, count in zip(_COUNTS, arrays["counts"].tolist(), strict=True):
            setattr(metrics, name, type(getattr(metrics, name))(count))
        return metrics

    def summed_over(self, processes: Processes) -> HeadInputMetrics:
        """The sums of all processes together."""
        if processes.world_size == 1:
            return self
        arrays = self.to_arrays()
        return HeadInputMetrics.from_arrays(
            {name: processes.sum_(torch.from_numpy(arrays[name])).numpy() for name in sorted(arrays)}
        )

    @torch.no_grad()
    def add(
        self, full_CH: torch.Tensor, altered_SCH: torch.Tensor, head_VH: torch.Tensor, labels_C: torch.Tensor
    ) -> torch.Tensor:
        """Add one chunk of tokens; returns what was added, ``[len(SUMS), streams]``.

        Hidden states are those after the final norm; a label may be IGNORE.
        """
        precision = torch.promote_types(full_CH.dtype, torch.float32)
        full_wide_CH, altered_wide_SCH = full_CH.to(precision), altered_SCH.to(precision)
        difference_CSH = (altered_wide_SCH - full_wide_CH).transpose(0, 1).contiguous()
        log_rise_CS, mean_rise_CS = _LogitChanges(full_CH, altered_SCH, difference_CSH, head_VH).summarised()
        has_label_C = labels_C != IGNORE
        label_rows_CH = head_VH[labels_C.clamp(min=0)].to(precision)
        label_rise_CS = (difference_CSH @ label_rows_CH[:, :, None])[..., 0]
        per_token = (
            difference_CSH.square().sum(-1),
            _cosine_distance(full_wide_CH, altered_wide_SCH).T,
            log_rise_CS - mean_rise_CS,
            (log_rise_CS - label_rise_CS).where(has_label_C[:, None], 0),
        )
        added_MS = torch.stack([values_CS.double().sum(0).cpu() for values_CS in per_token])
        self._sums_MS += added_MS
        self._full_energy += full_wide_CH.square().sum(-1).cpu().double().sum().item()
        self.num_tokens += len(full_CH)
        self._num_labels += int(has_label_C.sum())
        self._num_elements += full_CH.numel()
        return added_MS

    def result(self) -> dict[str, NDArray[np.float64]]:
        """Every metric of LAYER_METRICS for each stream."""
        sums = LayerSums(
            **dict(zip(SUMS, self._sums_MS.numpy(), strict=True)),
            num_tokens=self.num_tokens,
            num_labels=self._num_labels,
            num_elements=self._num_elements,
            full_energy=self._full_energy,
        )
        return {name: metric.of(sums) for name, metric in LAYER_METRICS.items()}


class _LogitChanges:
    """The changes d of the logits of one chunk, over streams and vocabulary in tiles, reduced to numbers a token."""

    def __init__(
        self, full_CH: torch.Tensor, altered_SCH: torch.Tensor, difference_CSH: torch.Tensor, head_VH: torch.Tensor
    ) -> None:
        self.altered_SCH, self.difference_CSH, self.head_VH = altered_SCH, difference_CSH, head_VH
        self.full_logits_CV = _logits(full_CH, head_VH)
        self.full_log_sum_C = self.full_logits_CV.logsumexp(-1)

    def summarised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log sum p exp(d) and sum p d, both ``[chunk, streams]`` float64.

        Where a logit rises so much that exp(d) overflows, or all likely ones fall so far that sum p exp(d) is near 0,
        the first is the difference of two log-sum-exps.
        """
        num_tokens, num_streams, hidden = self.difference_CSH.shape
        tile_tokens, tile_vocabulary = _tile_shape(
            num_streams, len(self.head_VH), on_cpu=Device.of(self.head_VH).is_cpu
        )
        zeros = partial(self.difference_CSH.new_zeros, dtype=torch.float64)
        excess_CS, mean_row_CH = zeros((num_tokens, num_streams)), zeros((num_tokens, hidden))
        total_C1 = zeros((num_tokens, 1))  # 1 but for rounding, which would be the larger part of that of the KL
        for first_row in range(0, len(self.head_VH), tile_vocabulary):
            columns = slice(first_row, first_row + tile_vocabulary)
            head_rows_VH = self.head_VH[columns].to(self.difference_CSH.dtype)
            probability_CV = (self.full_logits_CV[:, columns] - self.full_log_sum_C[:, None]).exp_()
            total_C1 += probability_CV.sum(-1, keepdim=True, dtype=torch.float64)
            for p_CV, rows_VH in _pieces(probability_CV, head_rows_VH):
                mean_row_CH.addmm_(p_CV.double(), rows_VH.double())
            for first_token in range(0, num_tokens, tile_tokens):
                tokens = slice(first_token, first_token + tile_tokens)
                change_CSV = self._tile(tokens, columns, head_rows_VH)
                excess_CSV = change_CSV.expm1().sub_(change_CSV).mul_(probability_CV[tokens, None])
                excess_CS[tokens] += excess_CSV.sum(-1)
        mean_CS = (self.difference_CSH.double() @ mean_row_CH[:, :, None])[..., 0] / total_C1
        growth_CS = mean_CS + excess_CS / total_C1
        is_extreme_CS = ~excess_CS.isfinite() | (growth_CS < MIN_GROWTH)
        log_rise_CS = growth_CS.log1p_()
        for rows_R2 in torch.split(is_extreme_CS.nonzero(), num_tokens):
            token_R, stream_R = rows_R2.unbind(-1)
            log_sum_R = _logits(self.altered_SCH[stream_R, token_R], self.head_VH).logsumexp(-1)
            log_rise_CS[token_R, stream_R] = (log_sum_R - self.full_log_sum_C[token_R]).double()
        return log_rise_CS, mean_CS

    def _tile(self, tokens: slice, columns: slice, head_rows_VH: torch.Tensor) -> torch.Tensor:
        if Device.of(self.altered_SCH).widens_products and self.altered_SCH.dtype.itemsize < 4:
            # The difference of two hidden states would have to be rounded for a product in half precision.
            altered_CSH = self.altered_SCH[:, tokens].transpose(0, 1)
            logits_RV = _logits(altered_CSH.flatten(0, 1), self.head_VH[columns])
            return logits_RV.view(*altered_CSH.shape[:2], -1).sub_(self.full_logits_CV[tokens, None, columns])
        difference_CSH = self.difference_CSH[tokens]
        return (difference_CSH.flatten(0, 1) @ head_rows_VH.T).view(*difference_CSH.shape[:2], -1)


def _pieces(probability_CV: torch.Tensor, head_VH: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Columns of probabilities and the head's rows for them, few enough to be copied in another precision."""
    return zip(probability_CV.split(TILE_VOCABULARY_CPU, dim=-1), head_VH.split(TILE_VOCABULARY_CPU), strict=True)


def _tile_shape(num_streams: int, vocabulary: int, *, on_cpu: bool) -> tuple[int, int]:
    """Tokens and vocabulary of a tile that holds all streams."""
    tile_vocabulary = min(vocabulary, TILE_VOCABULARY_CPU) if on_cpu else vocabulary
    tile_elements = TILE_ELEMENTS_CPU if on_cpu else TILE_ELEMENTS
    return max(1, tile_elements // (tile_vocabulary * num_streams)), tile_vocabulary


def _logits(hidden_RH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least: rounding them to bfloat16 would drown small divergences."""
    if hidden_RH.dtype in (torch.float32, torch.float64):
        return F.linear(hidden_RH, head_VH)
    if Device.of(hidden_RH).widens_products:
        return torch.mm(hidden_RH, head_VH.T, out_dtype=torch.float32)
    pieces_VH = torch.split(head_VH, TILE_VOCABULARY_CPU)  # a whole head in float32 may not fit
    return torch.cat([F.linear(hidden_RH.float(), piece_VH.float()) for piece_VH in pieces_VH], dim=-1)


def _cosine_distance(first_CH: torch.Tensor, second_SCH: torch.Tensor) -> torch.Tensor:
    """1 - cos, as half the squared distance of the unit vectors, which does not cancel where they nearly agree."""
    return (F.normalize(first_CH, dim=-1) - F.normalize(second_SCH, dim=-1)).square().sum(-1) / 2
