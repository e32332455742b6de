"""Train a tiny mixture of experts on speeches and code, in minutes of one CPU core: something to cut experts of.

A Qwen3-MoE of 1.8 million parameters with 16 experts in each of 4 blocks, two a token, on the text of
``examples/tiny_hybrid`` and with its tokenizer, embeddings and head. The usual balancing loss keeps all experts in use
over both kinds of text; which of them serve which kind is theirs to find.

    python examples/tiny_moe/train_experts.py [--steps N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).parent
HYBRID = HERE.parent / "tiny_hybrid"
ROW_TOKENS, ROWS = 256, 4
LEARNING_RATE, WARM_UP_STEPS, WEIGHT_DECAY, GRADIENT_NORM = 4e-3, 10, 0.1, 1.0
CONFIG: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 128,
    "norm_topk_prob": True,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def token_streams(tokenizer: Any) -> list[Tensor]:
    """The training text of each kind as one stream of tokens."""
    texts: dict[str, list[str]] = {}
    for line in (HYBRID / "text" / "distillation.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts.setdefault(record["source"], []).append(record["text"])
    return [torch.cat([torch.tensor(ids) for ids in tokenizer(texts[kind])["input_ids"]]) for kind in sorted(texts)]


def batches(streams: list[Tensor], seed: int = 1) -> Iterator[Tensor]:
    """Rows from random places, as many of each kind."""
    random = np.random.default_rng(seed)
    while True:
        rows = []
        for row in range(ROWS):
            stream = streams[row % len(streams)]
            start = int(random.integers(len(stream) - ROW_TOKENS))
            rows.append(stream[start : start + ROW_TOKENS])
        yield torch.stack(rows)


def rate(step: int, num_steps: int) -> float:
    """A short warm-up, then half a cosine."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))


def start_from_hybrid(model: Qwen3MoeForCausalLM) -> None:
    """Take embeddings and head of the embedded hybrid, which stay as they are: they know the words already."""
    weights = load_file(HYBRID / "model" / "model.safetensors")
    for module, name in ((model.model.embed_tokens, "backbone.embeddings"), (model.lm_head, "lm_head")):
        module.weight.data = weights[f"{name}.weight"].float()
        module.weight.requires_grad_(False)


def main() -> None:
    """Train, and write the folder of the model with its tokenizer and the log of the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    arguments = parser.parse_args()
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(HYBRID / "model")
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
    start_from_hybrid(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    log, started, rows = [], time.process_time(), batches(token_streams(tokenizer))
    for step in range(arguments.steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate(step, arguments.steps)
        tokens = next(rows)
        output = model(tokens, labels=tokens)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            balance = CONFIG["router_aux_loss_coef"] * output.aux_loss
            record = {"step": step + 1, "loss": round((output.loss - balance).item(), 4)}
            log.append({**record, "seconds": round(time.process_time() - started)})
            print(log[-1], flush=True)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(HYBRID / "model" / name, arguments.out / name)
    text = "".join(json.dumps(record) + "\n" for record in log)
    (arguments.out / "training_log.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
