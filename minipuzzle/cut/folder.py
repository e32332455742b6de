"""A cut checkpoint folder: the weights that stay, its config.json, its plan, and what comes along unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from minipuzzle.architecture.configs.per_layer import write_config
from minipuzzle.cut.plan import PLAN_FILE, Plan
from minipuzzle.cut.surgery import cut_tensors
from minipuzzle.cut.vocabulary import apart, recorded
from minipuzzle.errors import warn
from minipuzzle.files.checkpoint import Checkpoint, save_config
from minipuzzle.files.companions import copy_companions
from minipuzzle.files.fused_experts import as_stored
from minipuzzle.files.safetensors_files import ShardWriter
from minipuzzle.progress import Advance, no_progress

if TYPE_CHECKING:
    import torch


def write_pruned(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    advance: Advance = no_progress,
    *,
    new_weights: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Cut a checkpoint into an existing folder, shard by shard: weights, config.json, tokenizer and the plan.

    ``advance`` is called once a tensor. ``new_weights``: in the place of what is cut, by their names in the cut model.

    Raises: MinipuzzleError for a plan of another model or broken weights.
    """
    plan, checkpoint = apart(plan, checkpoint)
    writer, target = ShardWriter(folder), plan.apply(checkpoint.architecture)
    if obstacle := checkpoint.family.obstacle(target):
        warn(obstacle)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in cut_tensors(checkpoint, plan):
            yield name, new_weights.get(name, tensor)
            advance(1)

    for name, tensor in as_stored(target.deployed, tensors(), is_fused=checkpoint.is_fused):
        writer.add(name, tensor)
    writer.finish()
    config = write_config(checkpoint.family, checkpoint.config, target)
    if gone := [placed.name for placed in checkpoint.architecture.carried if placed not in target.carried]:
        warn(f"{folder.name}: {len(gone)} tensors such as {gone[0]} have the widths of what was cut and are left out")
    save_config(folder, config)
    copy_companions(checkpoint.tokenizer_folder, folder)
    (folder / PLAN_FILE).write_text(recorded(checkpoint, plan).to_json(), encoding="utf-8")
