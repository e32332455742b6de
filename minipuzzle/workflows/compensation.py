"""Writing a cut: compensated where there is text to mend it on, else as it was cut."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch

from distill.scale.gpus import GPUS, Hardware
from importance.compensate import compensate, mended_quality
from importance.refits.results import Compensation
from importance.refits.work import open_stack, predict_flops
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import Plan
from minipuzzle.data.windows import EvaluationWindows, sample_windows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.quality.record import Quality
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import load_tokenizer

COMPENSATION_FILE = "compensation.json"
TYPICAL_GPU = "h100"
_FLOAT32_SHARE = 1 / 16  # of the BF16 rate: makers' data sheets, also for float64 on GPUs for computing
UNFINISHED_FOLDER = "unfinished_compensation"
COMPENSATION_TOKENS = 131_072  # at most: what more of them gain does not pay for their passes


def minutes_on(gpu: Hardware, flops: int) -> int:
    """Whole minutes that so many operations in float32 and float64 take one GPU, rounded up, by its data sheet."""
    return ceil(flops / (gpu.bf16_flops * _FLOAT32_SHARE * gpu.expected_fraction) / 60)


def compensation_windows(
    checkpoint: Checkpoint, documents: Sequence[str], sequence_length: int, seed: int
) -> torch.Tensor:
    """As many windows of some text as it has, ``[windows, tokens]``, of COMPENSATION_TOKENS at most.

    Raises: MinipuzzleError if there is no whole window.
    """
    return sample_windows(
        load_tokenizer(checkpoint.tokenizer_folder),
        documents,
        num_samples=max(2, COMPENSATION_TOKENS // sequence_length),
        sequence_length=sequence_length,
        seed=seed,
        may_be_fewer=True,
    )


def windows_that_fit(
    checkpoint: Checkpoint, token_ids_BT: torch.Tensor, compute: Compute, watched: EvaluationWindows | None = None
) -> tuple[LayerStack, torch.Tensor]:
    """A stack with room for as many of the windows as the memory takes, and these: all, or half of them, and so on.

    ``watched``: windows that need room beside them.

    Raises: MinipuzzleError if it takes no two windows.
    """
    beside, longest = (0, 0) if watched is None else watched.token_ids.shape
    while True:
        try:
            longest = max(longest, token_ids_BT.shape[1])
            return open_stack(checkpoint, len(token_ids_BT) + beside, longest, compute), token_ids_BT
        except MinipuzzleError:
            if len(token_ids_BT) <= 2:
                raise
            token_ids_BT = token_ids_BT[: len(token_ids_BT) // 2]


@dataclass(frozen=True, kw_only=True)
class CutWriter:
    """Writes cut checkpoint folders: mended on windows ``[windows, tokens]`` if there are any.

    ``may_choose``: a layer may keep other units than its plan says, as many, where held-out windows gain.
    """

    checkpoint: Checkpoint
    token_ids: torch.Tensor | None
    compute: Compute
    may_choose: bool = True

    def write(self, plan: Plan, folder: Path) -> Compensation:
        """Cut by a plan into an existing folder, with a record of what was mended.

        Layers that an interrupted run mended there are taken as they are.

        Raises: MinipuzzleError for a plan of another model, broken weights, too little memory or text.
        """
        found = Compensation(plan=plan, num_tokens=0, weights={}, layers=())
        if self.token_ids is not None:
            stack, token_ids_BT = windows_that_fit(self.checkpoint, self.token_ids, self.compute)
            unfinished = folder / UNFINISHED_FOLDER
            found = compensate(stack, plan, token_ids_BT, may_choose=self.may_choose, unfinished=unfinished)
            write_json(folder / COMPENSATION_FILE, found.to_json())
        num_tensors = sum(1 for _ in found.plan.apply(self.checkpoint.architecture).tensors())
        with self.compute.progress("cutting", num_tensors) as advance:
            write_pruned(self.checkpoint, found.plan, folder, advance, new_weights=found.weights)
        shutil.rmtree(folder / UNFINISHED_FOLDER, ignore_errors=True)
        return found

    def measure_on(self, windows: EvaluationWindows) -> Callable[[Plan], Quality] | None:
        """A function that says what a plan is like on some text once it is mended; None if nothing is mended.

        Of the text it takes COMPENSATION_TOKENS at most.
        """
        if self.token_ids is None:
            return None
        token_ids, num_watched = self.token_ids, max(1, COMPENSATION_TOKENS // windows.token_ids.shape[1])
        watched = replace(windows, token_ids=windows.token_ids[:num_watched], labels=windows.labels[:num_watched])

        def measure(plan: Plan) -> Quality:
            stack, token_ids_BT = windows_that_fit(self.checkpoint, token_ids, self.compute, watched)
            return mended_quality(stack, plan, token_ids_BT, watched, may_choose=self.may_choose)

        return measure

    def planned_work(self) -> dict[str, int]:
        """What mending a cut takes, at most; nothing without windows.

        Raises: MinipuzzleError if the memory is too small.
        """
        if self.token_ids is None:
            return {}
        stack, token_ids_BT = windows_that_fit(self.checkpoint, self.token_ids, self.compute)
        num_tokens = token_ids_BT.numel()
        flops = predict_flops(self.checkpoint.architecture, num_tokens)
        return {
            "compensation_tokens": num_tokens,
            "compensation_gflop": flops // 10**9,
            f"compensation_minutes_on_one_{TYPICAL_GPU}": minutes_on(GPUS[TYPICAL_GPU], flops),
            "memory_while_compensating_bytes": stack.weight_bytes + stack.reserved_bytes,
        }
