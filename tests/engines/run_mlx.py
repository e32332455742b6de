"""Runs in the mlx environment: log-probabilities of prompts, computed by mlx-lm in float32.

Arguments: folder, file with prompts (JSON, lists of token ids), output file (safetensors: ``logprobs.<i>``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model


def main(folder: str, prompts_file: str, out: str) -> None:
    """Run all prompts."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    results = {}
    for idx, prompt in enumerate(json.loads(Path(prompts_file).read_text())):
        logits = model(mx.array([prompt]))[0].astype(mx.float32)
        results[f"logprobs.{idx}"] = nn.log_softmax(logits, axis=-1)
    mx.save_safetensors(out, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
