"""Guarantee: processes that torchrun starts find each other and agree on sums; a plain start is a job of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.processes import Processes, joined_processes, processes_from_environment

JOB = """
import json, sys
from pathlib import Path
import torch
from minipuzzle.runtime.processes import joined_processes

with joined_processes("cpu") as processes:
    total = processes.sum_(torch.tensor([1.0, 10.0], dtype=torch.float64) * (processes.rank + 1))
    record = {
        "total": total.tolist(),
        "share": list(processes.share(range(5))),
        "first": processes.broadcast(processes.rank),
        "all": processes.gather(processes.rank * 2),
    }
    processes.wait()
    Path(sys.argv[1], f"{processes.rank}.json").write_text(json.dumps(record))
    with joined_processes("cpu") as inner:  # an existing group is used and left alone
        assert inner == processes
    processes.wait()
assert not torch.distributed.is_initialized()
"""


def test_two_processes_agree_on_sums_and_split_the_work(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, str(tmp_path / "job.py"), str(tmp_path)], check=True, timeout=120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["total"] == second["total"] == [3, 30]
    assert (first["share"], second["share"]) == ([0, 2, 4], [1, 3])
    assert first["first"] == second["first"] == 0
    assert first["all"] == second["all"] == [0, 2]


def test_a_plain_start_is_a_job_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined_processes("cpu") as processes:
        assert processes == Processes() and processes.is_first
        assert processes.sum_(torch.tensor(3.0)) == 3
        assert processes.broadcast("x") == "x" and processes.gather("x") == ["x"]
        assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert not torch.distributed.is_initialized()


def test_gpus_are_handed_out_by_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    processes = processes_from_environment()
    names = [Compute(device=name, processes=processes).own_device.name for name in ("cuda", "xpu", "cuda:0", "cpu")]
    assert (processes.rank, names) == (5, ["cuda:1", "xpu:1", "cuda:0", "cpu"])
    assert Compute(device="cuda").own_device.name == "cuda"
