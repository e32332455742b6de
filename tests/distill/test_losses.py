"""The chunked distillation loss equals the textbook formula, value and gradients, without ever holding all logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from distill.objective.losses import (
    LossSettings,
    LossTerms,
    chunked_kl,
    chunked_topk_kl,
    hidden_cosine_distance,
    topk_targets,
)
from distill.settings import FORMS
from minipuzzle.data.windows import IGNORE

ROWS, VOCABULARY, STUDENT_HIDDEN, TEACHER_HIDDEN = 23, 41, 8, 12
SEVEN_ROWS = 7 * 4 * VOCABULARY * 8  # chunk_bytes for 7 rows in float64: the last chunk of 23 is smaller


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    labels[[0, 3, 4, 11, 22]] = IGNORE
    return {
        "student_hidden_NH": draw(ROWS, STUDENT_HIDDEN).requires_grad_(),
        "student_head_VH": draw(VOCABULARY, STUDENT_HIDDEN).requires_grad_(),
        "teacher_hidden_NG": draw(ROWS, TEACHER_HIDDEN),
        "teacher_head_VG": draw(VOCABULARY, TEACHER_HIDDEN),
        "labels_N": labels,
    }


def distance(given: dict[str, Tensor], denominator: float, settings: LossSettings | None = None) -> LossTerms:
    """The loss under test, from inputs by name."""
    return chunked_kl(
        given["student_hidden_NH"],
        given["student_head_VH"],
        given["teacher_hidden_NG"],
        given["teacher_head_VG"],
        denominator=denominator,
        labels_N=given["labels_N"],
        settings=settings,
    )


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def mixture(share: float, log_first: Tensor, log_second: Tensor) -> Tensor:
    return (share * log_first.exp() + (1 - share) * log_second.exp()).log()


# By torch's own divergence; a: share of the first distribution in the mixture.
REFERENCE_FORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward": lambda p, q, _a: kl(p, q),
    "reverse": lambda p, q, _a: kl(q, p),
    "jsd": lambda p, q, a: a * kl(p, mixture(a, p, q)) + (1 - a) * kl(q, mixture(a, p, q)),
    "skewed": lambda p, q, a: kl(p, mixture(a, p, q)),
    "reverse-skewed": lambda p, q, a: kl(q, mixture(a, q, p)),
}


def coarse(log_probabilities: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities of some tokens and of all others together, by plain sums."""
    probabilities = log_probabilities.exp()
    is_other = torch.ones_like(probabilities).scatter_(1, token_ids, 0.0)
    return torch.cat([probabilities.gather(1, token_ids), (probabilities * is_other).sum(1, keepdim=True)], 1).log()


def reference_loss(given: dict[str, Tensor], denominator: float, settings: LossSettings = LossSettings()) -> Tensor:  # noqa: B008
    """The loss by torch's own functions, on logits that exist whole."""
    valid = given["labels_N"] != IGNORE
    logits = (given["student_hidden_NH"] @ given["student_head_VH"].T)[valid]
    teacher_logits = (given["teacher_hidden_NG"] @ given["teacher_head_VG"].T)[valid]
    log_q, log_p = (F.log_softmax(z / settings.temperature, -1) for z in (logits, teacher_logits))
    if settings.top_k is not None:
        token_ids = log_p.argsort(dim=-1, descending=True)[:, : settings.top_k]
        log_q, log_p = coarse(log_q, token_ids), coarse(log_p, token_ids)
    share = FORMS[settings.form].default_share if settings.mixture_share is None else settings.mixture_share
    divergence = REFERENCE_FORMS[settings.form](log_p, log_q, share)
    ce = F.cross_entropy(logits, given["labels_N"][valid], reduction="sum")
    kl_weight = (1 - settings.ce_weight) * settings.temperature**2
    return (kl_weight * divergence + settings.ce_weight * ce) / denominator


def gradients(loss: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [given["student_hidden_NH"], given["student_head_VH"]])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [None, 5])
def test_loss_and_gradients_equal_autograd_over_whole_logits(
    form: str, temperature: float, ce_weight: float, top_k: int | None
) -> None:
    given = inputs()
    for share, chunk_bytes in ((None, 1), (0.37, SEVEN_ROWS), (None, 10**9)):
        settings = LossSettings(
            form=form,
            mixture_share=share,
            temperature=temperature,
            ce_weight=ce_weight,
            top_k=top_k,
            chunk_bytes=chunk_bytes,
        )
        loss = distance(given, denominator=17, settings=settings).loss
        wanted = reference_loss(given, 17, settings)
        assert abs((loss - wanted).item()) < 1e-10
        for found, reference in zip(gradients(3 * loss, given), gradients(3 * wanted, given), strict=True):
            assert (found - reference).abs().max() < 1e-10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top_k", [None, 5])
def test_float32_stays_within_a_millionth_of_float64(form: str, top_k: int | None) -> None:
    settings = LossSettings(form=form, temperature=1.5, ce_weight=0.2, top_k=top_k)
    given = inputs(torch.float32)
    wide = {n: t.detach().double().requires_grad_() if t.is_floating_point() else t for n, t in given.items()}
    loss, wanted = distance(given, denominator=18, settings=settings).loss, reference_loss(wide, 18, settings)
    assert abs(loss.item() / wanted.item() - 1) < 1e-6
    for found, reference in zip(gradients(loss, given), gradients(wanted, wide), strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, reference) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_all_tokens_as_the_likeliest_ones_change_nothing(form: str) -> None:
    given = inputs()
    whole = distance(given, denominator=1, settings=LossSettings(form=form)).loss
    top = distance(given, denominator=1, settings=LossSettings(form=form, top_k=VOCABULARY)).loss
    assert abs((whole - top).item()) < 1e-10
    for found, wanted in zip(gradients(top, given), gradients(whole, given), strict=True):
        assert (found - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_targets_computed_before_give_the_loss_of_targets_computed_now(form: str) -> None:
    given = inputs()
    settings = LossSettings(form=form, temperature=2.0, ce_weight=0.3, top_k=6, chunk_bytes=SEVEN_ROWS)
    targets = topk_targets(
        given["teacher_hidden_NG"], given["teacher_head_VG"], top_k=6, temperature=2.0, chunk_bytes=SEVEN_ROWS
    )
    assert targets.token_ids.shape == (ROWS, 6) and targets.log_p.shape == (ROWS, 7)
    assert (targets.log_p.exp().sum(1) - 1).abs().max() < 1e-12
    now = distance(given, denominator=2, settings=settings).loss
    student = given["student_hidden_NH"], given["student_head_VH"]
    before = chunked_topk_kl(*student, targets, denominator=2, labels_N=given["labels_N"], settings=settings).loss
    assert abs((now - before).item()) < 1e-12
    for found, wanted in zip(gradients(before, given), gradients(now, given), strict=True):
        assert (found - wanted).abs().max() < 1e-12
    targets.log_p.requires_grad_(False)
    again = chunked_topk_kl(*student, targets, denominator=2, labels_N=given["labels_N"], settings=settings).loss
    assert again.item() == before.item()  # targets serve several students and epochs: they are not overwritten


@pytest.mark.parametrize("padded", ["student", "teacher"])
@pytest.mark.parametrize("top_k", [None, 5])
def test_padding_rows_of_the_longer_head_have_no_logits(padded: str, top_k: int | None) -> None:
    given = inputs()
    settings = LossSettings(temperature=2.0, top_k=top_k)
    wanted = distance(given, denominator=1, settings=settings).loss
    wanted_gradients = gradients(wanted, given)
    name = "student_head_VH" if padded == "student" else "teacher_head_VG"
    head = given[name].detach()
    given[name] = torch.cat([head, 9 * torch.ones(3, head.shape[1], dtype=head.dtype)]).requires_grad_()
    loss = distance(given, denominator=1, settings=settings).loss
    assert abs((loss - wanted).item()) < 1e-12
    hidden_gradient, head_gradient = gradients(loss, given)
    assert (hidden_gradient - wanted_gradients[0]).abs().max() < 1e-12
    assert (head_gradient[:VOCABULARY] - wanted_gradients[1]).abs().max() < 1e-12
    assert padded == "teacher" or head_gradient[VOCABULARY:].abs().max() == 0


def test_the_hidden_loss_compares_the_channels_that_were_kept() -> None:
    given = inputs()
    kept = torch.tensor([0, 2, 3, 5, 6, 8, 9, 11])
    student, teacher, labels = (given[n] for n in ("student_hidden_NH", "teacher_hidden_NG", "labels_N"))
    loss = hidden_cosine_distance(student, teacher, denominator=18, labels_N=labels, kept_channels_H=kept)
    valid = labels != IGNORE
    rows = zip(student[valid], teacher[valid][:, kept], strict=True)
    wanted = sum((1 - (s @ t) / (s.norm() * t.norm()) for s, t in rows), start=torch.zeros(())) / 18
    assert abs((loss - wanted).item()) < 1e-12
    found, reference = (torch.autograd.grad(term, student, retain_graph=True)[0] for term in (loss, wanted))
    assert (found - reference).abs().max() < 1e-12
    scaled = hidden_cosine_distance(7 * teacher[:, kept], teacher, denominator=1, kept_channels_H=kept)
    assert abs(scaled.item()) < 1e-12
    with pytest.raises(AssertionError, match="widths differ"):
        hidden_cosine_distance(student, teacher, denominator=1)


def test_ignored_rows_get_no_gradient() -> None:
    given = inputs()
    hidden_gradient, _ = gradients(distance(given, denominator=1).loss, given)
    ignored = given["labels_N"] == IGNORE
    assert hidden_gradient[ignored].abs().max() == 0
    assert hidden_gradient[~ignored].abs().min() > 0


def test_a_batch_without_valid_rows_gives_zero_and_zero_gradients() -> None:
    given = inputs()
    given["labels_N"] = torch.full_like(given["labels_N"], IGNORE)
    loss = distance(given, denominator=1).loss
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, given))


def test_partial_losses_over_one_denominator_add_up() -> None:
    given = inputs()
    whole = distance(given, denominator=18).loss

    def part(rows: slice) -> LossTerms:
        by_row = ("student_hidden_NH", "teacher_hidden_NG", "labels_N")
        return distance({n: t[rows] if n in by_row else t for n, t in given.items()}, denominator=18)

    parts = part(slice(0, 10)).loss + part(slice(10, None)).loss
    assert abs((whole - parts).item()) < 1e-12
    for found, wanted in zip(gradients(parts, given), gradients(whole, given), strict=True):
        assert (found - wanted).abs().max() < 1e-12


def test_equal_models_have_zero_loss_and_zero_gradient() -> None:
    given = inputs()
    given["teacher_hidden_NG"] = given["student_hidden_NH"].detach()
    given["teacher_head_VG"] = given["student_head_VH"].detach()
    loss = distance(given, denominator=1).loss
    assert abs(loss.item()) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients(loss, given))


def test_bfloat16_inputs_lose_nothing_in_the_logits() -> None:
    given = inputs(torch.bfloat16)
    # A student close to its teacher, where logits rounded to bfloat16 would drown the gradient in noise.
    nudge = 0.02 * torch.randn(VOCABULARY, STUDENT_HIDDEN, generator=torch.Generator().manual_seed(1))
    given["teacher_hidden_NG"] = given["student_hidden_NH"].detach()
    given["teacher_head_VG"] = (given["student_head_VH"].detach() + nudge).bfloat16()
    loss = distance(given, denominator=1).loss
    wide = {n: t.detach().double().requires_grad_() if t.is_floating_point() else t for n, t in given.items()}
    wanted = reference_loss(wide, 1)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / wanted.item() - 1) < 1e-4
    for found, reference in zip(gradients(loss, given), gradients(wanted, wide), strict=True):
        assert found.dtype == torch.bfloat16
        assert relative_error(found, reference) < 5e-3  # the rounding of the result itself
    rounded = (given["student_hidden_NH"] @ given["student_head_VH"].T).double()
    naive = (
        F.log_softmax(rounded, -1).exp()
        - F.log_softmax((given["teacher_hidden_NG"] @ given["teacher_head_VG"].T).double(), -1).exp()
    )
    naive = naive[given["labels_N"] != IGNORE].T @ given["student_hidden_NH"].double()[given["labels_N"] != IGNORE]
    assert relative_error(naive.detach(), gradients(reference_loss(wide, 1), wide)[1]) > 5e-2


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("ce_weight", "top_k"), [(0.0, None), (0.5, None), (0.0, 5)])
def test_the_logits_of_all_rows_never_exist_at_once(form: str, ce_weight: float, top_k: int | None) -> None:
    given = inputs()
    num_buffers = FORMS[form].num_buffers + (ce_weight > 0)
    seven_rows = 7 * num_buffers * VOCABULARY * 8
    chunk = LossSettings(form=form, temperature=2.0, ce_weight=ce_weight, top_k=top_k, chunk_bytes=seven_rows)
    with LargestTensor() as largest:
        gradients(distance(given, denominator=1, settings=chunk).loss, given)
    assert largest.num_elements == max(7 * VOCABULARY, VOCABULARY * TEACHER_HIDDEN)  # a chunk, or a head itself
    with LargestTensor() as largest:
        gradients(reference_loss(given, 1, chunk), given)
    assert largest.num_elements == ROWS * VOCABULARY  # the probe does see whole logits


def test_without_gradients_nothing_is_prepared_for_them() -> None:
    given = inputs()
    with torch.no_grad(), LargestTensor() as largest:
        terms = distance(given, denominator=1, settings=LossSettings(chunk_bytes=1))
    assert not terms.loss.requires_grad
    assert largest.num_elements == VOCABULARY * TEACHER_HIDDEN  # a transposed view of the teacher's head
    wanted = reference_loss(given, 1)
    assert abs((terms.kl - wanted).item()) < 1e-10


def peak_bytes(compute: Callable[[], object], folder: Path) -> int:
    """The most bytes that PyTorch's CPU allocator held at once beyond those before, by its own record."""
    trace = folder / "trace.json"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        compute()
    recorded.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return int(max(totals) - (totals[0] - events[0]["args"]["Bytes"]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("ce_weight", "top_k"), [(0.0, None), (0.5, None), (0.0, 8)])
def test_memory_is_the_stated_chunk_and_the_two_gradients_for_any_vocabulary(
    form: str, ce_weight: float, top_k: int | None, tmp_path: Path
) -> None:
    tokens, hidden, chunk_bytes = 512, 16, 2_000_000
    settings = LossSettings(form=form, ce_weight=ce_weight, top_k=top_k, chunk_bytes=chunk_bytes)
    labels = torch.zeros(tokens, dtype=torch.long)

    def chunked(hidden_NH: Tensor, head_VH: Tensor) -> None:
        student = hidden_NH.requires_grad_(), head_VH.requires_grad_()
        loss = chunked_kl(*student, *student, denominator=1, labels_N=labels, settings=settings).loss
        torch.autograd.grad(loss, student)

    def plain(hidden_NH: Tensor, head_VH: Tensor) -> None:
        student = hidden_NH.requires_grad_(), head_VH.requires_grad_()
        log_q, log_p = ((h @ head.T).log_softmax(-1) for h, head in (student, (hidden_NH.detach(), head_VH.detach())))
        torch.autograd.grad(kl(log_p, log_q), student)

    for vocabulary in (2000, 4000):
        inputs = torch.randn(tokens, hidden), torch.randn(vocabulary, hidden)
        chunked(*inputs)  # what is allocated once and for all
        without_gradients = peak_bytes(partial(chunked, *inputs), tmp_path) - 4 * hidden * (tokens + vocabulary)
        assert 0.6 * chunk_bytes < without_gradients < 1.05 * chunk_bytes
        assert peak_bytes(partial(plain, *inputs), tmp_path) >= 5 * 4 * tokens * vocabulary  # the probe does see them
