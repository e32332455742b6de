"""What lies beside weights: tokenizer, generation settings, licence. No command of ours changes it."""

from __future__ import annotations

import shutil
from pathlib import Path

# What makes a folder of weights usable.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder, which transformers reads


def companion_files(source: Path) -> dict[str, Path]:
    """The tokenizer, generation settings and licence of a folder, by their names within it."""
    templates = (f"{CHAT_TEMPLATES}/{path.name}" for path in sorted((source / CHAT_TEMPLATES).glob("*.jinja")))
    return {name: source / name for name in (*COMPANION_FILES, *templates) if (source / name).is_file()}


def copy_companions(source: Path, target: Path) -> None:
    """Carry the tokenizer, generation settings and licence along."""
    for name, path in companion_files(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
