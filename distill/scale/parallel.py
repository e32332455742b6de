"""Models split over the processes of a job with PyTorch's FSDP2, and started without any process reading all of one.

A model is built without memory, split, and then filled: of each tensor a process reads the rows that are its own.
While it runs, a layer's weights are gathered just before the layer and forgotten after it; gradients come back summed
over all processes, as parts of one mean whose denominator the caller knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recomputed

from distill.engine import EngineSettings
from distill.objective.pair import DistillPair, HiddenStates
from distill.scale.low_precision import float8_obstacle, train_through_fp8, use_float8_compute
from minipuzzle.architecture.families import Family
from minipuzzle.devices import Device
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import ModelParts, build_on_meta, load_model
from minipuzzle.runtime.processes import Processes, joined_processes


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How models compute, among which processes, and the mesh they are split over; None: whole in one process."""

    compute: Compute
    mesh: DeviceMesh | None

    @property
    def processes(self) -> Processes:
        """Those of the job."""
        return self.compute.processes

    @property
    def device(self) -> torch.device:
        """This process's own."""
        return self.compute.torch_device


@contextmanager
def joined_placement(compute: Compute, engine: EngineSettings) -> Iterator[Placement]:
    """Connect the processes of the job, if there are several, while the block runs.

    A single process on a GPU is a mesh of one, so that it computes exactly as many do; on a CPU models stay whole
    unless the teacher is to be offloaded, and so they do on a device that torch.distributed has no backend for.
    """
    with joined_processes(compute.device) as processes:
        compute = compute.among(processes)
        own = compute.own_device
        may_be_whole = own.is_cpu or own.backend is None
        if processes.world_size == 1 and may_be_whole and engine.teacher_offload == "none":
            yield Placement(compute=compute, mesh=None)
            return
        is_ours = not dist.is_initialized()
        if is_ours:
            dist.init_process_group(own.backend, store=HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh(own.kind, (processes.world_size,), mesh_dim_names=("shard",))
            yield Placement(compute=compute, mesh=mesh)
        finally:
            if is_ours:
                dist.destroy_process_group()


def open_pair(
    *,
    student: Checkpoint,
    teacher: Checkpoint,
    placement: Placement,
    engine: EngineSettings,
) -> DistillPair:
    """Student and teacher with their weights on this process's device: whole, or this process's part of them.

    The student's weights are float32, the teacher's are frozen in the precision of the computation. A head that is
    tied to the embeddings stays so where engines read it (``Architecture.deployed``), or the student would outgrow its
    budget.
    """
    compute = placement.compute
    is_tied = student.architecture.deployed.tied_embeddings
    if placement.mesh is None:
        models = [load_model(student, replace(compute, dtype="float32")), load_model(teacher, compute)]
    else:
        models = [
            build_on_meta({**student.config, "tie_word_embeddings": False}, torch.float32),
            build_on_meta({**teacher.config, "tie_word_embeddings": False}, compute.torch_dtype),
        ]
    student_model, teacher_model = models
    pair = make_pair(teacher_model, student_model, student.family, compute, teacher_family=teacher.family)
    parts = pair.student.parts
    if is_tied:
        tie_head(parts)
    elif student.architecture.tied_embeddings and placement.mesh is None:
        parts.head.weight = nn.Parameter(parts.head.weight.detach().clone())
    prepare_student(pair.student, student, engine, placement.device)
    if placement.mesh is not None:
        low_dtype = None if compute.dtype == "float32" else compute.torch_dtype
        split(pair.student, placement.mesh, low_dtype=low_dtype)
        split(pair.teacher, placement.mesh, offload_to_cpu=engine.teacher_offload == "cpu")
        fill(pair.student, student, placement.device)
        fill(pair.teacher, teacher, torch.device("cpu") if engine.teacher_offload == "cpu" else placement.device)
    return pair


def tie_head(parts: ModelParts) -> None:
    """Make head and embeddings one parameter; loading leaves two over the same values."""
    weight = parts.embeddings.weight
    assert isinstance(weight, nn.Parameter)
    parts.head.weight = weight


def prepare_student(part: HiddenStates, student: Checkpoint, engine: EngineSettings, device: torch.device) -> None:
    """Change how a student computes, before it is split."""
    if engine.fp8:
        obstacle = float8_obstacle(Device(str(device)))
        assert obstacle is None, obstacle  # settled when the run was prepared
        use_float8_compute(part.model, part.layers)
    if engine.qat != "none":
        train_through_fp8(part.model, student)
    if engine.fp8 or engine.qat != "none":
        # No layer drops anything out; all that training mode does is to let GPU kernels take a linear layer's weight
        # and multiply by it themselves, past what was changed here.
        part.model.eval()
    if engine.activation_checkpointing:
        for layer_idx, layer in enumerate(part.layers):
            part.layers[layer_idx] = Recomputed(layer)
    if engine.compile_layers:
        for layer in part.layers:
            layer.compile()


def make_pair(
    teacher_model: nn.Module,
    student_model: nn.Module,
    family: Family,
    compute: Compute = Compute(),
    *,
    teacher_family: Family | None = None,
) -> DistillPair:
    """A trainable student and a frozen teacher, of the same family unless another is given."""
    teacher_model.requires_grad_(False).eval()
    student_model.requires_grad_(True).train()
    return DistillPair(
        teacher=HiddenStates(teacher_model, teacher_family or family),
        student=HiddenStates(student_model, family),
        compute=compute,
    )


class Recomputed(nn.Module):
    """A layer that keeps its inputs alone and computes the rest again in the backward pass.

    FSDP's own hooks are around it, so that a layer is gathered once for its second forward and its backward pass. No
    layer draws random numbers, so none are kept.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """What the layer computes."""
        found: Tensor = recomputed(self.layer, hidden_BTH, use_reentrant=False, preserve_rng_state=False)
        return found


def split(
    part: HiddenStates, mesh: DeviceMesh, *, low_dtype: torch.dtype | None = None, offload_to_cpu: bool = False
) -> None:
    """Split a model along the first dimension of each parameter; a layer is what is gathered at once.

    ``low_dtype``: what weights are gathered and multiplied in; gradients are summed in float32 always. The final norm
    and the LM head, with embeddings that are tied to it, stay gathered from the forward pass on, because the loss uses
    them after it.
    """
    on_cpu = CPUOffloadPolicy(pin_memory=Device(mesh.device_type).pins_memory)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=low_dtype, reduce_dtype=torch.float32),
        "offload_policy": on_cpu if offload_to_cpu else OffloadPolicy(),
    }
    parts = part.parts
    units = part.layers if parts.head.weight is parts.embeddings.weight else (parts.embeddings, *part.layers)
    for unit in units:
        fully_shard(unit, reshard_after_forward=True, **options)
    fully_shard(part, ignored_params={weight for unit in units for weight in unit.parameters()}, **options)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no sum with a factor; a plain sum is what is wanted anyway.
            module.set_force_sum_reduction_for_comms(True)


def fill(part: HiddenStates, checkpoint: Checkpoint, device: torch.device) -> None:
    """Read this process's rows of every tensor of a split model that has no memory yet.

    Raises: MinipuzzleError if values are not finite. Names and shapes were checked before.
    """
    module_name = checkpoint.family.modules.module_name
    disk_names = {module_name(name): name for name in checkpoint.entries}
    head = f"{checkpoint.family.modules.head}.weight"
    disk_names.setdefault(head, disk_names[f"{checkpoint.family.modules.embeddings}.weight"])
    is_tied = part.parts.head.weight is part.parts.embeddings.weight
    state: dict[str, Tensor] = {}
    for name, parameter in part.model.state_dict().items():
        disk_name = disk_names.pop(name)
        if not isinstance(parameter, DTensor):  # a buffer, such as the routing bias of experts
            state[name] = checkpoint.rows(disk_name, 0, None).to(device, parameter.dtype)
            continue
        first, count = own_rows(parameter)
        local = checkpoint.rows(disk_name, first, first + count)
        state[name] = DTensor.from_local(
            local.to(device, parameter.dtype, copy=True),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    assert not disk_names, f"nothing takes {sorted(disk_names)}"
    part.model.load_state_dict(state, strict=True, assign=True)
    if is_tied:
        tie_head(part.parts)


def own_rows(parameter: DTensor) -> tuple[int, int]:
    """First row and number of rows of a split parameter that this process holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], shape[0]


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes, which must all call this; a whole tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of_process(batch_sequences: int, processes: Processes) -> tuple[int, int]:
    """First sequence and number of sequences of each batch that fall to this process.

    Raises: MinipuzzleError if a batch cannot be divided equally, as all processes must take every step together.
    """
    count, left_over = divmod(batch_sequences, processes.world_size)
    if left_over or count == 0:
        raise MinipuzzleError(
            f"a batch of {batch_sequences} sequences cannot be divided equally among {processes.world_size} processes",
            f"give ‹batch_sequences› a multiple of {processes.world_size}",
        )
    return processes.rank * count, count
