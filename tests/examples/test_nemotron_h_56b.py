"""Guarantee: the worked example runs as its page says, and its figures follow from the published sizes by hand.

Sizes: arXiv 2504.03624, section 2.1. The formulas below are written out here, apart from the registry.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from minipuzzle.commands.cli import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "nemotron_h_56b"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip()
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
HIDDEN, VOCABULARY, CONTEXT = 8192, 131072, 1_000_000
SSM_INNER, SSM_BC, SSM_HEADS, SSM_STATE = 256 * 64, 2 * 8 * 256, 256, 256
MAMBA_LINEAR = (2 * SSM_INNER + SSM_BC + SSM_HEADS) * HIDDEN + HIDDEN * SSM_INNER
MAMBA_OTHER = (SSM_INNER + SSM_BC) * (4 + 1) + 3 * SSM_HEADS + SSM_INNER + HIDDEN
ATTENTION_LINEAR = 2 * (64 + 8) * 128 * HIDDEN


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(command: str) -> Result:
    program, *arguments = shlex.split(command)
    assert program == "minipuzzle"
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    """What the command with the published counts prints."""
    return printed(in_nvfp4=False)


def printed(*, in_nvfp4: bool) -> dict[str, Any]:
    commands = (line for line in COMMANDS if "search" in line and "--json" in line)
    (command,) = (line for line in commands if ("--head nvfp4" in line) == in_nvfp4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        result = run(command)
    assert ("`minipuzzle export` does not write" in result.stderr) == in_nvfp4
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_runs(command: str) -> None:
    assert run(command).exit_code == 0


def test_the_config_has_the_published_pattern() -> None:
    pattern = json.loads((FOLDER / "config.json").read_text())["hybrid_override_pattern"]
    assert len(pattern) == 118
    assert [idx for idx, symbol in enumerate(pattern) if symbol == "*"] == [7, 18, 29, 40, 51, 62, 73, 84, 95, 106]
    assert (pattern.count("M"), pattern.count("-"), pattern[0], pattern[-1]) == (54, 54, "M", "-")


def test_parameters_are_those_of_the_published_sizes(published: dict[str, Any]) -> None:
    mlp = 2 * HIDDEN * 30720 + HIDDEN
    layers = 45 * (MAMBA_LINEAR + MAMBA_OTHER) + 48 * mlp + 5 * (ATTENTION_LINEAR + HIDDEN)
    assert published["num_parameters"] == layers + 2 * VOCABULARY * HIDDEN + HIDDEN
    assert published["num_parameters"] == pytest.approx(47e9, rel=0.01)  # the name of the released model
    assert f"{published['num_parameters']:,} parameters" in PAGE


def test_recovery_is_estimated_for_the_published_cut(published: dict[str, Any]) -> None:
    pruned, source = (json.loads((FOLDER / name).read_text()) for name in ("pruned_config.json", "config.json"))
    changed = {name: value for name, value in pruned.items() if value != source[name]}
    assert changed == {
        "hybrid_override_pattern": published["pattern"],
        "num_hidden_layers": published["num_layers"],
        "intermediate_size": published["widths"]["ffn"],
    }
    (command,) = (line for line in COMMANDS if "--estimate" in line)
    found = json.loads(run(command).stdout)
    by_gpus = {estimate["num_processes"]: estimate for estimate in found["runs"]}
    assert list(by_gpus) == [8, 64, 512]
    assert any("135.98 GiB" in problem for problem in by_gpus[8]["problems"]) and not by_gpus[64]["problems"]
    figures = f"64 take {by_gpus[64]['memory_bytes'] / 2**30:.2f} GiB each and about {by_gpus[64]['hours']:.0f} hours"
    assert f"{figures}, 512 about {by_gpus[512]['hours']:.0f}." in " ".join(PAGE.split())


@pytest.mark.parametrize("in_nvfp4", [False, True])
def test_memory_terms_are_those_of_the_published_sizes(in_nvfp4: bool) -> None:
    """NVFP4 takes 9 bytes for 16 elements; every width here is a multiple of 16."""
    found = printed(in_nvfp4=in_nvfp4)
    matrix_bytes, cache_bytes = (9 / 16, 9 / 16) if in_nvfp4 else (2, 1)  # of an element
    linear = 45 * MAMBA_LINEAR + 48 * 2 * HIDDEN * 30720 + 5 * ATTENTION_LINEAR
    num_linears = 45 * 2 + 48 * 2 + 5 * 4
    expected = {
        "linear weights": linear * 9 // 16,
        "scales of weights and KV cache": 4 * (2 * num_linears + 2 * 5 + (3 if in_nvfp4 else 0)),
        "norms, convolutions, vectors": 2 * (45 * MAMBA_OTHER + (48 + 5 + 1) * HIDDEN),
        "embeddings": VOCABULARY * HIDDEN * matrix_bytes,
        "LM head": VOCABULARY * HIDDEN * matrix_bytes,
        "KV cache": 5 * 2 * 8 * 128 * CONTEXT * cache_bytes,
        "SSM state": 45 * SSM_INNER * SSM_STATE * 4,
        "convolution state": 45 * (SSM_INNER + SSM_BC) * 3 * 2,
    }
    assert {term["name"]: term["num_bytes"] for term in found["memory_terms"]} == expected
    assert found["memory_bytes"] == sum(expected.values())
    assert (found["memory_bytes"] < 31.7 * 2**30) == in_nvfp4
    assert f"{found['memory_bytes'] / 2**30:.2f} GiB" in PAGE


def test_the_lowest_of_each_kind_go_and_the_rest_is_the_pattern(published: dict[str, Any]) -> None:
    pattern = json.loads((FOLDER / "config.json").read_text())["hybrid_override_pattern"]
    scores = json.loads((FOLDER / "scores.json").read_text())["layer"]["mse"]
    expected = set()
    for symbol, number in (("M", 9), ("-", 6), ("*", 5)):
        of_kind = [idx for idx in range(118) if pattern[idx] == symbol]
        expected |= set(sorted(of_kind, key=lambda idx: (scores[idx], -idx))[:number])
    assert published["dropped_layers"] == sorted(expected)
    assert published["pattern"] == "".join(pattern[idx] for idx in range(118) if idx not in expected)
    # One list over all kinds would take other layers.
    assert expected != set(sorted(range(118), key=lambda idx: (scores[idx], -idx))[:20])


def test_nothing_fits_a_quarter_of_the_budget_and_the_smallest_is_named() -> None:
    command = COMMANDS[1].split(" --keep")[0] + " --deployment rtx5090-fp4-1M --memory 8GiB"
    result = run(command)
    assert result.exit_code == 3
    assert "memory 8.00 GiB is asked for" in result.output and "linear weights" in result.output


def test_a_budget_above_the_model_says_that_nothing_needs_pruning() -> None:
    command = COMMANDS[1].split(" --keep")[0] + " --deployment rtx5090-fp4-1M --memory 56GiB"
    result = run(command)
    assert result.exit_code == 0
    assert "nothing needs pruning" in result.stdout
    assert json.loads(run(command + " --json").stdout)["needs_pruning"] is False
