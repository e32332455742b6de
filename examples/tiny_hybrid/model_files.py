"""Configuration of the tiny hybrid model and its files in the portable Nemotron-H form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
PATTERN = "M-M-M*-" * 3 + "M-M*-"
VOCABULARY_SIZE = 4096
MAXIMUM_TOKENS = 4096

# The schema of NVIDIA's own checkpoints: a pattern string, no list of layer types, no expert keys.
PORTABLE_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": len(PATTERN),
    "hybrid_override_pattern": PATTERN,
    "intermediate_size": 512,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 32,
    "expand": 2,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "use_bias": False,
    "use_conv_bias": True,
    # Safe for whoever initialises this shape anew; training and measuring set it to 0 in memory (no clamp).
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "layer_norm_epsilon": 1e-05,
    "residual_in_fp32": False,
    "rescale_prenorm_residual": True,
    "initializer_range": 0.02,
    "max_position_embeddings": MAXIMUM_TOKENS,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "use_cache": True,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}


def new_model(seed: int) -> NemotronHForCausalLM:
    """Return a float32 model with fresh weights (dt in [time_step_min, time_step_max]) and no clamp."""
    torch.manual_seed(seed)
    settings = {key: value for key, value in PORTABLE_CONFIG.items() if key not in ("dtype", "torch_dtype")}
    model = NemotronHForCausalLM(NemotronHConfig(**settings))
    remove_time_step_clamp(model)
    return model


def load_model(folder: Path) -> NemotronHForCausalLM:
    """Load a saved model as float32 without the time-step clamp."""
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    remove_time_step_clamp(model)
    return model


def remove_time_step_clamp(model: NemotronHForCausalLM) -> None:
    """Set the lower limit of dt to 0: other engines do not clamp, so trained weights must not rely on it."""
    model.config.time_step_min = 0.0
    for module in model.modules():
        # Each Mamba mixer cached the limit when it was built.
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))


def portable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return bf16 copies of the weights under NVIDIA's names (`backbone.` for transformers' `model.`)."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        portable = "backbone." + name.removeprefix("model.") if name.startswith("model.") else name
        tensors[portable] = tensor.detach().to(torch.bfloat16).contiguous()
    return tensors


def save_model(model: nn.Module, tokenizer_folder: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer to `folder`, replacing it by rename once complete."""
    pending = folder.with_name(folder.name + ".pending")
    retired = folder.with_name(folder.name + ".retired")
    shutil.rmtree(pending, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)
    pending.mkdir(parents=True)
    save_file(portable_tensors(model), pending / "model.safetensors", metadata={"format": "pt"})
    write_json(pending / "config.json", PORTABLE_CONFIG)
    ids = {key: PORTABLE_CONFIG[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    write_json(pending / "generation_config.json", ids)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, pending / name)
    if folder.exists():
        folder.rename(retired)
    pending.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
