"""Memory of scoring: a random checkpoint of 2 GiB within --device-memory 512MiB, against a run with all of it resident.

Peak resident memory (VmHWM) of a process that scores, less that of one that only imports torch. Writes
score_memory.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from importance.layers import removal_plans, score_plans
from importance.work import open_stack
from minipuzzle.architecture.families import FAMILIES
from minipuzzle.architecture.quantities import GIB, MIB
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.files.safetensors_files import ShardWriter
from minipuzzle.runtime.compute import Compute

PATTERN = "M---*---M---*---M---M---M---M---"
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 20480,
    "vocab_size": 16384,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 64,
    "chunk_size": 64,
}
LIMIT_BYTES, ALLOWED_BYTES = 512 * MIB, 700 * MIB
SAMPLES, TOKENS = 2, 32


def write_random_checkpoint(folder: Path) -> Checkpoint:
    """Random bfloat16 weights, one tensor at a time."""
    layers = {"hybrid_override_pattern": PATTERN, "num_hidden_layers": len(PATTERN)}
    config = {**FAMILIES["nemotron_h"].tiny_config, **SIZES, **layers, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    write_json(folder / "config.json", config)
    architecture = FAMILIES["nemotron_h"].read(config)
    generator = torch.Generator().manual_seed(0)
    writer = ShardWriter(folder, max_shard_bytes=256 * MIB)
    for placed in architecture.tensors():
        if len(placed.shape) == 1:
            tensor = 1 + 0.1 * torch.randn(placed.shape, generator=generator)
        else:
            tensor = torch.randn(placed.shape, generator=generator) * placed.shape[-1] ** -0.5
        writer.add(placed.name, tensor.bfloat16())
    writer.finish()
    return Checkpoint.open(folder)


def score(folder: Path, limit_bytes: int) -> dict[str, Any]:
    """Scores, counters and peak memory of this process."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(folder)
    vocabulary = checkpoint.architecture.vocabulary
    tokens = torch.randint(vocabulary, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
    stack = open_stack(checkpoint, Compute(memory_bytes=limit_bytes), sequence_length=TOKENS)
    start = time.perf_counter()
    scores = score_plans(stack, removal_plans(stack.architecture, range(stack.num_layers)), tokens)
    return {
        "peak_bytes": peak_bytes(),
        "seconds": time.perf_counter() - start,
        "resident": stack.is_resident,
        "bytes_read": stack.counters.weight_bytes_read,
        "scores": {metric: values.tolist() for metric, values in scores.items()},
    }


def peak_bytes() -> int:
    """The most memory that this process has had resident. (ru_maxrss would count its parent's as well.)"""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def in_a_process_of_its_own(*arguments: str) -> dict[str, Any]:
    """What this script prints when it is called with some arguments."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure and write the page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weight_bytes = write_random_checkpoint(folder).weight_bytes
        bare = in_a_process_of_its_own("bare")
        streamed = in_a_process_of_its_own("score", name, str(LIMIT_BYTES))
        resident = in_a_process_of_its_own("score", name, str(16 * GIB))
    assert resident["resident"] and not streamed["resident"]
    differences = []
    for metric, wanted in resident["scores"].items():
        found = np.array(streamed["scores"][metric])
        differences.append(float(np.max(np.abs(found - wanted)) / np.abs(wanted).max()))
    above = {
        "streamed": streamed["peak_bytes"] - bare["peak_bytes"],
        "resident": resident["peak_bytes"] - bare["peak_bytes"],
    }
    verdict = "holds" if above["streamed"] <= ALLOWED_BYTES else "does not hold"
    page = f"""# Memory of scoring a checkpoint larger than the memory it may use

A random Nemotron-H-like checkpoint of {weight_bytes / GIB:.2f} GiB in bfloat16, {len(PATTERN)} layers, scored in
float32 on {SAMPLES} samples of {TOKENS} tokens on a CPU.

| | --device-memory 512MiB | all resident |
|---|---:|---:|
| peak memory above an interpreter with torch, MiB | {above["streamed"] / MIB:.0f} | {above["resident"] / MIB:.0f} |
| weights read, GiB | {int(streamed["bytes_read"]) / GIB:.2f} | {int(resident["bytes_read"]) / GIB:.2f} |
| seconds, one thread, with other work on the machine | {streamed["seconds"]:.0f} | {resident["seconds"]:.0f} |

At most 700 MiB above the interpreter: {verdict}. Largest difference of the scores, relative to each metric's largest
score: {max(differences):.0e}.
"""
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        print(json.dumps({"peak_bytes": peak_bytes()}))
    elif sys.argv[1:2] == ["score"]:
        print(json.dumps(score(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
