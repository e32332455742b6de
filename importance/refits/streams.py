"""The stream of a source model and that of its cut form behind the same layer, on the same tokens.

Shape suffixes: B windows, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from minipuzzle.cut.compensation import RefitRows, Tokens
from minipuzzle.cut.plan import Units
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.processes import Processes


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What some windows of the student's stream lack behind a layer.

    Shapes: ``held_out`` ``[B]``, ``missing`` ``[B, T, H]``, ``weights`` ``[B, T]``: of each token, one over the mean
    square of the teacher's stream.
    """

    held_out: torch.Tensor
    missing: torch.Tensor
    weights: torch.Tensor


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The precision of sums: that of the computation, unless it is a short one."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Streams:
    """Both streams of some windows; one and the same until the student differs.

    ``is_held_out_B``: windows that are not fitted. ``columns``: the hidden channels that the student keeps.
    """

    def __init__(
        self, stack: LayerStack, token_ids_BT: torch.Tensor, is_held_out_B: torch.Tensor, hidden: Units | None
    ) -> None:
        self.stack, self.is_held_out_B = stack, is_held_out_B
        self.columns: slice | list[int] = slice(None) if hidden is None else list(hidden)
        self.teacher_BTH = stack.embed(token_ids_BT)
        self.student_BTH = self.teacher_BTH if hidden is None else self.teacher_BTH[..., self.columns]

    @property
    def are_one(self) -> bool:
        """Whether nothing was cut so far."""
        return self.student_BTH is self.teacher_BTH

    def part(self) -> None:
        """Let the student's stream be one of its own."""
        if self.are_one:
            self.student_BTH = self.teacher_BTH.clone()

    def advance_teacher(self, layer_idx: int) -> None:
        """Bring the teacher's stream behind a layer."""
        self.stack.apply(layer_idx, self.teacher_BTH, out=self.teacher_BTH)

    def advance_student(self, layer_idx: int, module: nn.Module) -> None:
        """Bring the student's stream behind a cut layer."""
        self.stack.apply(layer_idx, self.student_BTH, out=self.student_BTH, module=module)

    def missing(self, layer_idx: int, module: nn.Module, windows: Sequence[int] | None = None) -> Iterator[Missing]:
        """What is missing behind a layer, batch by batch, while a cut form of it runs; in the scale of its mixer.

        ``windows``: these alone. Counts as one application of the layer.
        """
        residual_scale = getattr(module, "residual_scale", 1.0)
        size = self.stack.sequences_at_once(layer_idx, self.student_BTH.shape[1])
        indices = torch.arange(len(self.student_BTH)) if windows is None else torch.as_tensor(windows)
        for batch in indices.split(size):
            teacher_BTH = self.teacher_BTH[batch][..., self.columns]
            teacher_BTH = at_least_float32(teacher_BTH)
            yield Missing(
                held_out=self.is_held_out_B[batch],
                missing=(teacher_BTH - module(self.student_BTH[batch])) / residual_scale,
                weights=1 / teacher_BTH.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny),
            )
        self.stack.counters.layer_applications += 1


def summed_over(processes: Processes, own: Tokens) -> Tokens:
    """What the tokens of all processes say."""
    if isinstance(own, RefitRows):
        return RefitRows(parts=[part for parts in processes.gather(own.parts) for part in parts])
    for total in (own.gram, own.cross, own.energy):
        processes.sum_(total)
    return own
