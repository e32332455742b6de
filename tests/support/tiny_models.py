"""Tiny random checkpoints in a folder, as users have them: config.json, model.safetensors, a byte-level tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minipuzzle.architecture.families import FAMILIES, read_architecture
from minipuzzle.files.fused_experts import as_stored
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.files.safetensors_files import SINGLE_FILE
from minipuzzle.runtime.meta_models import prepare_layers

VOCABULARY = 272  # 3 special tokens, 256 bytes, and a few unused rows as real models have them
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1 and 2, as in the tiny config


def tiny_config(pattern: str = "M-M*-M-", **config_changes: Any) -> dict[str, Any]:
    """The tiny Nemotron-H config.json with a layer pattern and any other field changed."""
    layers = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    return {**FAMILIES["nemotron_h"].tiny_config, "vocab_size": VOCABULARY, **layers, **config_changes}


def published_config() -> dict[str, Any]:
    """config.json of Nemotron-H-56B at its published sizes (arXiv 2504.03624), for what reads no weights."""
    path = Path(__file__).parents[2] / "examples" / "nemotron_h_56b" / "config.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def write_tiny_checkpoint(folder: Path, *, pattern: str = "M-M*-M-", seed: int = 0, **config_changes: Any) -> Path:
    """A random model and a byte-level tokenizer in ``folder``; the same arguments give the same weights.

    Norms, biases, D and A_log are made uneven, so that a test that forgets one of them fails.
    """
    return _write_checkpoint(folder, tiny_config(pattern, **config_changes), seed)


def _write_checkpoint(folder: Path, config: dict[str, Any], seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    stored_dtype = getattr(torch, config["dtype"])
    save_tensors(folder, config, {name: t.to(stored_dtype) for name, t in random_tensors(config, seed).items()})
    write_byte_tokenizer(folder)
    return folder


def save_tensors(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], *, is_fused: bool = False
) -> None:
    """Write a model's tensors as its family stores them; ``is_fused``: experts together where it can be so."""
    architecture = read_architecture(config)
    stored = as_stored(architecture, tensors.items(), is_fused=is_fused or architecture.names.is_always_fused)
    contiguous = {name: tensor.contiguous() for name, tensor in stored}
    save_file(contiguous, folder / SINGLE_FILE, metadata={"format": "pt"})


TINY_CONFIGS = {name: config for family in FAMILIES.values() for name, config in family.tiny_configs.items()}
EVERY_CONFIG = sorted(TINY_CONFIGS)
NORM_EPSILONS = ("layer_norm_epsilon", "rms_norm_eps", "norm_eps")


def write_family_checkpoint(folder: Path, name: str, *, seed: int = 0, **config_changes: Any) -> Path:
    """A random model of any family from one of its tiny configs, with a byte-level tokenizer."""
    config = {**TINY_CONFIGS[name], "vocab_size": VOCABULARY, **config_changes}
    return _write_checkpoint(folder, config, seed)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Rewrite a checkpoint after ``change`` has edited its tensors, which it gets by their names on disk."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


def change_config(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """Rewrite a checkpoint's config.json without some fields, and with others changed."""
    config = {name: value for name, value in read_json(folder / "config.json").items() if name not in drop}
    write_json(folder / "config.json", {**config, **changes})
    return folder


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 weights of a config under their names on disk, each of a size at which every layer matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    family = FAMILIES[config["model_type"]]
    disk_names = {family.modules.module_name(placed.name): placed.name for placed in family.read(config).tensors()}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        hf_config = AutoConfig.for_model(config["model_type"], **settings)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        prepare_layers(model, config)
        tensors = {}
        stored_buffers = [item for item in model.named_buffers() if item[0] in model.state_dict()]
        for name, parameter in (*model.named_parameters(), *stored_buffers):
            if name.endswith("A_log") or parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter *= 4  # transformers' initial layers are close to the identity
            tensors[disk_names.get(name, name)] = parameter.detach().clone()
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    return tensors


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer that knows every byte, merges none and opens a text with ``<s>``, in transformers' format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = (*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE(vocab={symbol: idx for idx, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos).save_pretrained(
        folder
    )
