"""A teacher and a student on one device: the loss of a batch, and the distance between them on held-out text.

Shape suffixes: B sequences, T tokens of a sequence, H student's hidden size, G teacher's hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses import LossSettings, LossTerms, chunked_kl
from minipuzzle.corpus import EvaluationWindows
from minipuzzle.models import ModelParts


@dataclass(frozen=True, kw_only=True)
class DistillPair:
    """Two models with one vocabulary. Only hidden states of the teacher are ever kept, never its logits."""

    teacher: ModelParts
    student: ModelParts
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
                teacher_BTG = self.teacher.logits_input(token_ids_BT)
            student_BTH = self.student.logits_input(token_ids_BT)
        settings = LossSettings(
            temperature=temperature,
            ce_weight=ce_weight,
            matmul_dtype=None if self.compute_dtype == torch.float32 else self.compute_dtype,
        )
        return chunked_kl(
            student_BTH.flatten(0, 1),
            self.student.head.weight,
            teacher_BTG.flatten(0, 1),
            self.teacher.head.weight,
            denominator=denominator,
            labels_N=labels_BT.flatten().to(self.device),
            settings=settings,
        )

    @torch.no_grad()
    def mean_kl(self, windows: EvaluationWindows, *, batch_sequences: int) -> float:
        """Forward KL over all predictions of some windows. Units: nats per token, temperature 1."""
        kl = 0.0
        for start in range(0, len(windows.token_ids), batch_sequences):
            batch = slice(start, start + batch_sequences)
            kl += float(self.loss(windows.token_ids[batch], windows.labels[batch], denominator=1).kl)
        return kl / windows.num_predictions

    def _autocast(self) -> AbstractContextManager[object]:
        is_low = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=is_low)
