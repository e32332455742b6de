"""Guarantee: a step that is killed, or done by several workers, gives the same rows and asks nothing twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.data.documents import read_documents
from minipuzzle.data.rows import Row, read_rows, write_shard
from tests.support.cli import run_cli, run_json
from tests.support.scripted_server import MODEL, Reply, asked, said, scripted_server

ROWS = 12


def raw(folder: Path) -> Path:
    path = folder / "raw.jsonl"
    lines = [json.dumps({"text": f"Passage {n} on rivers and their tides. " * 12}) for n in range(ROWS)]
    path.write_text("\n".join(lines))
    return path


def dialogue(body: Mapping[str, Any], _before: int) -> Reply:
    number = asked(body).split("Passage ")[1].split()[0]
    return said(f"Anna: what of passage {number} on rivers?\nBert: their tides, I say, and more of it.\n" * 4)


def command(data: Path, out: Path, url: str, *others: str) -> list[str]:
    asking = ["--endpoint", url, "--model", MODEL, "--styles", "debate", "--shard-rows", "3", *others]
    return ["data", "dialogues", "--data", str(data), "-o", str(out), *asking]


def test_killed_at_any_moment_it_continues_and_asks_nothing_twice(tmp_path: Path) -> None:
    data, out = raw(tmp_path), tmp_path / "mind"

    def slow(body: Mapping[str, Any], before: int) -> Reply:
        time.sleep(0.01)
        return dialogue(body, before)

    with scripted_server(slow) as server:
        arguments = command(data, out, server.url, "--concurrency", "1")
        run_json(*command(data, tmp_path / "whole", server.url))
        calls = server.num_calls()
        for seen in (calls + 2, calls + 7):
            process = subprocess.Popen([sys.executable, "-m", "minipuzzle", *arguments], stderr=subprocess.DEVNULL)
            while server.num_calls() < seen and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not out.exists()
        status = run_json("data", "status", out)
        assert 1 <= status["shards_done"] < status["shards"] == 4
        report = run_json(*arguments)
        again = server.num_calls() - calls
    assert again <= ROWS + 2  # at most the question that was in the air at each kill
    whole = json.loads((tmp_path / "whole/manifest.json").read_text())
    assert report == whole
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())


@pytest.mark.slow
def test_two_workers_give_the_rows_of_one(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    data = raw(tmp_path)
    with scripted_server(dialogue) as server:
        one = run_json(*command(data, tmp_path / "one", server.url))
        two = run_json(*command(data, tmp_path / "two", server.url, "--workers", "2"))
    assert one == two


def test_a_step_reads_what_the_one_before_it_wrote(tmp_path: Path) -> None:
    data = raw(tmp_path)
    labelled = run_json("data", "label", "--data", data, "-o", tmp_path / "labelled")
    assert (labelled["rows_in"], labelled["rows_out"]) == (ROWS, ROWS)
    buckets = run_json("data", "buckets", "--data", tmp_path / "labelled", "--by", "words", "-o", tmp_path / "buckets")
    assert sum(bucket["rows"] for bucket in buckets.values()) == ROWS
    unique = run_json("data", "dedup", "--data", tmp_path / "labelled", "--similarity", "1", "-o", tmp_path / "unique")
    assert unique["rows_out"] + sum(unique["rejected"].values()) == ROWS
    assert len(read_documents([tmp_path / "labelled"])) == ROWS  # not what was rejected


def test_a_selection_and_a_blend_are_what_training_reads(tmp_path: Path) -> None:
    data = raw(tmp_path)
    (tmp_path / "target.txt").write_text("Passage 3 on rivers")
    arguments = ("--data", data, "--target", tmp_path / "target.txt", "--tokens", "300", "--chunk", "32")
    run_json("data", "select", *arguments, "-o", tmp_path / "high-rivers")
    blend = tmp_path / "blend.toml"
    sources = ("--data", data, "--data", tmp_path / "high-rivers", "--tokens", "1600", "--phases", "60:40")
    table = run_json("data", "blend", *sources, "-o", blend)
    assert table["high-rivers"]["epochs"] == pytest.approx(640 / table["high-rivers"]["tokens"] + 1.2, abs=1.3)
    assert 'name = "phase 2"' in blend.read_text()
    refused = run_cli("data", "blend", "--data", data, "--tokens", "1M", "-o", tmp_path / "large.toml")
    assert refused.exit_code == 1
    assert "raise --max-epochs" in refused.output


def test_a_missing_shard_of_a_finished_step_is_noticed(tmp_path: Path) -> None:
    run_json("data", "label", "--data", raw(tmp_path), "--shard-rows", "4", "-o", tmp_path / "rows")
    (tmp_path / "rows/part-00001.parquet").unlink()
    result = run_cli("data", "label", "--data", tmp_path / "rows", "-o", tmp_path / "again")
    assert result.exit_code == 1
    assert "part-00001.parquet" in result.output


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = [
        Row(text="plain", source="s", parents=("p",), labels={"a": 0.5}, tags={"t": "ü"}, made={"step": "x"}),
        Row(messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})),
    ]
    write_shard(tmp_path / "part.parquet", rows)
    again = list(read_rows([tmp_path / "part.parquet"]))
    assert isinstance(again[1], Row)
    assert again == [rows[0], Row(messages=rows[1].messages, source=again[1].source)]
