"""Guarantee: every command computes on another device what it computes on the CPU, and mixes no tensors of the two.

The device is pretended (``tests/support/pretend_device.py``), in a process of its own. Equal means: to float rounding.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minipuzzle.devices import Device, checked_device
from minipuzzle.errors import MinipuzzleError
from tests.support.jobs import ROOT, environment
from tests.support.tiny_models import write_tiny_checkpoint

JOBS = ["score", "cut", "compensate", "prune_narrowed", "prune_per_layer", "evaluate", "distill", "distill_in_bfloat16"]
JOBS += ["distill_from_cache", "export", "verify", "offers"]
OF_THE_DEVICE = ("device", "seconds", "per_second", "memory", "peak", "out", "hours", "estimate", "hardware", "folder")
SECONDS = 240
LEARNT = {"student_plain": 0.02, "student_low": 0.2, "student_cached": 0.3}  # of the way, how far apart they end


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The folder in which every job has run on both devices."""
    folder = tmp_path_factory.mktemp("devices")
    model = write_tiny_checkpoint(folder / "model", intermediate_size=64)
    program = [sys.executable, "-m", "tests.support.pretend_job", str(model), str(text_file), str(folder)]
    subprocess.run(program, check=True, timeout=SECONDS, env=environment(), cwd=ROOT)
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_a_job_runs_on_the_device_as_on_the_cpu(ran: Path, job: str) -> None:
    outcomes = json.loads((ran / "outcomes.json").read_text(encoding="utf-8"))
    assert outcomes.keys() == set(JOBS)
    for device, failure in outcomes[job].items():
        assert failure is None, f"on {device}: {failure}"


def test_what_the_jobs_wrote_is_the_same_to_rounding(ran: Path) -> None:
    names = sorted(path.relative_to(ran / "cpu") for path in (ran / "cpu").rglob("*.safetensors"))
    assert len(names) >= 10
    for name in names:
        wanted, found = (load_file(ran / device / name) for device in ("cpu", "pretend"))
        assert found.keys() == wanted.keys()
        for tensor, values in wanted.items():
            assert found[tensor].dtype == values.dtype, f"{name} {tensor}"
            if name.parts[0] not in LEARNT:
                assert_close(found[tensor], values, f"{name} {tensor}")


def assert_close(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """Equal to rounding: codes of 8 bits may be neighbours, of which there must be few."""
    if wanted.dtype.itemsize == 1 and wanted.numel() > 1:
        assert (found.view(torch.uint8) == wanted.view(torch.uint8)).double().mean() > 0.99, name
    else:
        found, wanted = found.double(), wanted.double()
        assert torch.allclose(found, wanted, rtol=2e-4, atol=2e-4 * float(wanted.abs().amax())), name


@pytest.mark.parametrize("student", LEARNT)
def test_training_moves_weights_alike(ran: Path, student: str) -> None:
    """Adam's first steps make much of small gradients, and rounding to 8 or 16 bits more: norms are compared."""
    start, wanted, found = (load_file(ran / name / "model.safetensors") for name in places_of(student))
    for tensor, values in wanted.items():
        moved, apart = (values - start[tensor]).norm(), (found[tensor] - values).norm()
        assert moved > 0 and apart < LEARNT[student] * moved, tensor


def places_of(student: str) -> tuple[str, str, str]:
    return "cpu/narrowed", f"cpu/{student}", f"pretend/{student}"


def test_what_the_commands_say_is_the_same_to_rounding(ran: Path) -> None:
    files = sorted((ran / "cpu").glob("*.json"))
    assert len(files) >= 8
    for file in files:
        on_cpu, on_device = (
            list(figures(json.loads((ran / device / file.name).read_text()))) for device in ("cpu", "pretend")
        )
        assert [name for name, _ in on_device] == [name for name, _ in on_cpu], file.name
        tolerance = 2e-2 if "low" in file.name else 1e-3
        for (name, found), (_, wanted) in zip(on_device, on_cpu, strict=True):
            if isinstance(wanted, float):
                assert found == pytest.approx(wanted, rel=tolerance, abs=1e-6), f"{file.name}: {name}"
            else:
                assert found == wanted, f"{file.name}: {name}"


def figures(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and words of a JSON value with their places, without those that tell of time, memory or paths."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from figures(inner, f"{name}.{key}")
    elif not any(word in name for word in OF_THE_DEVICE) and not (isinstance(value, str) and "/" in value):
        yield name, value


def test_kinds_differ_in_what_they_offer() -> None:
    cpu, cuda, xpu, mps = (Device(name) for name in ("cpu", "cuda:1", "xpu", "mps"))
    assert [device.kind for device in (cpu, cuda, xpu, mps)] == ["cpu", "cuda", "xpu", "mps"]
    assert [device.backend for device in (cpu, cuda, mps)] == ["gloo", "cpu:gloo,cuda:nccl", None]
    assert [device.widens_products for device in (cpu, cuda, xpu, mps)] == [False, True, False, False]
    assert [device.pins_memory for device in (cpu, cuda, xpu, mps)] == [False, True, True, False]
    assert [device.best_dtype for device in (cpu, cuda, mps)] == ["float32", "bfloat16", "bfloat16"]
    assert cpu.has_float64 and not mps.has_float64


def test_the_cpu_has_figures_generators_and_nothing_to_wait_for() -> None:
    cpu = Device("cpu")
    assert cpu.free_bytes > 0 and cpu.peak_bytes > 0
    cpu.synchronise()
    states = cpu.generator_states()
    drawn = torch.rand(3)
    cpu.restore_generators(states)
    assert torch.equal(torch.rand(3), drawn) and states.keys() == {"cpu"}


def test_a_device_that_is_not_there_is_refused() -> None:
    assert checked_device("cpu") == "cpu"
    for name in ("xpu", "pretend", "nonsense"):
        with pytest.raises(MinipuzzleError, match="cannot be used"):
            checked_device(name)
