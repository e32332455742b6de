"""Guarantee: what other programs write is read as they read it, and files that lie are refused by name.

Headers follow the rules of the safetensors format, as its own library checks them; numbers that JSON does not have are
read and written as transformers writes them; pipes and devices are never read.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint, read_config, save_config
from minipuzzle.files.json_files import parse_json, read_json, require_regular_file, tagged, untagged
from minipuzzle.files.safetensors_files import read_safetensors_header
from tests.support.tiny_models import write_family_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_family_checkpoint(tmp_path / "model", "llama")


def two_shards(folder: Path) -> dict[str, str]:
    """Split a checkpoint into two shards with an index; returns its weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard, members in {"a.safetensors": names[::2], "b.safetensors": names[1::2]}.items():
        save_file({name: tensors[name] for name in members}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, shard)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, Any]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_special_floats_are_read_and_written_as_transformers_does(folder: Path) -> None:
    from transformers import NemotronHConfig

    NemotronHConfig().save_pretrained(folder)
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert '"__float__": "Infinity"' in text
    limit = read_config(folder)["time_step_limit"]
    assert list(limit) == [0.0, math.inf]
    save_config(folder, {"a": math.inf, "b": [-math.inf, math.nan, 1.5], "c": {"d": 2}})
    assert NemotronHConfig._dict_from_json_file(folder / "config.json")["a"] == math.inf
    back = untagged(read_json(folder / "config.json"))
    assert back["b"][0] == -math.inf and math.isnan(back["b"][1]) and back["c"] == {"d": 2}
    assert untagged(tagged({"x": [1, "y", None, True]})) == {"x": [1, "y", None, True]}


@pytest.mark.parametrize("family", ["nemotron_h", "granitemoehybrid"])
def test_a_config_with_tagged_floats_loads(tmp_path: Path, family: str) -> None:
    import minipuzzle

    folder = write_family_checkpoint(tmp_path / "model", family)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(
        json.dumps({**config, "time_step_limit": [0.0, {"__float__": "Infinity"}]}), encoding="utf-8"
    )
    token_ids = torch.arange(3, 15)[None]
    assert torch.isfinite(minipuzzle.load(folder)(token_ids, use_cache=False).logits).all()


@pytest.mark.parametrize("text", ["", "[" * 200_000, "9" * 5000, '{"a": }', b"\xff\xfe"])
def test_what_is_not_honest_json_is_an_error(text: str | bytes) -> None:
    with pytest.raises(MinipuzzleError, match="the file"):
        parse_json(text, "the file")


def test_pipes_folders_devices_and_dead_links_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "endless", "dead", "loop", ".", "absent"):
        with pytest.raises(MinipuzzleError):
            require_regular_file(tmp_path / name)


def test_headers_follow_the_rules_of_the_format(folder: Path) -> None:
    """Each change is one that the safetensors library refuses as well, or that it cannot see: integers for weights."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = sorted(name for name in header if name != "__metadata__")[:2]
    begin, end = header[first]["data_offsets"]
    damages: list[dict[str, Any]] = [
        {"data_offsets": [begin + 4, end + 4]},
        {"data_offsets": [end, begin]},
        {"data_offsets": [begin, end, end]},
        {"data_offsets": ["0", "4"]},
        {"shape": [-1, 4]},
        {"shape": "four"},
        {"dtype": "F16"},
        {"dtype": 4},
    ]
    for damage in damages:
        changed = {**header, first: {**header[first], **damage}}
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        with pytest.raises(MinipuzzleError):
            read_safetensors_header(path)
    overlapping = {**header, second: {**header[second], "data_offsets": header[first]["data_offsets"]}}
    text = json.dumps(overlapping).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(MinipuzzleError):
        read_safetensors_header(path)


def test_weights_stored_as_integers_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: tensors[name].to(torch.int32)}, path, metadata={"format": "pt"})
    with pytest.raises(MinipuzzleError, match=f"{name} is stored as I32"):
        Checkpoint.open(folder).require_plain_weights()


def test_a_single_file_beside_an_index_of_other_files_is_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    two_shards(folder)
    Checkpoint.open(folder).require_plain_weights()
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(MinipuzzleError, match="readers differ"):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    weight_map = two_shards(folder)
    name = next(name for name, shard in weight_map.items() if shard == "a.safetensors")
    extra = load_file(folder / "b.safetensors")
    extra[name] = load_file(folder / "a.safetensors")[name]
    save_file(extra, folder / "b.safetensors", metadata={"format": "pt"})
    with pytest.raises(MinipuzzleError, match=name):
        Checkpoint.open(folder)


def test_a_tensor_that_the_index_forgets_is_read_as_transformers_reads_it(folder: Path) -> None:
    weight_map = two_shards(folder)
    del weight_map[min(weight_map)]
    write_index(folder, weight_map)
    Checkpoint.open(folder).require_plain_weights()
