"""Guarantee: what another package adds to a table can be chosen in commands and does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minipuzzle.cut.scores import read_scores
from tests.support.packages import install_package, run_python

SOURCE = """
from minipuzzle.architecture.deployments import NamedDeployment
from minipuzzle.architecture.memory import Deployment
from minipuzzle.cut.layer_metrics import LayerMetric
from minipuzzle.formats.choices import Recipe

TOTAL_KL = LayerMetric(definition="KL of all tokens together, nats", of=lambda sums: sums.kl)
ATTENTION_ONLY = Recipe(description="attention", skips=frozenset({"mamba", "mlp", "moe"}))
OURS = NamedDeployment(name="ours", deployment=Deployment(context_tokens=77), memory="1GiB", source="us")


def by_accuracy(qualities):
    return [-quality.accuracy for quality in qualities]
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return install_package(
        tmp_path,
        SOURCE,
        metrics={"total_kl": "TOTAL_KL"},
        recipes={"attention-only": "ATTENTION_ONLY"},
        deployments={"ours": "OURS"},
        ranking_criteria={"accuracy": "by_accuracy"},
    )


def test_commands_offer_the_names(environment: dict[str, str]) -> None:
    for command, option in (("export", "all|attention-only]"), ("prune", "mean-rank|accuracy]"), ("inspect", "ours")):
        assert option in "".join(run_python(environment, "-m", "minipuzzle", command, "--help").split())


def test_a_metric_is_measured_with_the_others(
    environment: dict[str, str], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.safetensors"
    sizes = ("--samples", 3, "--sequence-length", 16)
    run_python(environment, "-m", "minipuzzle", "score", tiny_folder, "--data", text_file, *sizes, "-o", out)
    scores = read_scores(out)
    assert scores.layer["total_kl"] == pytest.approx(3 * 16 * scores.layer["kl"])
    assert "total_kl" in json.loads(scores.metadata["metric_definitions"])["layer"]


def test_a_deployment_and_a_recipe_are_used(environment: dict[str, str], tiny_folder: Path) -> None:
    shown = run_python(environment, "-m", "minipuzzle", "inspect", tiny_folder, "--deployment", "ours", "--json")
    assert json.loads(shown)["deployment"]["context_tokens"] == 77
    code = (
        "import sys; from pathlib import Path; from minipuzzle.files.checkpoint import Checkpoint;"
        "from minipuzzle.formats.layout import export_layout;"
        "architecture = Checkpoint.open(Path(sys.argv[1])).architecture;"
        "print(*export_layout(architecture, scheme='fp8', recipe='attention-only').quantized)"
    )
    found = run_python(environment, "-c", code, tiny_folder).split()
    assert found and all(name.rpartition(".")[2] in {"q_proj", "k_proj", "v_proj", "o_proj"} for name in found)
