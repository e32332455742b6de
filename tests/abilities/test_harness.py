"""Guarantee: lm-eval runs its tasks on our folders, with the log-likelihoods that our own tasks find."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from minipuzzle.abilities.items import Sampling
from minipuzzle.abilities.tasks.choices import PIQA
from minipuzzle.runtime.compute import Compute
from minipuzzle.workflows.abilities.harness import harness_model, open_local, run_harness
from minipuzzle.workflows.demo import EXAMPLE
from tests.support.cli import run_json

pytest.importorskip("lm_eval", reason="the extra `eval` (lm-eval) is not installed")

MODEL = EXAMPLE / "model"
TASK = """
task: ours
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
---
"""
QUESTIONS = [
    ("Who leads the United States?", "The President", "A window of paper"),
    ("What does Congress pass?", "the river", "laws for the country"),
    ("How is a file opened in Python?", "with open(path) as file", "the Senate and House"),
    ("Where do ships sail?", "on the sea", "in the library of the treasury"),
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    records = [
        {"goal": goal, "sol1": one, "sol2": other, "label": idx % 2} for idx, (goal, one, other) in enumerate(QUESTIONS)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (tmp_path / "ours.yaml").write_text(TASK.format(data=data).replace("---\n", ""), encoding="utf-8")
    return tmp_path


def test_lm_eval_finds_the_log_likelihoods_of_our_own_task(tasks: Path) -> None:
    harness_model()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="minipuzzle",
        model_args={"pretrained": str(MODEL), "device": "cpu"},
        tasks=["ours"],
        task_manager=TaskManager(include_path=str(tasks)),
    )
    local = open_local(MODEL, Compute())
    theirs = {}
    for sample in found["samples"]["ours"]:
        for (prompt, option), (likelihood, _) in zip(
            [tuple(pair.values()) for pair in sample["arguments"].values()]
            if isinstance(sample["arguments"], dict)
            else sample["arguments"],
            sample["filtered_resps"],
            strict=True,
        ):
            theirs[prompt, option] = float(likelihood)
    items = PIQA.items(Sampling(num_items=99, data=tasks / "data.jsonl"))
    pairs = [(item.prompt, option) for item in items for option in item.options]
    assert theirs.keys() == set(pairs) and len(pairs) == 8
    for pair, likelihood in zip(pairs, local.log_likelihoods(pairs), strict=True):
        assert theirs[pair] == pytest.approx(likelihood, rel=1e-6)


def test_evaluate_runs_tasks_of_lm_eval(tasks: Path) -> None:
    arguments = ("--tasks", "ours", "--task-folder", tasks, "--limit", 2, "--device", "cpu")
    found = run_json("evaluate", MODEL, *arguments)
    assert found["tasks"]["ours"]["acc,none"] in (0.0, 0.5, 1.0)
    assert found["tasks"]["ours"] == run_harness(str(MODEL), ["ours"], limit=2, folder=tasks, compute=Compute())["ours"]


def test_text_longer_than_the_context_is_measured_window_by_window() -> None:
    from lm_eval.api.instance import Instance

    model = harness_model()(str(MODEL), device="cpu")
    text = "The President of the United States met the Congress. " * 4

    def request(*arguments: object) -> Instance:
        return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)

    (whole,) = model.loglikelihood_rolling([request(text)])
    ((likelihood, is_greedy),) = model.loglikelihood([request("", text)])
    assert whole == pytest.approx(likelihood, rel=1e-6) and not is_greedy and math.isfinite(whole)
    assert model.generate_until([request("The President of the", {"until": ["\n"], "max_gen_toks": 4})])[0]
