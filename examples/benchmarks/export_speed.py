"""Export of a random checkpoint: peak memory and speed, against plain file copy plus hashing in the same run.

Each export runs in a process of its own, whose largest resident memory the system reports; seconds are those of the
export itself, without the imports, and the least of several rounds in which runs take turns. Writes export_speed.md
beside this file, and with it what block scales of the least error gain on the embedded model. With --folder FOLDER what
was measured is kept there, and the same command continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

import minipuzzle as mp
from minipuzzle.architecture.families import FAMILIES, family_of
from minipuzzle.architecture.quantities import GIB, MIB
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import sample_windows
from minipuzzle.export.algorithms import CalibrationMethod
from minipuzzle.export.reader import QuantizedCheckpoint
from minipuzzle.export.shards import TensorHeader, plan_shards, write_index
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.workflows.export import ExportRequest, export_checkpoint

EXAMPLE = Path(__file__).parents[1] / "tiny_hybrid"
MEMORY_LIMIT_BYTES = 400 * MIB  # of the layers in memory while calibrating and verifying
RUNS: dict[str, ExportRequest] = {
    "BF16, every tensor read back": ExportRequest(),
    "FP8, dynamic activations, not run": ExportRequest(scheme="fp8-dynamic", verifies=False),
    "FP8, one scale a tensor, not run": ExportRequest(scheme="fp8", verifies=False),
    "NVFP4, not run": ExportRequest(scheme="nvfp4", verifies=False),
    "NVFP4, two threads, not run": ExportRequest(scheme="nvfp4", workers=2, verifies=False),
    "NVFP4, block scales by error, not run": ExportRequest(scheme="nvfp4", block_scales="mse", verifies=False),
    "FP8, calibrated, run and compared": ExportRequest(scheme="fp8"),
}
SLOW_RUNS = ("NVFP4, block scales by error, not run", "FP8, calibrated, run and compared")
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 2, 64
NUM_ROUNDS = 3  # of the other runs
GAIN_TOKENS = 4_000


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run. ``cpu_seconds``: of all threads, the system's work for them included."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def write_random_checkpoint(folder: Path, *, num_pairs: int = 24, hidden: int = 2048) -> Path:
    """A hybrid with random BF16 weights, written tensor by tensor, with a real tokenizer."""
    folder.mkdir(parents=True)
    pattern = "M-" * num_pairs + "*-"
    config = {
        **FAMILIES["nemotron_h"].tiny_config,
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "mamba_num_heads": hidden // 32,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "chunk_size": 64,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / "model" / name, folder / name)
    tensors = list(family_of(config).read(config).tensors())
    units = [[TensorHeader(name=tensor.name, dtype="BF16", shape=tensor.shape)] for tensor in tensors]
    shards = plan_shards(folder, units, 10**9)
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        with shard.open():
            for header in shard.headers.values():
                values = torch.randn(header.shape, generator=generator) * (
                    hidden**-0.5 if len(header.shape) > 1 else 0.1
                )
                values += 1.0 if header.name.endswith(("norm.weight", "norm_f.weight")) else 0.0
                shard.write(header.name, values.to(torch.bfloat16))
    write_index(folder, shards)
    return folder


def copy_and_hash(source: Path, target: Path) -> None:
    """What any tool does at least: copy all files, then read and hash the copies."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        digest = hashlib.sha256()
        with (target / file.name).open("rb") as copied:
            while block := copied.read(1 << 20):
                digest.update(block)


def run_one(name: str, source: Path, target: Path) -> Measured:
    """One run in this process."""
    if name == "copy":
        return timed(name, lambda: copy_and_hash(source, target))
    checkpoint = Checkpoint.open(source)
    documents = read_documents([EXAMPLE / "text" / "calibration.jsonl"])
    token_ids = sample_windows(
        load_tokenizer(source), documents, num_samples=CALIBRATION_WINDOWS, sequence_length=CALIBRATION_TOKENS
    )
    request = RUNS[name]
    needs_text = request.scheme in ("fp8", "nvfp4")
    if not request.verifies and needs_text:
        # Calibration is measured by the run that is compared: here its result is put in place, as after a kill.
        _leave_calibration(checkpoint, request, token_ids, target)
    text, compute = token_ids if needs_text else None, Compute(memory_bytes=MEMORY_LIMIT_BYTES)
    return timed(name, lambda: export_checkpoint(checkpoint, target, request, compute, calibration_token_ids=text))


def timed(name: str, work: Callable[[], object]) -> Measured:
    """Time work until its files are on the disk."""
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    os.sync()
    return Measured(
        name=name,
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
        peak_bytes=peak_rss_bytes(),
    )


def _leave_calibration(checkpoint: Checkpoint, request: ExportRequest, token_ids: torch.Tensor, target: Path) -> None:
    from minipuzzle.files.outputs import PROVENANCE_FILE, output_record
    from minipuzzle.workflows.export import CALIBRATION_FILE

    partial = target.with_name(target.name + ".partial")
    partial.mkdir()
    write_json(partial / PROVENANCE_FILE, output_record(request.provenance(checkpoint, token_ids)))
    layout = request.layout(checkpoint)
    write_json(partial / CALIBRATION_FILE, {"inputs": dict.fromkeys(layout.quantized, 10.0), "outputs": {}})


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident; ru_maxrss would count its parent's as well."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def measure(name: str, source: Path, target: Path) -> Measured:
    """One run in a process of its own."""
    for leftover in (target, target.with_name(target.name + ".partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    command = [sys.executable, __file__, "--one", name, str(source), str(target)]
    # With one thread CPU seconds count work; threads that wait for each other on a busy machine would count, too.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    shutil.rmtree(target)
    return Measured(**json.loads(result.stdout.splitlines()[-1]))


def run(folder: Path, num_pairs: int) -> tuple[int, list[Measured]]:
    """Bytes of the checkpoint, and the best of each kind of run."""
    source, kept = folder / "source", folder / "measured.json"
    if not (source / "model.safetensors.index.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        write_random_checkpoint(source, num_pairs=num_pairs)
    names = ["copy", *RUNS]
    order = [name for name in names if name not in SLOW_RUNS] * NUM_ROUNDS + list(SLOW_RUNS)
    found = [Measured(**entry) for entry in json.loads(kept.read_text())] if kept.is_file() else []
    for name in order[len(found) :]:
        found.append(measure(name, source, folder / "out"))
        print(found[-1], flush=True)
        kept.write_text(json.dumps([asdict(entry) for entry in found]))
    return Checkpoint.open(source).weight_bytes, [best([f for f in found if f.name == name]) for name in names]


def best(rounds: list[Measured]) -> Measured:
    """The least seconds of either kind, and the most memory."""
    return Measured(
        name=rounds[0].name,
        seconds=min(entry.seconds for entry in rounds),
        cpu_seconds=min(entry.cpu_seconds for entry in rounds),
        peak_bytes=max(entry.peak_bytes for entry in rounds),
    )


def block_scale_gain() -> list[str]:
    """Rows of a table: what NVFP4 costs the embedded model by either choice of block scales."""
    source = Checkpoint.open(EXAMPLE / "model")
    data = [EXAMPLE / "text" / f"heldout_{name}.jsonl" for name in ("speeches", "code")]
    rows = []
    for block_scales in ("max", "mse"):
        with tempfile.TemporaryDirectory() as folder:
            out, calibration = Path(folder) / "out", EXAMPLE / "text" / "calibration.jsonl"
            written = mp.export(
                source,
                "nvfp4",
                data=calibration,
                samples=32,
                sequence_length=256,
                block_scales=block_scales,
                no_verify=True,
                out=out,
            )
            exported = QuantizedCheckpoint(written.checkpoint)
            found = mp.evaluate(exported, against=source, data=data, max_tokens=GAIN_TOKENS).rows
            errors = sums = 0.0
            for module in exported.layout.quantized:
                weight = source.tensor(f"{module}.weight").double()
                errors += float((exported.tensor(f"{module}.weight") - weight).square().sum())
                sums += float(weight.square().sum())
        figures = " | ".join(f"{row.kl:.4f} | {row.bits_per_byte:.4f}" for row in found.values())
        rows.append(f"| {block_scales} | {errors / sums:.5f} | {figures} |")
    return rows


def render(source_bytes: int, results: list[Measured], gain: list[str]) -> str:
    """The result page."""
    copy = results[0]
    lines = [
        f"| {r.name} | {r.seconds:.1f} | {copy.seconds / r.seconds:.2f} | {r.cpu_seconds:.1f} | "
        f"{copy.cpu_seconds / r.cpu_seconds:.2f} | {r.peak_bytes / GIB:.2f} |"
        for r in results
    ]
    calibration = f"{CALIBRATION_WINDOWS} windows of {CALIBRATION_TOKENS} tokens, {CalibrationMethod().algorithm}"
    return (
        f"""# Export of a random checkpoint of {source_bytes / GIB:.2f} GiB

Written by `make bench-export` on {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__} with one
thread, transformers {transformers.__version__}. One process a run, the best of {NUM_ROUNDS} rounds in which they took
turns, block scales by error and the last row once. *copy*: all files copied, then read and hashed (SHA-256). *seconds*:
until the files are on the disk. *CPU*: seconds of the processor, which other work on the machine disturbs less.
*speed*: relative to copy. *peak*: largest resident memory of the process, imports included. The last run also
calibrates ({calibration}) and runs the model three times, with {MEMORY_LIMIT_BYTES // MIB} MiB for one layer at a time;
the others write only.

| | seconds | speed | CPU | speed by CPU | peak GiB |
|---|---:|---:|---:|---:|---:|
"""
        + "\n".join(lines)
        + f"""

## NVFP4's block scales by their error

`--block-scales mse` maps the largest value of a block to 6 or to 4, whichever leaves the smaller squared error (arXiv
2512.02010). The embedded model, {GAIN_TOKENS:,} held-out tokens a text: *error* is that of all quantised weights over
their squares, *KL* to the source in nats/token, *bits* per byte.

| block scales | error | speeches: KL | bits | code: KL | bits | all: KL | bits |
|---|---:|---:|---:|---:|---:|---:|---:|
"""
        + "\n".join(gain)
        + "\n"
    )


def main() -> None:
    """Measure everything, or one run (internal)."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(asdict(run_one(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep what was measured here, and continue")
    parser.add_argument("--pairs", type=int, default=24, help="of Mamba-2 and MLP layers: 24 are 3 GiB")
    options = parser.parse_args()
    kept: Path | None = options.folder
    with nullcontext(kept) if kept is not None else tempfile.TemporaryDirectory() as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page = render(*run(Path(folder), options.pairs), block_scale_gain())
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
