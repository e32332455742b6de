"""Memory of mending: a cut of a random checkpoint of 2 GiB within --device-memory 512MiB.

Half of the neurons and one layer go. Peak resident memory (VmHWM) of a process that mends, less that of one that only
imports torch; layer applications and bytes read are counted. Writes compensation_memory.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from score_memory import ALLOWED_BYTES, LIMIT_BYTES, peak_bytes, write_random_checkpoint

from importance.compensate import compensate
from importance.refits.work import predict_flops
from minipuzzle.architecture.quantities import GIB, MIB
from minipuzzle.cut.plan import Units, keep_everything
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.workflows.compensation import windows_that_fit

WINDOWS, TOKENS, DROPPED = 64, 32, 1


def mend(folder: Path) -> dict[str, Any]:
    """What mending takes in this process."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(folder)
    source = checkpoint.architecture
    kept = tuple(idx for idx in range(len(source.layers)) if idx != DROPPED)
    half: dict[int | None, Units] = {
        idx: tuple(range(0, 20480, 2)) for idx in kept if "ffn" in source.layers[idx].sizes
    }
    plan = replace(keep_everything(source), kept_layers=kept, kept_units={"ffn": half})
    shape = (WINDOWS, TOKENS)
    tokens = torch.randint(source.vocabulary, shape, generator=torch.Generator().manual_seed(1))
    stack, tokens = windows_that_fit(checkpoint, tokens, Compute(memory_bytes=LIMIT_BYTES))
    start = time.process_time()
    found = compensate(stack, plan, tokens, unfinished=folder / "mended")
    return {
        "peak_bytes": peak_bytes(),
        "cpu_seconds": time.process_time() - start,
        "tokens": tokens.numel(),
        "refitted": found.num_refitted,
        "layers": len(found.layers),
        "applications": stack.counters.layer_applications,
        "bytes_read": stack.counters.weight_bytes_read,
        "flops": predict_flops(source, tokens.numel()),
        "promised_bytes": stack.weight_bytes + stack.reserved_bytes,
    }


def main() -> None:
    """Measure and write the page."""
    import subprocess

    def alone(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, __file__, *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    with tempfile.TemporaryDirectory() as name:
        weight_bytes = write_random_checkpoint(Path(name)).weight_bytes
        bare, found = alone("bare"), alone("mend", name)
    above = found["peak_bytes"] - bare["peak_bytes"]
    verdict = "holds" if above <= ALLOWED_BYTES else "does not hold"
    page = f"""# Memory of mending a cut of a checkpoint larger than the memory it may use

A random Nemotron-H-like checkpoint of {weight_bytes / GIB:.2f} GiB in bfloat16, 32 layers with FFNs of 20,480; half of
the neurons and one layer go. `--device-memory 512MiB`, float32, one CPU thread.

| | |
|---|---:|
| tokens that the memory takes, of {WINDOWS * TOKENS:,} | {found["tokens"]:,} |
| peak memory above an interpreter with torch, MiB | {above / MIB:.0f} |
| memory that the dry run names, MiB | {found["promised_bytes"] / MIB:.0f} |
| layers refitted | {found["refitted"]} of {found["layers"]} |
| layer applications | {found["applications"]} |
| weights read, GiB | {found["bytes_read"] / GIB:.2f} |
| work that the dry run names, TFLOP | {found["flops"] / 1e12:.2f} |
| CPU seconds | {found["cpu_seconds"]:.0f} |

At most 700 MiB above the interpreter: {verdict}.
"""
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        print(json.dumps({"peak_bytes": peak_bytes()}))
    elif sys.argv[1:2] == ["mend"]:
        print(json.dumps(mend(Path(sys.argv[2]))))
    else:
        main()
