"""A teacher cache gives back the targets that were computed, to its stated rounding, to every run that meets the text;
never those of another teacher or text, and none that a killed run left half-written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from distill.objective.losses import LossSettings, TopKTargets, chunked_kl, chunked_topk_kl, topk_targets
from distill.objective.teacher_cache import CacheDescription, TeacherCache, decode_targets, encode_targets

TOKENS, HIDDEN = 6, 16


def description(vocabulary: int = 300, top_k: int = 12) -> CacheDescription:
    return CacheDescription(
        teacher_fingerprint="abc",
        vocabulary=vocabulary,
        top_k=top_k,
        temperature=1.0,
        sequence_length=TOKENS,
        dtype="float32",
    )


def head(vocabulary: int = 300) -> Tensor:
    return torch.randn(vocabulary, HIDDEN, generator=torch.Generator().manual_seed(0))


def targets(num_windows: int, seed: int, vocabulary: int = 300, top_k: int = 12) -> TopKTargets:
    hidden = torch.randn(num_windows * TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return topk_targets(hidden, head(vocabulary), top_k=top_k)


def windows(*starts: int) -> Tensor:
    return torch.stack([torch.arange(start, start + TOKENS) for start in starts])


def refuse() -> NoReturn:
    raise AssertionError("the teacher was run")


@pytest.mark.parametrize(("vocabulary", "bytes_per_token"), [(300, 12 * 4 + 2), (70_000, 12 * 5 + 2)])
def test_targets_survive_to_the_stated_rounding_in_the_stated_bytes(vocabulary: int, bytes_per_token: int) -> None:
    given, about = targets(3, seed=1, vocabulary=vocabulary), description(vocabulary)
    records = encode_targets(given, about)
    assert about.bytes_per_token == bytes_per_token
    assert len(records) == 3 * TOKENS * bytes_per_token == 3 * about.window_bytes
    found = decode_targets(records, about, torch.device("cpu"))
    assert torch.equal(found.token_ids, given.token_ids)
    assert vocabulary < 2**16 or int(found.token_ids.max()) >= 2**16  # the third byte is in use
    assert (found.log_p.exp().sum(1) - 1).abs().max() < 1e-6
    assert (found.log_p - given.log_p).abs().max() < 1 / 2048


def test_another_run_finds_what_one_has_met_without_its_teacher(tmp_path: Path) -> None:
    first = TeacherCache(tmp_path, description())
    wrote = first.targets(windows(1, 50), lambda: targets(2, seed=1))
    assert (first.num_written, first.num_windows) == (2, 2)
    second = TeacherCache(tmp_path, description())
    assert second.holds(windows(50, 1)) and not second.holds(windows(1, 2))
    read = second.targets(windows(50, 1), None)
    assert torch.equal(read.log_p, wrote.log_p.view(2, TOKENS, -1).flip(0).flatten(0, 1))
    assert torch.equal(read.token_ids, wrote.token_ids.view(2, TOKENS, -1).flip(0).flatten(0, 1))
    second.targets(windows(9), lambda: targets(1, seed=2))
    assert first.holds(windows(9))  # written by the other after this one was opened


def test_a_window_that_is_known_keeps_its_targets(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, description())
    before = cache.targets(windows(1), lambda: targets(1, seed=1))
    mixed = cache.targets(windows(1, 2, 2), lambda: targets(3, seed=5))
    assert torch.equal(mixed.log_p[:TOKENS], before.log_p)
    assert cache.num_written == 2
    assert cache.targets(windows(2), None).log_p.shape == (TOKENS, 13)


def test_what_a_killed_run_left_half_written_is_not_found(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, description())
    cache.targets(windows(1, 2), lambda: targets(2, seed=1))
    part = next(tmp_path.glob("part-*.targets"))
    part.write_bytes(part.read_bytes()[:-1])  # the last record is incomplete
    found = TeacherCache(tmp_path, description())
    assert found.holds(windows(1)) and not found.holds(windows(2))
    keys = part.with_suffix(".keys")
    keys.write_bytes(keys.read_bytes()[:15])  # so is the first key
    assert TeacherCache(tmp_path, description()).num_windows == 0


@pytest.mark.parametrize(
    ("change", "value"),
    [("teacher_fingerprint", "other"), ("top_k", 8), ("temperature", 2.0), ("sequence_length", 9), ("vocabulary", 299)],
)
def test_targets_of_another_kind_are_refused(tmp_path: Path, change: str, value: object) -> None:
    from minipuzzle.errors import MinipuzzleError

    TeacherCache(tmp_path, description())
    with pytest.raises(MinipuzzleError, match=change.replace("_", " ")):
        TeacherCache(tmp_path, replace(description(), **{change: value}))  # type: ignore[arg-type]


def test_more_tokens_bring_loss_and_gradient_nearer_to_all_of_them(tmp_path: Path) -> None:
    teacher = torch.randn(60, HIDDEN, generator=torch.Generator().manual_seed(3))
    student = (teacher + 0.5).requires_grad_()
    whole = chunked_kl(student, head(), teacher, head(), denominator=60).loss
    wanted = torch.autograd.grad(whole, student)[0]
    distances, losses = [], []
    for top_k in (2, 16, 128, 299):
        top = topk_targets(teacher, head(), top_k=top_k)
        loss = chunked_topk_kl(student, head(), top, denominator=60, settings=LossSettings()).loss
        distances.append(float((torch.autograd.grad(loss, student)[0] - wanted).norm() / wanted.norm()))
        losses.append(float(loss.detach()))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-4
    # Telling fewer outcomes apart never makes two distributions look further apart.
    assert losses == sorted(losses) and losses[-1] <= float(whole.detach()) * (1 + 1e-5)


def test_a_damaged_record_is_computed_again_and_the_new_one_is_found_by_the_next_run(tmp_path: Path) -> None:
    wrote = TeacherCache(tmp_path, description()).targets(windows(1, 2), lambda: targets(2, seed=1))
    part = next(tmp_path.glob("part-*.targets"))
    content = bytearray(part.read_bytes())
    content[10] ^= 1
    part.write_bytes(bytes(content))
    cache = TeacherCache(tmp_path, description())
    assert cache.holds(windows(2)) and not cache.holds(windows(1, 2))
    again = cache.targets(windows(1, 2), lambda: targets(2, seed=1))
    assert torch.equal(again.log_p, wrote.log_p) and torch.equal(again.token_ids, wrote.token_ids)
    assert (cache.num_written, cache.num_damaged) == (1, 1)
    assert TeacherCache(tmp_path, description()).holds(windows(1, 2))
