"""Guarantee: what is in a table can be chosen, by settings and by the command; what is not is refused with a hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.settings import DistillSettings
from minipuzzle.errors import MinipuzzleError
from tests.support.packages import install_package, run_python

OTHER_PACKAGE = """
from distill.objective.divergences import Form, forward_kl
DOUBLE = Form(lambda p, q, share: forward_kl(p, q, 2 * share), 0.25, 4)
def halfway(step_idx, last_step_idx, decay_steps):
    return 0.5
"""
USE = """
import sys
from click.testing import CliRunner
from distill.settings import FORMS, DistillSettings
from minipuzzle.commands.cli import main
help_text = " ".join(CliRunner().invoke(main, ["distill", "--help"]).output.split())
assert "reverse-skewed|double]" in help_text and "wsd|halfway]" in help_text, help_text
settings = DistillSettings(tokens=10**6, form="double", schedule="halfway", min_learning_rate_fraction=0.0)
assert "torch" not in sys.modules
assert settings.learning_rate_at(20) == settings.learning_rate / 2
assert FORMS["double"].default_share == 0.25
from distill.objective.losses import LossSettings
import torch
assert LossSettings(form="double").chunk_rows(10, torch.float32, on_cpu=True) > 0
"""


def test_a_form_and_a_schedule_of_another_package_can_be_chosen(tmp_path: Path) -> None:
    added = {"losses": {"double": "DOUBLE"}, "schedules": {"halfway": "halfway"}}
    run_python(install_package(tmp_path, OTHER_PACKAGE, **added), "-c", USE)


@pytest.mark.parametrize(
    ("choice", "problem", "hint"),
    [
        ({"form": "foward"}, "unknown loss form 'foward'", "did you mean forward"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'", "did you mean cosine"),
        ({"documents": "pack"}, "unknown layout of documents 'pack'", "did you mean packed"),
        ({"dtype": "bfloat"}, "unknown dtype 'bfloat'", "did you mean bfloat16"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(choice: dict[str, Any], problem: str, hint: str) -> None:
    with pytest.raises(MinipuzzleError) as caught:
        DistillSettings(tokens=1, **choice)
    assert caught.value.problem == problem and hint in caught.value.hint
