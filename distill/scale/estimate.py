"""What a distillation run needs, before anything is loaded: memory of each process, speed and hours.

Weights, gradients and optimiser states are exact. Activations, speed and hours are estimates and are called so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from distill.engine import EngineSettings
from distill.objective.losses import LossSettings
from distill.scale.gpus import Hardware
from distill.settings import DistillSettings
from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import HIDDEN
from minipuzzle.architecture.model import Architecture
from minipuzzle.architecture.quantities import format_gib
from minipuzzle.runtime.compute import DTYPES, Compute

_FLOAT32_BYTES = 4
_TRAINING_COPIES = 4  # weight, gradient and AdamW's two moments, all float32
_KEPT_PER_CHANNEL = 3  # values that autograd keeps a token for each channel of a layer's input
_UNITS_GATHERED = 2  # the layer that runs, and the next one
_GPUS_PER_NODE = 8
_NODE_BYTES_PER_SECOND = 300e9  # collectives over NVLink, each GPU
_NETWORK_BYTES_PER_SECOND = 50e9  # 400 Gbit/s for each GPU


_FP8_SPEED_UP = 1.28  # of whole training steps, as torchtitan reports for an 8B model; products alone are twice as fast


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device of one process by purpose.

    ``gathered_bytes``: weights and gradients of split models that are whole for a moment. ``activation_bytes``: an
    estimate, for one micro-batch.
    """

    student_bytes: int
    teacher_bytes: int
    gathered_bytes: int
    loss_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all."""
        return sum(asdict(self).values())

    def require_room(self, compute: Compute, hint: str) -> None:
        """Refuse to train within a limit that this exceeds; without a limit there is nothing to compare with.

        Raises: MinipuzzleError with both amounts.
        """
        if compute.memory_bytes is not None:
            compute.require_room(self.total_bytes, "to train with both models whole, by an estimate", hint)


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """A guess at a whole run. ``tokens_per_second``: of all processes together.

    ``bound_by``: "compute" or "network", whichever takes longer. ``problems``: why the run cannot be done like this.
    """

    hardware: str
    num_processes: int
    memory: MemoryEstimate
    tokens_per_second: float
    hours: float
    bound_by: str
    problems: tuple[str, ...] = ()


def estimate_run(
    student: Architecture,
    teacher: Architecture,
    settings: DistillSettings,
    engine: EngineSettings,
    *,
    hardware: Hardware,
    num_processes: int,
) -> RunEstimate:
    """Memory, speed and duration of a run on ``num_processes`` devices."""
    on_cpu = hardware.memory_bytes is None
    memory = estimate_memory(student, teacher, settings, on_cpu=on_cpu, engine=engine, num_processes=num_processes)
    flops_per_second = hardware.bf16_flops * hardware.expected_fraction
    if engine.fp8 and hardware.fp8_flops:
        flops_per_second *= _FP8_SPEED_UP
    micro_batch_tokens = settings.micro_batch_sequences * settings.sequence_length
    compute_seconds = micro_batch_tokens * flops_per_token(student, teacher, settings, engine) / flops_per_second
    network_seconds = _moved_bytes(student, teacher, settings, num_processes) / (
        _NODE_BYTES_PER_SECOND if num_processes <= _GPUS_PER_NODE else _NETWORK_BYTES_PER_SECOND
    )
    tokens_per_second = num_processes * micro_batch_tokens / max(compute_seconds, network_seconds)
    problems = []
    if hardware.memory_bytes is not None and memory.total_bytes > hardware.memory_bytes:
        problems.append(f"needs {format_gib(memory.total_bytes)} of {format_gib(hardware.memory_bytes)}")
    if settings.batch_sequences % num_processes:
        problems.append(f"a batch of {settings.batch_sequences} cannot be divided equally")
    return RunEstimate(
        hardware=hardware.name,
        num_processes=num_processes,
        memory=memory,
        tokens_per_second=tokens_per_second,
        hours=settings.total_steps * settings.tokens_per_step / tokens_per_second / 3600,
        bound_by="compute" if compute_seconds >= network_seconds else "network",
        problems=tuple(problems),
    )


def flops_per_token(
    student: Architecture, teacher: Architecture, settings: DistillSettings, engine: EngineSettings
) -> float:
    """Floating-point operations for one token: teacher forward, student forward and backward.

    Two for each weight of a matrix product and token, twice that backward, and one more forward pass of the student
    where layers are computed again. Attention adds its products with half the sequence; scans are left out.
    """
    student_passes = 4 if engine.activation_checkpointing else 3
    return _forward_flops(teacher, settings) + student_passes * _forward_flops(student, settings)


def _forward_flops(architecture: Architecture, settings: DistillSettings) -> float:
    weights = sum(
        tensor.num_active_elements * times
        for tensor, times in architecture.distinct_tensors()
        if len(tensor.shape) > 1 and tensor.part != "embeddings"
    )
    if architecture.tied_embeddings:
        weights += architecture.vocabulary * architecture.hidden
    attended = 0
    for layer in architecture.layers:
        sizes = layer.sizes
        if "kv_group" in sizes:
            attended += sizes["kv_group"] * sizes["queries_per_group"] * sizes["head_dim"] * settings.sequence_length
    return 2.0 * (weights + attended)  # two products a position, over half the sequence on average


def _moved_bytes(student: Architecture, teacher: Architecture, settings: DistillSettings, num_processes: int) -> float:
    """Bytes that one process receives and sends for one micro-batch of split models."""
    if num_processes == 1:
        return 0.0
    weight_bytes = DTYPES[settings.dtype].itemsize
    student_bytes = (2 * weight_bytes + _FLOAT32_BYTES) * student.num_parameters  # gathered twice, reduced once
    return (student_bytes + weight_bytes * teacher.num_parameters) * (num_processes - 1) / num_processes


def estimate_memory(
    student: Architecture,
    teacher: Architecture,
    settings: DistillSettings,
    *,
    on_cpu: bool,
    engine: EngineSettings | None = None,
    num_processes: int = 1,
) -> MemoryEstimate:
    """Memory of each process of a run before any weight is read."""
    engine = engine or EngineSettings()
    weight_bytes = DTYPES[settings.dtype].itemsize
    rows = settings.micro_batch_sequences * settings.sequence_length
    chunk_rows = min(rows, LossSettings().chunk_rows(student.vocabulary, torch.float32, on_cpu=on_cpu))
    loss_values = student.hidden * (rows + student.vocabulary) + 4 * chunk_rows * student.vocabulary
    is_offloaded = engine.teacher_offload == "cpu"
    is_split = num_processes > 1 or is_offloaded or not on_cpu
    teacher_bytes = 0 if is_offloaded else weight_bytes * teacher.num_parameters
    return MemoryEstimate(
        student_bytes=_FLOAT32_BYTES * _TRAINING_COPIES * student.num_parameters // num_processes,
        teacher_bytes=teacher_bytes // num_processes,
        gathered_bytes=_gathered_bytes(student, teacher, weight_bytes) if is_split else 0,
        loss_bytes=_FLOAT32_BYTES * loss_values,
        activation_bytes=weight_bytes * rows * _kept_values_per_token(student, engine),
    )


def _gathered_bytes(student: Architecture, teacher: Architecture, weight_bytes: int) -> int:
    """Both heads during the loss, two units of one model, and the student's gradients of one."""
    heads = weight_bytes * student.vocabulary * (student.hidden + teacher.hidden)
    forward = _UNITS_GATHERED * weight_bytes * max(_largest_unit(student), _largest_unit(teacher))
    gradients = (weight_bytes + _FLOAT32_BYTES) * _largest_unit(student)
    return heads + forward + gradients


def _largest_unit(architecture: Architecture) -> int:
    layers = (
        sum(tensor.num_elements for tensor in architecture.layer_tensors(layer_idx))
        for layer_idx, _ in architecture.distinct_layers()
    )
    return max(architecture.vocabulary * architecture.hidden, *layers)


def _kept_values_per_token(architecture: Architecture, engine: EngineSettings) -> int:
    by_layer = [_kept_in_layer(architecture, layer_idx) for layer_idx in range(len(architecture.layers))]
    if engine.activation_checkpointing:
        return architecture.hidden * (len(by_layer) + _KEPT_PER_CHANNEL) + max(by_layer)
    return sum(by_layer) + _KEPT_PER_CHANNEL * architecture.hidden  # the final norm


def _kept_in_layer(architecture: Architecture, layer_idx: int) -> int:
    values = 0
    for tensor in architecture.layer_tensors(layer_idx):
        if tensor.spec.quantized:
            share = tensor.num_active_elements / tensor.num_elements  # of the tokens that a routed expert sees
            values += round(LAYER_KINDS[tensor.part].kept_per_output * tensor.shape[0] * share)
        elif tensor.spec.dims == (HIDDEN,):
            values += _KEPT_PER_CHANNEL * architecture.hidden
    return values
