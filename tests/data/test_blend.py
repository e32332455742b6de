"""A blend is read as written: every window of a run is a pure function of its number, shares and caps hold exactly,
documents do not leak into each other where they are kept apart, and held-out documents are never trained on."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.settings import DistillSettings
from distill.training.data import BlendedWindows, PackedWindows, blend_of, is_held_out, read_training_text
from minipuzzle.data.blend import Blend, Phase, Source, plan_blend, read_blend
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import IGNORE, document_tokens
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_model, load_tokenizer, parts_of

LENGTH = 8
BLEND = """
held_out = 0.2
max_epochs = 3
[sources.web]
path = "web"
[sources.maths]
path = ["maths.jsonl"]
max_epochs = 9
[[phases]]
name = "broad"
share = 0.6
weights = {web = 3, maths = 1}
[[phases]]
name = "quality"
share = 0.4
weights = {maths = 1}
"""


def blend_file(folder: Path, text: str = BLEND) -> Path:
    (folder / "blend.toml").write_text(text, encoding="utf-8")
    return folder / "blend.toml"


def two_sources() -> dict[str, PackedWindows]:
    """Sources whose tokens tell where they come from: even numbers and odd ones."""
    web = PackedWindows([list(range(0, 2 * (40 * LENGTH + 1), 2))], sequence_length=LENGTH)
    maths = PackedWindows([list(range(1, 2 * (10 * LENGTH + 1), 2))], sequence_length=LENGTH)
    return {"web": web, "maths": maths}


def two_phases(max_epochs: float = 9.0) -> Blend:
    return Blend(
        sources=(Source(name="web", paths=()), Source(name="maths", paths=(), max_epochs=max_epochs)),
        phases=(
            Phase(name="broad", share=0.6, weights={"web": 0.75, "maths": 0.25}),
            Phase(name="quality", share=0.4, weights={"web": 0.1, "maths": 0.9}),
        ),
    )


def test_a_file_is_read_as_written(tmp_path: Path) -> None:
    blend = read_blend(blend_file(tmp_path))
    assert [source.name for source in blend.sources] == ["web", "maths"]
    assert blend.paths == (tmp_path / "web", tmp_path / "maths.jsonl")
    assert [source.max_epochs for source in blend.sources] == [3, 9]
    assert blend.held_out == 0.2
    assert blend.phases[0] == Phase(name="broad", share=0.6, weights={"web": 0.75, "maths": 0.25})
    assert blend.phases[1].weights == {"maths": 1.0}
    assert blend_of((tmp_path / "blend.toml",)) == blend


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("share = 0.4", "share = 0.5", "add up to 1.1"),
        ("weights = {maths = 1}", "weights = {mahts = 1}", "unknown sources: mahts"),
        ("maths = 1}\n[[phases]]", "web = 1}\n[[phases]]", "not TOML"),
        ("weights = {web = 3, maths = 1}", "weights = {maths = 1}", "no phase weighs web"),
        ("max_epochs = 3", "max_epoch = 3", "unknown entries: max_epoch"),
        ("max_epochs = 9", "max_epochs = -1", "max_epochs of source maths is -1"),
        ('path = "web"', "", "source web has no path"),
        ("held_out = 0.2", "held_out = 1.5", "held_out is 1.5"),
        ('name = "quality"', 'name = "broad"', "two phases have one name"),
        ("weights = {maths = 1}", "", "quality has no weights"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in BLEND
    with pytest.raises(MinipuzzleError, match=complaint):
        read_blend(blend_file(tmp_path, BLEND.replace(old, new)))


def test_shares_hold_exactly_and_epochs_add_up() -> None:
    data = BlendedWindows(two_sources(), two_phases(), total_windows=100)
    assert [(s.phase, s.source, s.num_windows) for s in data.plan] == [
        ("broad", "web", 45),
        ("broad", "maths", 15),
        ("quality", "web", 4),
        ("quality", "maths", 36),
    ]
    assert data.epochs_of("web") == pytest.approx(49 / 40)
    assert data.epochs_of("maths") == pytest.approx(51 / 10)
    found = [data.batch(window, 1)[0] for window in range(100)]
    is_maths = [bool((inputs % 2 == 1).all()) for inputs in found]
    assert all(bool((inputs % 2 == 0).all()) != odd for inputs, odd in zip(found, is_maths, strict=True))
    assert (sum(is_maths[:60]), sum(is_maths[60:])) == (15, 36)
    # Evenly interleaved: no stretch of a phase is far from its share.
    assert all(2 <= sum(is_maths[start : start + 12]) <= 4 for start in range(0, 48, 6))


@pytest.mark.parametrize("source", ["web", "maths"])
def test_every_epoch_reads_each_window_once_across_phases(source: str) -> None:
    data = BlendedWindows(two_sources(), two_phases(), total_windows=100)
    windows = [w for w in range(100) if data.source_of(w) == source]
    per_epoch = data.sources[source].windows_per_epoch
    epochs = [windows[start : start + per_epoch] for start in range(0, len(windows), per_epoch)]
    contents = [[tuple(data.batch(w, 1)[0][0].tolist()) for w in epoch] for epoch in epochs]
    assert all(len(set(epoch)) == len(epoch) for epoch in contents)
    assert set(contents[1]) <= set(contents[0])  # cut alike, so that targets kept by window are found again
    assert contents[1] != contents[0][: len(contents[1])]
    assert [data.position(w).epoch for w in windows] == sorted(data.position(w).epoch for w in windows)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_is_the_same_for_any_number_of_processes_and_from_any_start(world_size: int) -> None:
    whole = BlendedWindows(two_sources(), two_phases(), total_windows=100)
    wanted = [whole.batch(step * 4, 4) for step in range(25)]
    for step in (24, 3, 0, 17):  # entered anywhere, as a resumed run does
        each = 4 // world_size
        fresh = [BlendedWindows(two_sources(), two_phases(), total_windows=100) for _ in range(world_size)]
        parts = [data.batch(step * 4 + rank * each, each) for rank, data in enumerate(fresh)]
        for side in (0, 1):
            assert torch.equal(torch.cat([part[side] for part in parts]), wanted[step][side])


def test_a_source_above_its_cap_is_refused_by_how_much() -> None:
    with pytest.raises(
        MinipuzzleError, match=r"maths would be read 5\.10 times, 1\.10 epochs or 88 tokens above"
    ) as error:
        BlendedWindows(two_sources(), two_phases(max_epochs=4), total_windows=100)
    assert "max_epochs" in error.value.hint
    exact = plan_blend(two_phases(max_epochs=5.1), {"web": 40, "maths": 10}, total_windows=100, sequence_length=LENGTH)
    assert sum(share.num_windows for share in exact) == 100


def test_packed_labels_do_not_cross_boundaries() -> None:
    documents = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11, 12, 13]]
    data = PackedWindows(documents, sequence_length=4)
    inputs, labels = data.batch(0, data.windows_per_epoch)
    follows = {(a, b) for tokens in documents for a, b in pairwise(tokens)}
    pairs = [(a, b) for a, b in zip(inputs.flatten().tolist(), labels.flatten().tolist(), strict=True) if b != IGNORE]
    assert set(pairs) <= follows and len(pairs) == len(set(pairs)) == data.labels_per_epoch
    assert (labels == IGNORE).sum() == 2  # between three documents


def test_separate_documents_do_not_reach_each_other(tiny_checkpoint: Checkpoint) -> None:
    documents = [list(range(5, 5 + size)) for size in (4, 11, 7)]
    data = PackedWindows(documents, sequence_length=LENGTH, layout="separate")
    inputs, labels = data.batch(0, data.windows_per_epoch)
    assert data.windows_per_epoch == 4  # the second document fills two windows
    assert data.labels_per_epoch == int((labels != IGNORE).sum()) == 3 + 10 + 6
    parts = parts_of(load_model(tiny_checkpoint, Compute(dtype="float64")), tiny_checkpoint.family)
    with torch.no_grad():
        for row, label in zip(inputs, labels, strict=True):
            num_real = int((label != IGNORE).sum())
            padded = parts.logits_input(row[None])[0, :num_real]
            alone = parts.logits_input(row[None, :num_real])[0]
            assert (padded - alone).abs().max() < 1e-9


def test_held_out_documents_are_parted_by_their_text_alone(tiny_folder: Path, text_file: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    settings = DistillSettings(tokens=640, sequence_length=32, batch_sequences=2, held_out=0.3)
    text = read_training_text(tokenizer, blend_of((text_file,), settings.held_out), settings)
    documents = read_documents([text_file])
    assert text.held_out == [document for document in documents if is_held_out(document, 0.3)]
    assert 0 < len(text.held_out) < len(documents)
    trained = [document for document in documents if document not in text.held_out]
    assert text.windows.num_tokens == sum(len(document_tokens(tokenizer, document)) for document in trained)
    more = {document for document in documents if is_held_out(document, 0.5)}
    assert more > set(text.held_out)
    with pytest.raises(MinipuzzleError, match="no document fell into"):
        read_training_text(tokenizer, blend_of((text_file,), 1e-9), replace(settings, held_out=1e-9))


def test_a_source_that_is_too_short_is_named(tmp_path: Path, tiny_folder: Path, text_file: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "maths.jsonl").write_text('{"text": "1"}\n', encoding="utf-8")
    blend = read_blend(blend_file(tmp_path, BLEND.replace("held_out = 0.2", "held_out = 0.0")))
    settings = DistillSettings(tokens=640, sequence_length=32, batch_sequences=2)
    with pytest.raises(MinipuzzleError, match="source maths: the data has 2 tokens"):
        read_training_text(load_tokenizer(tiny_folder), blend, settings)
    with pytest.raises(MinipuzzleError, match="stands alone"):
        blend_of((tmp_path / "blend.toml", text_file))


@given(st.integers(0, 10**7), st.lists(st.lists(st.integers(0, 1000), min_size=2, max_size=2).filter(any), min_size=1))
def test_windows_are_divided_without_loss_each_share_to_the_nearest(total: int, weights: list[list[int]]) -> None:
    """Whole numbers that add up exactly, none of them a whole window from its share."""
    names = ("web", "maths")
    sums = [sum(pair) for pair in weights]
    phases = []
    for number, pair in enumerate(weights):
        shares = {name: weight / sums[number] for name, weight in zip(names, pair, strict=True)}
        phases.append(Phase(name=str(number), share=sums[number] / sum(sums), weights=shares))
    blend = Blend(sources=tuple(Source(name=name, paths=(), max_epochs=1e9) for name in names), phases=tuple(phases))
    plan = plan_blend(blend, dict.fromkeys(names, 10), total_windows=total, sequence_length=LENGTH)
    assert sum(share.num_windows for share in plan) == total
    for number, phase in enumerate(phases):
        counts = {share.source: share.num_windows for share in plan if share.phase == phase.name}
        of_phase = sum(counts.values())
        assert abs(of_phase - total * sums[number] / sum(sums)) < 1 + 1e-6
        assert all(abs(counts[name] - of_phase * phase.weights[name]) < 1 + 1e-6 for name in names)
