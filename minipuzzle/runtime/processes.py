"""The processes of one job, as torchrun starts them: who this one is, and sums over all of them.

A command that is started plainly is a job of one process, for which everything here does nothing. The first process
(rank 0) alone writes files and prints; results are reduced before that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from minipuzzle.devices import Device

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of its job. ``local_rank`` counts those on the same machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size and self.local_rank >= 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The part of some items that falls to this process: every ``world_size``-th, from its rank on."""
        return items[self.rank :: self.world_size]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add the tensors of all processes up, in place, in every process; also returned."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """The first process's value, in every process. It must pickle."""
        values = [value]
        if self.world_size > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Item) -> list[Item]:
        """The values of all processes, by rank, in every process. They must pickle."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return once all processes have come here."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()


def processes_from_environment() -> Processes:
    """What torchrun says about this process; one of one where it was not torchrun that started it."""
    names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
    return Processes(**{field: int(os.environ[name]) for field, name in names.items() if name in os.environ})


@contextmanager
def joined_processes(device: str = "cpu") -> Iterator[Processes]:
    """Connect the processes that torchrun started while the block runs: sums travel where their tensors lie.

    A process group that exists already is used and left as it is.
    """
    processes = processes_from_environment()
    if processes.world_size == 1:
        yield processes
        return
    import torch.distributed as dist

    own = Device(Device(device).of_process(processes.local_rank, processes.world_size))
    own.claim()
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group(own.backend or "gloo")
    try:
        yield processes
    finally:
        if is_ours:
            dist.destroy_process_group()
