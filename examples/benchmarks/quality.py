"""What cuts keep before any training, by how they were chosen and whether they were mended: held-out KL to the source.

At each budget, cuts of the embedded hybrid chosen in different ways are compared on text that neither measuring nor
mending saw. All ways but block influence choose from the same grid of layer counts and one FFN width.

- ours: candidates measured by running them, refined; the best three are mended, and validation text decides.
- ours, Mamba heads too: the same from a grid that also varies the number of Mamba heads.
- ours, not mended: the best measured one, its weights as they were.
- Minitron's rule: layers ranked in one global list by 1 - cosine(input, output), the largest cut that fits.
- block influence: layers dropped by the same score until the rest fits, no width cut (ShortGPT).
- additive: the least sum of single-layer KL scores that fits (the integer programme over layers).
- random: random layers under random counts and widths of the grid; the best neurons.
- additive, mended: what mending alone gains, without a measured choice.

The run continues where it was stopped: every cut leaves a line in the results file. quality.md lies beside this file.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from recovery import BUDGETS, DEPLOYMENT, EXAMPLE, METRIC, Setting, block_influence, minitron_plan, random_plan

from importance.candidates import rank_plans
from importance.compensate import mended_quality
from minipuzzle.cut.plan import Plan, read_plan
from minipuzzle.cut.scores import read_scores
from minipuzzle.cut.selection import make_plan
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import EvaluationWindows, evaluation_windows, sample_windows, windows_of_tokens
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.quality.evaluate import documents_within
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.search.request import SearchRequest
from minipuzzle.workflows.choosing.compare import ChoosingSettings, compare

PAGE = Path(__file__).with_suffix(".md")
DOMAINS = ("speeches", "code")
HELD_OUT_TOKENS = 6_000  # of each domain
VALIDATION_TOKENS = 4_000
MENDING_WINDOWS, WINDOW_TOKENS = 64, 256
RANKING_WINDOWS, CANDIDATES, FINALISTS, SEEDS = 8, 12, 3, 3
OURS, HEADS, PLAIN = "ours", "ours, Mamba heads too", "ours, not mended"
MINITRON, INFLUENCE, ADDITIVE = "Minitron's rule", "block influence", "additive"
MENDED_ADDITIVE = "additive, mended"
RANDOM = tuple(f"random {seed}" for seed in range(SEEDS))
WAYS = (OURS, HEADS, MENDED_ADDITIVE, PLAIN, ADDITIVE, MINITRON, INFLUENCE, *RANDOM)


class HeadsToo(Setting):
    """The same grid with 4, 6 or 8 Mamba heads."""

    def request(self, budget: str) -> SearchRequest:
        return replace(super().request(budget), widths={"ssm_head": "4,6,8"})


def influence_plan(setting: Setting, budget: str) -> Plan:
    """As few layers as possible dropped, those of least influence first, so that the rest fits."""
    source = setting.teacher.architecture
    best_last = np.argsort(block_influence(setting), kind="stable")
    for num_dropped in range(1, len(source.layers)):
        kept = sorted(int(idx) for idx in best_last[num_dropped:])
        plan = make_plan(source, setting.scores, kept_layers=kept, widths={})
        if setting.problem(budget).neighbourhood.fits(plan.apply(source)):
            return plan
    raise AssertionError("nothing fits")


def finalists(setting: Setting, budget: str) -> list[Plan]:
    """The best measured cuts, refined; from an earlier run where there was one."""
    folder = setting.folder / f"{type(setting).__name__}-{budget.rstrip('%')}"
    paths = [folder.with_name(f"{folder.name}-{number}.json") for number in range(FINALISTS)]
    if not all(path.is_file() for path in paths):
        for path, plan in zip(paths, _found_finalists(setting, budget), strict=True):
            path.write_text(plan.to_json())
    return [read_plan(path) for path in paths]


def _found_finalists(setting: Setting, budget: str) -> list[Plan]:
    assert setting.scores.token_ids is not None
    token_ids = torch.from_numpy(setting.scores.token_ids).long()[:RANKING_WINDOWS]
    windows = windows_of_tokens(load_tokenizer(setting.teacher.folder), token_ids)
    found = compare(setting.problem(budget), windows, ChoosingSettings(num_candidates=CANDIDATES, refine=True))
    return [item.plan for item in found.ranked[:FINALISTS]]


class Bench:
    """Plans and figures of one run; ``rows``: by budget, then by way, KL by domain and the cut in words."""

    def __init__(self, setting: Setting, file: Path, windows: Mapping[str, EvaluationWindows]) -> None:
        self.setting, self.file, self.windows = setting, file, windows
        self.rows: dict[str, dict[str, dict[str, float | str]]] = read_json(file) if file.is_file() else {}
        tokenizer = load_tokenizer(setting.teacher.folder)
        documents = read_documents([EXAMPLE / "text" / "calibration.jsonl"])
        self.token_ids = sample_windows(
            tokenizer, documents, num_samples=MENDING_WINDOWS, sequence_length=WINDOW_TOKENS
        )

    def run(self, budget: str, way: str) -> None:
        """Measure one cut, if that is not done."""
        if way in self.rows.setdefault(budget, {}):
            return
        setting = HeadsToo(**vars(self.setting)) if way == HEADS else self.setting
        is_mended = way in (OURS, HEADS, MENDED_ADDITIVE)
        plan = self.plan(setting, budget, way)
        assert setting.problem(budget).neighbourhood.fits(plan.apply(setting.teacher.architecture))
        figures = self.mended(plan) if is_mended else self.plain(plan)
        left = plan.apply(setting.teacher.architecture)
        counts = " ".join(f"{left.pattern.count(symbol)}{symbol}" for symbol in "M*-").replace("*", "\\*")
        heads = left.width("ssm_head")
        words = f"{counts}, FFN {left.width('ffn')}" + (f", {heads} heads" if heads != 8 else "")
        self.rows[budget][way] = {**figures, "cut": words}
        write_json(self.file, self.rows)
        print(budget, way, self.rows[budget][way], flush=True)

    def plan(self, setting: Setting, budget: str, way: str) -> Plan:
        """The cut of a way."""
        of_way: dict[str, Callable[[], Plan]] = {
            PLAIN: lambda: finalists(setting, budget)[0],
            MINITRON: lambda: minitron_plan(setting, budget),
            INFLUENCE: lambda: influence_plan(setting, budget),
            ADDITIVE: lambda: setting.problem(budget).predicted_plans(1)[0],
        }
        of_way[MENDED_ADDITIVE] = of_way[ADDITIVE]
        if way in of_way:
            return of_way[way]()
        if way in RANDOM:
            return random_plan(setting, budget, RANDOM.index(way))
        candidates = finalists(setting, budget)
        return min(candidates, key=lambda plan: self.kl(plan, self.setting.validation))

    def kl(self, plan: Plan, windows: EvaluationWindows) -> float:
        """Of a mended cut."""
        found = mended_quality(LayerStack(self.setting.teacher), plan, self.token_ids, windows)
        assert found.kl is not None
        return found.kl

    def mended(self, plan: Plan) -> dict[str, float]:
        """KL by domain of a mended cut."""
        return {domain: self.kl(plan, windows) for domain, windows in self.windows.items()}

    def plain(self, plan: Plan) -> dict[str, float]:
        """KL by domain of a cut whose weights are the source's."""
        return {
            domain: rank_plans(self.setting.teacher, [plan], windows)[0].kl for domain, windows in self.windows.items()
        }


def overall(row: Mapping[str, float | str]) -> float:
    """The mean of both domains."""
    return mean(float(row[domain]) for domain in DOMAINS)


def page(rows: Mapping[str, Mapping[str, Mapping[str, float | str]]]) -> str:
    """The page of all budgets that are measured."""
    lines = [
        "# What cuts keep before any training",
        "",
        "KL to the source in nats a token, the mean of held-out speeches and held-out code (about "
        f"{HELD_OUT_TOKENS:,} tokens each),",
        "by budget as a share of the embedded hybrid's memory at a context of 4,096. Written by `quality.py` "
        "(`make bench-quality`),",
        f"whose docstring says what each way does; mended on {MENDING_WINDOWS * WINDOW_TOKENS:,} tokens.",
        "",
        f"| way | {' | '.join(sorted(rows, reverse=True))} |",
        f"|---|{'---|' * len(rows)}",
    ]
    for way in (*WAYS[: -len(RANDOM)], "random"):
        lines.append(
            f"| {way} | {' | '.join(_cell(of_budget, way) for _, of_budget in sorted(rows.items(), reverse=True))} |"
        )
    lines += ["", "Each cut, by domain:", "", "| budget | way | cut | speeches | code |", "|---|---|---|---|---|"]
    for budget, of_budget in sorted(rows.items(), reverse=True):
        for way in sorted(of_budget, key=lambda way: overall(of_budget[way])):
            row = of_budget[way]
            lines.append(f"| {budget} | {way} | {row['cut']} | {row['speeches']:.4f} | {row['code']:.4f} |")
    return "\n".join(lines) + "\n"


def _cell(of_budget: Mapping[str, Mapping[str, float | str]], way: str) -> str:
    if way != "random":
        return f"{overall(of_budget[way]):.4f}" if way in of_budget else ""
    found: Sequence[float] = [overall(of_budget[name]) for name in RANDOM if name in of_budget]
    return f"{mean(found):.3f} ± {stdev(found):.3f}" if len(found) > 1 else ""


def main() -> None:
    """Measure what is missing and write the page; what stands below a second heading stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("recovery_output/quality"))
    parser.add_argument("--scores", type=Path, required=True, help="Scores of examples/tiny_hybrid/model.")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    teacher = Checkpoint.open(EXAMPLE / "model")
    tokenizer = load_tokenizer(teacher.folder)

    def windows(name: str, tokens: int) -> EvaluationWindows:
        documents = read_documents([EXAMPLE / "text" / f"{name}.jsonl"])
        random.Random(0).shuffle(documents)  # validation is sorted by kind of text
        return evaluation_windows(tokenizer, documents_within(tokenizer, documents, tokens), sequence_length=256)

    validation, held_out = windows("validation", VALIDATION_TOKENS), {}
    for domain in DOMAINS:
        held_out[domain] = windows(f"heldout_{domain}", HELD_OUT_TOKENS)
    setting = Setting(
        teacher=teacher,
        scores=read_scores(options.scores),
        folder=options.folder,
        tokens=0,
        ranking_windows=RANKING_WINDOWS,
        validation=validation,
        heldout=validation,
    )
    assert METRIC == "kl" and DEPLOYMENT.context_tokens == 4096  # as the page says
    bench = Bench(setting, options.folder / "rows.json", held_out)
    for way in (ADDITIVE, MENDED_ADDITIVE, MINITRON, INFLUENCE, *RANDOM, PLAIN, OURS, HEADS):
        for budget in reversed(BUDGETS):
            bench.run(budget, way)
            below = PAGE.read_text(encoding="utf-8").partition("\n## ") if PAGE.is_file() else ("", "", "")
            PAGE.write_text(page(bench.rows) + "".join(below[1:]), encoding="utf-8")


if __name__ == "__main__":
    main()
