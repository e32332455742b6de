"""Scoring an 8B hybrid on a GPU: a random bfloat16 checkpoint of Nemotron-H-8B's public shape, 128 samples of 4096.

Writes score_8b_gpu.md: minutes, peak device memory against --device-memory 24GiB, the share of the measured bfloat16
matmul rate that is reached, and which implementation of the Mamba-2 scan ran. Without a GPU it says so and stops.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from importance.layers import alteration_tree, removal_plans, score_plans
from importance.work import open_stack
from minipuzzle.architecture.families import FAMILIES
from minipuzzle.architecture.quantities import GIB
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.files.safetensors_files import ShardWriter
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.mamba_scan import scan_path

SAMPLES, TOKENS = 128, 4096
LIMIT_BYTES, LIMIT_MINUTES = 24 * GIB, 15
PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"  # nvidia/Nemotron-H-8B-Base-8K's config.json
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "vocab_size": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "chunk_size": 128,
    "max_position_embeddings": 8192,
}


def write_random_checkpoint(folder: Path, device: str) -> Checkpoint:
    """Random weights at which activations stay of one size, one tensor at a time."""
    layers = {"hybrid_override_pattern": PATTERN, "num_hidden_layers": len(PATTERN)}
    config = {**FAMILIES["nemotron_h"].tiny_config, **SIZES, **layers, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    write_json(folder / "config.json", config)
    writer = ShardWriter(folder)
    for placed in FAMILIES["nemotron_h"].read(config).tensors():
        tensor = torch.randn(placed.shape, device=device) * (
            0.1 if len(placed.shape) == 1 else placed.shape[-1] ** -0.5
        )
        writer.add(placed.name, (tensor + (len(placed.shape) == 1)).bfloat16().cpu())
    writer.finish()
    return Checkpoint.open(folder)


def matmul_rate(device: str, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a square bfloat16 product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def main(device: str = "cuda") -> None:
    """Measure and write the page."""
    if not torch.cuda.is_available():
        print("There is no GPU here: this benchmark was not run.")
        return
    with tempfile.TemporaryDirectory() as name:
        checkpoint = write_random_checkpoint(Path(name), device)
        rate = matmul_rate(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        tokens = torch.randint(SIZES["vocab_size"], (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        compute = Compute(device=device, dtype="bfloat16", memory_bytes=LIMIT_BYTES)
        stack = open_stack(checkpoint, compute, sequence_length=TOKENS)
        score_plans(stack, removal_plans(stack.architecture, range(stack.num_layers)), tokens)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    source = checkpoint.architecture
    levels = alteration_tree(source, removal_plans(source, range(len(PATTERN)))).levels
    layer_elements = [sum(t.num_elements for t in source.layer_tensors(i)) for i in range(len(PATTERN))]
    elements = sum(level.num_applications * layer_elements[level.layer_idx] for level in levels)
    elements += (len(PATTERN) + 1) * source.vocabulary * source.hidden
    share = 2 * elements * SAMPLES * TOKENS / seconds / rate
    peak = torch.cuda.max_memory_allocated()
    page = f"""# Scoring an 8B hybrid on a GPU

{torch.cuda.get_device_name()}, torch {torch.__version__}; {len(PATTERN)} layers, {source.num_parameters / 1e9:.2f} B
parameters, {SAMPLES} samples of {TOKENS:,} tokens, bfloat16, all five metrics. Mamba-2 scan: {scan_path(device)}.

| | measured | wanted |
|---|---:|---:|
| minutes | {seconds / 60:.1f} | {LIMIT_MINUTES} |
| peak device memory, GiB | {peak / GIB:.1f} | {LIMIT_BYTES / GIB:.0f} |
| share of the measured bfloat16 matmul rate ({rate / 1e12:.0f} TFLOP/s) | {share:.0%} | |
"""
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
