"""Tiny composites in folders, as transformers' own ``save_pretrained`` writes them: a language model and what sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minipuzzle.files.safetensors_files import SINGLE_FILE
from tests.support.tiny_models import TINY_CONFIGS, VOCABULARY, write_byte_tokenizer

_VISION = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}
_PIXTRAL = {**_VISION, "model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
# By name: the model type of the whole, that of its language model, and the vision tower.
COMPOSITES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5": (
        "qwen3_5",
        "qwen3_5_text",
        {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16},
    ),
    "mistral3": ("mistral3", "mistral", {**_PIXTRAL, "head_dim": 8}),
    "mistral3-ministral3": ("mistral3", "ministral3", {**_PIXTRAL, "head_dim": 8}),
}


def write_composite(folder: Path, name: str, **text_changes: Any) -> Path:
    """A random composite with a byte-level tokenizer; uneven norms, so that a test that forgets one fails."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    model_type, text_type, vision = COMPOSITES[name]
    text = {**TINY_CONFIGS[text_type], "vocab_size": VOCABULARY, **text_changes}
    tied = text["tie_word_embeddings"]
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else 3 * parameter
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def add_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put more tensors into a folder's single file."""
    path = folder / SINGLE_FILE
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


def composite_logits(folder: Path, token_ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of text by transformers' composite class, strictly loaded."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=token_ids_BT, use_cache=False).logits
    return logits
