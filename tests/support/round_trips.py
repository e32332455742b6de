"""There and back: a checkpoint by transformers' own ``save_pretrained``, read, measured, cut and exported by us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import minipuzzle
from minipuzzle.cut.plan import plan_without
from minipuzzle.files.checkpoint import Checkpoint
from tests.support.cli import run_cli, run_json
from tests.support.foreign_exports import PROGRAMS
from tests.support.tiny_models import EVERY_CONFIG, write_family_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "round_trips.md"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
STORED = {"float32": "1GB", "bfloat16": "20KB"}  # precision, and the size of a shard: one, and several
TOLERANCE = 1e-4  # of logits of about 10; both sides compute in float32
TITLE = """# Round trips

Written by `docs/write_round_trips.py`, which runs what the tests run; a test fails where this page is not what holds.

Every row: a tiny model saved by the program, in FP32 in one shard and in BF16 in several, with tokenizer, chat template
and generation settings. Our logits equal transformers' within 0.0001; `score --dry-run` accepts it; its last block
is cut; the cut is exported to BF16, and transformers' logits of the export equal ours.

"""


FOREIGN_TITLE = """
## Quantised exports of other programs

Every row: a tiny model quantised, calibrated and exported by ModelOpt's own `export_hf_checkpoint`, or by the package
compressed-tensors, whose compressors and config.json are what llm-compressor saves. Our logits equal theirs before
export within a KL of 0.00001, and `verify --against` the source ends with ok. ModelOpt 0.47 gives queries, keys and
values scales of their own, which engines then round again: `verify` lists them.

Refused by name: ModelOpt 0.47 writes NUL bytes into the list of what stays BF16 of `nemotron_h`, which vLLM misreads
without a word; compressed-tensors quantises no experts that transformers keeps in one tensor, ModelOpt not those of
`gpt_oss`; and the projections of Qwen3.5 to one number a head are read in plain precision only.

"""


def save_by_transformers(name: str, work: Path, dtype: str) -> Path:
    """A tiny model as transformers writes it, with everything that it writes beside the weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source, folder = write_family_checkpoint(work / "source", name), work / "saved"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=7)
    model.save_pretrained(folder, max_shard_size=STORED[dtype])
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (dtype == "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@torch.inference_mode()
def difference(folder: Path) -> float:
    """The largest difference of our logits from transformers', both in float32."""
    from transformers import AutoModelForCausalLM

    token_ids = torch.arange(3, 35)[None]
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours: Any = minipuzzle.load(folder)
    found = (ours(token_ids, use_cache=False).logits.float() - theirs(token_ids, use_cache=False).logits).abs()
    return float(found.max())


def round_trip(name: str, work: Path) -> list[str]:
    """One row of the page; raises where a step fails."""
    worst = 0.0
    for dtype in STORED:
        folder = save_by_transformers(name, work / dtype, dtype)
        cut, exported, text = (work / dtype / what for what in ("cut", "exported", "text.txt"))
        text.write_text("some words, and more of them; " * 20, encoding="utf-8")
        measured = ["--data", text, "--samples", 2, "--sequence-length", 16, "--device", "cpu"]
        assert run_cli("score", folder, *measured, "--dry-run", "-o", work / "scores").exit_code == 0
        architecture = Checkpoint.open(folder).architecture
        plan = work / dtype / "plan.json"
        plan.write_text(plan_without(architecture, architecture.blocks[-1]).to_json(), encoding="utf-8")
        run_json("prune", folder, "--plan", plan, "-o", cut)
        run_json("export", cut, "--bf16", "--device", "cpu", "-o", exported)
        for companion in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
            assert (exported / companion).read_bytes() == (folder / companion).read_bytes(), companion
        worst = max(worst, *(difference(each) for each in (folder, cut, exported)))
    assert worst <= TOLERANCE, f"{name}: logits differ by {worst}"
    return [f"`{name}`", "yes", "yes", "yes", "yes"]


def row(cells: list[str]) -> str:
    """A line of the table."""
    return "| " + " | ".join(cells) + " |\n"


def page(rows: list[list[str]], foreign: list[list[str]]) -> str:
    """The whole page."""
    header = ["transformers' `save_pretrained` of", "read", "measured", "cut", "exported and back"]
    assert len(rows) == len(foreign) == len(EVERY_CONFIG)
    return TITLE + _table(header, rows) + FOREIGN_TITLE + _table(["exports of", *PROGRAMS], foreign)


def _table(header: list[str], rows: list[list[str]]) -> str:
    return row(header) + "|" + "---|" * len(header) + "\n" + "".join(map(row, rows))
