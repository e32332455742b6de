"""A teacher and a student: the loss of a batch, and the distance between them on held-out text.

Both may be whole on one device or split over processes; what is here does not know.

Shape suffixes: B sequences, T tokens of a sequence, H student's hidden size, G teacher's hidden size.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distill.objective.losses import (
    LossSettings,
    LossTerms,
    TopKTargets,
    chunked_kl,
    chunked_topk_kl,
    hidden_cosine_distance,
    topk_targets,
)
from distill.objective.teacher_cache import TeacherCache
from minipuzzle.architecture.families import Family
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import parts_of


class HiddenStates(nn.Module):
    """A causal language model up to what its LM head sees. The head's weight is used apart, chunk by chunk."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model = model
        parts = parts_of(model, family)  # made once: what is put in the place of a layer must stay
        # Where a decoder block is several layers, these are modules of their own over the block's parts. They are
        # registered, so that FSDP finds them; names of weights are those in ``model``.
        self.layers = parts.layers
        self.parts = parts

    @property
    def head_weight(self) -> Tensor:
        """The LM head's weight ``[vocabulary, hidden]``; of a split model whole only after a forward pass."""
        return self.parts.head.weight

    @property
    def is_split(self) -> bool:
        """Whether other processes hold parts of the weights."""
        return isinstance(self, FSDPModule)

    def forward(self, token_ids_BT: Tensor) -> Tensor:
        """Hidden states after the final norm, ``[batch, tokens, hidden]``."""
        return self.parts.logits_input(token_ids_BT)

    def release(self) -> None:
        """Forget what a forward pass without a backward pass has gathered."""
        if isinstance(self, FSDPModule):
            self.reshard()


@dataclass(frozen=True, kw_only=True)
class DistillPair:
    """Two models with one vocabulary. Only hidden states of the teacher are ever kept, never its logits.

    ``teacher_cache``: where its targets for training are looked up before it is run; evaluation always runs it.
    ``kept_channels``: those of the teacher's hidden channels that the student has; None: all.
    """

    teacher: HiddenStates
    student: HiddenStates
    compute: Compute = field(default_factory=Compute)
    teacher_cache: TeacherCache | None = None
    kept_channels: tuple[int, ...] | None = None

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.compute.torch_device

    def loss(
        self,
        token_ids_BT: Tensor,
        labels_BT: Tensor,
        *,
        denominator: float,
        settings: LossSettings,
    ) -> LossTerms:
        """Summed loss of a batch over ``denominator``; rows whose label is IGNORE do not count."""
        token_ids_BT, labels_N = token_ids_BT.to(self.device), labels_BT.flatten().to(self.device)
        if self.compute.dtype != "float32":
            settings = replace(settings, matmul_dtype=self.compute.torch_dtype)
        if self.teacher_cache is not None and torch.is_grad_enabled():
            targets = self._cached_targets(token_ids_BT, settings)
            student_NH = self._hidden(self.student, token_ids_BT)
            return chunked_topk_kl(
                student_NH,
                self.student.head_weight,
                targets,
                denominator=denominator,
                labels_N=labels_N,
                settings=settings,
            )
        with torch.no_grad():
            teacher_NG = self._hidden(self.teacher, token_ids_BT)
        student_NH = self._hidden(self.student, token_ids_BT)
        terms = chunked_kl(
            student_NH,
            self.student.head_weight,
            teacher_NG,
            self.teacher.head_weight,
            denominator=denominator,
            labels_N=labels_N,
            settings=settings,
        )
        self.teacher.release()
        if settings.hidden_weight == 0:
            return terms
        kept = None if self.kept_channels is None else torch.tensor(self.kept_channels, device=self.device)
        distance = hidden_cosine_distance(
            student_NH, teacher_NG, denominator=denominator, labels_N=labels_N, kept_channels_H=kept
        )
        return terms._replace(loss=terms.loss + settings.hidden_weight * distance)

    def _hidden(self, model: HiddenStates, token_ids_BT: Tensor) -> Tensor:
        with self._autocast():
            hidden_BTH: Tensor = model(token_ids_BT)
        return hidden_BTH.flatten(0, 1)

    def _cached_targets(self, token_ids_BT: Tensor, settings: LossSettings) -> TopKTargets:
        """The teacher's targets from disk; it runs where they are not there yet."""
        assert self.teacher_cache is not None
        must_compute = not self.teacher_cache.holds(token_ids_BT)
        if self.teacher.is_split:  # it runs in all processes or in none
            wishes = torch.tensor(float(must_compute), device=self.device)
            dist.all_reduce(wishes)
            must_compute = bool(wishes > 0)
        return self.teacher_cache.targets(
            token_ids_BT, (lambda: self._targets(token_ids_BT, settings)) if must_compute else None
        )

    @torch.no_grad()
    def _targets(self, token_ids_BT: Tensor, settings: LossSettings) -> TopKTargets:
        assert self.teacher_cache is not None
        hidden_NG = self._hidden(self.teacher, token_ids_BT)
        description = self.teacher_cache.description
        targets = topk_targets(
            hidden_NG,
            self.teacher.head_weight[: description.vocabulary],
            top_k=description.top_k,
            temperature=settings.temperature,
            matmul_dtype=settings.matmul_dtype,
        )
        self.teacher.release()
        return targets

    @torch.no_grad()
    def distance(self, windows: EvaluationWindows, *, batch_sequences: int) -> Quality:
        """Forward KL and the student's own loss over all predictions of some windows, at temperature 1.

        Each process takes every ``world_size``-th batch; one that has none left runs the first again, uncounted,
        because a split model answers all processes or none.
        """
        processes = self.compute.processes
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        starts = range(0, len(windows.token_ids), batch_sequences)
        settings = LossSettings(ce_weight=0.5)  # any share but none, so that both are computed
        for round_idx in range(math.ceil(len(starts) / processes.world_size)):
            batch_idx = round_idx * processes.world_size + processes.rank
            start = starts[batch_idx] if batch_idx < len(starts) else 0
            batch = slice(start, start + batch_sequences)
            terms = self.loss(windows.token_ids[batch], windows.labels[batch], denominator=1, settings=settings)
            if batch_idx < len(starts):
                sums += torch.stack([terms.kl, terms.cross_entropy])
        self.student.release()
        kl, loss = (processes.sum_(sums) / windows.num_predictions).tolist()
        return Quality(kl=kl, loss=loss, num_tokens=windows.num_predictions)

    def _autocast(self) -> AbstractContextManager[object]:
        # A split model casts its weights as it gathers them.
        is_low = self.compute.dtype != "float32" and not self.student.is_split
        return torch.autocast(self.device.type, dtype=self.compute.torch_dtype, enabled=is_low)
