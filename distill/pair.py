"""A teacher and a student: the loss of a batch, and the distance between them on held-out text.

Both may be whole on one device or split over processes; what is here does not know.

Shape suffixes: B sequences, T tokens of a sequence, H student's hidden size, G teacher's hidden size.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distill.losses import LossSettings, LossTerms, chunked_kl
from minipuzzle.corpus import EvaluationWindows
from minipuzzle.families import Family
from minipuzzle.models import ModelParts, parts_of
from minipuzzle.processes import Processes


class HiddenStates(nn.Module):
    """A causal language model up to what its LM head sees. The head's weight is used apart, chunk by chunk."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model = model
        parts = parts_of(model, family)
        # Where a decoder block is several layers, these are modules of their own over the block's parts. They are
        # registered, so that FSDP finds them; names of weights are those in ``model``.
        self.layers = parts.layers
        self.__dict__["parts"] = parts

    parts: ModelParts  # made once: what is done to a layer must stay

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
    """Two models with one vocabulary. Only hidden states of the teacher are ever kept, never its logits."""

    teacher: HiddenStates
    student: HiddenStates
    device: torch.device
    compute_dtype: torch.dtype = torch.float32

    def loss(
        self,
        token_ids_BT: Tensor,
        labels_BT: Tensor,
        *,
        denominator: float,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
    ) -> LossTerms:
        """Summed loss of a batch over ``denominator``; rows whose label is IGNORE do not count."""
        token_ids_BT = token_ids_BT.to(self.device)
        with self._autocast():
            with torch.no_grad():
                teacher_BTG = self.teacher(token_ids_BT)
            student_BTH = self.student(token_ids_BT)
        settings = LossSettings(
            temperature=temperature,
            ce_weight=ce_weight,
            matmul_dtype=None if self.compute_dtype == torch.float32 else self.compute_dtype,
        )
        terms = chunked_kl(
            student_BTH.flatten(0, 1),
            self.student.head_weight,
            teacher_BTG.flatten(0, 1),
            self.teacher.head_weight,
            denominator=denominator,
            labels_N=labels_BT.flatten().to(self.device),
            settings=settings,
        )
        self.teacher.release()
        return terms

    @torch.no_grad()
    def mean_kl(self, windows: EvaluationWindows, *, batch_sequences: int, processes: Processes | None = None) -> float:
        """Forward KL over all predictions of some windows. Units: nats per token, temperature 1.

        Each process takes every ``world_size``-th batch; one that has none left runs the first again, uncounted,
        because a split model answers all processes or none.
        """
        processes = processes or Processes()
        kl = torch.zeros((), dtype=torch.float64, device=self.device)
        starts = range(0, len(windows.token_ids), batch_sequences)
        for round_idx in range(math.ceil(len(starts) / processes.world_size)):
            batch_idx = round_idx * processes.world_size + processes.rank
            start = starts[batch_idx] if batch_idx < len(starts) else 0
            batch = slice(start, start + batch_sequences)
            batch_kl = self.loss(windows.token_ids[batch], windows.labels[batch], denominator=1).kl
            kl += batch_kl if batch_idx < len(starts) else 0
        self.student.release()
        return float(processes.sum_(kl)) / windows.num_predictions

    def _autocast(self) -> AbstractContextManager[object]:
        # A split model casts its weights as it gathers them.
        is_low = self.compute_dtype != torch.float32 and not self.student.is_split
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=is_low)
