"""Memory that a distillation run needs: exact for what has a fixed size, an estimate for activations."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from distill.losses import LossSettings
from distill.settings import DistillSettings
from minipuzzle.architecture import Architecture
from minipuzzle.layer_kinds import HIDDEN

_FLOAT32_BYTES = 4
_TRAINING_COPIES = 4  # weight, gradient and AdamW's two moments, all float32
# Values that autograd keeps a token for each output of a layer's linears, counted in transformers' path without
# kernels at hidden sizes 128 and 512, states and scan chunks from 32 to 128; and for each channel of a layer's input.
_KEPT_PER_OUTPUT = {"mamba": 11, "attention": 1, "mlp": 2, "moe": 2}
_KEPT_PER_CHANNEL = 3


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the training device by purpose."""

    student_bytes: int
    teacher_bytes: int
    loss_bytes: int
    activation_bytes: int  # an estimate, for one micro-batch

    @property
    def total_bytes(self) -> int:
        """Sum of all."""
        return sum(asdict(self).values())


def estimate_memory(
    student: Architecture, teacher: Architecture, settings: DistillSettings, device: str
) -> MemoryEstimate:
    """Memory of a run before any weight is read."""
    compute_dtype = getattr(torch, settings.dtype)
    rows = settings.micro_batch_sequences * settings.sequence_length
    chunk_rows = min(rows, LossSettings().chunk_rows(student.vocabulary, torch.device(device), torch.float32))
    loss_values = student.hidden * (rows + student.vocabulary) + 4 * chunk_rows * student.vocabulary
    return MemoryEstimate(
        student_bytes=_FLOAT32_BYTES * _TRAINING_COPIES * student.num_parameters,
        teacher_bytes=compute_dtype.itemsize * teacher.num_parameters,
        loss_bytes=_FLOAT32_BYTES * loss_values,
        activation_bytes=compute_dtype.itemsize * rows * _kept_values_per_token(student),
    )


def _kept_values_per_token(architecture: Architecture) -> int:
    values = 0
    for tensor in architecture.tensors():
        if tensor.part in _KEPT_PER_OUTPUT and tensor.spec.quantized:
            share = tensor.num_active_elements / tensor.num_elements  # of the tokens that a routed expert sees
            values += round(_KEPT_PER_OUTPUT[tensor.part] * tensor.shape[0] * share)
        elif tensor.spec.dims == (HIDDEN,):
            values += _KEPT_PER_CHANNEL * architecture.hidden
    return values
