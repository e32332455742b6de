"""The chunked distillation loss equals the textbook formula, value and gradients, without ever holding all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill.losses import LossSettings, LossTerms, chunked_kl
from minipuzzle.corpus import IGNORE

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


def reference_loss(given: dict[str, Tensor], denominator: float, temperature: float, ce_weight: float) -> Tensor:
    """The loss by torch's own functions, on logits that exist whole."""
    valid = given["labels_N"] != IGNORE
    logits = (given["student_hidden_NH"] @ given["student_head_VH"].T)[valid]
    teacher_logits = (given["teacher_hidden_NG"] @ given["teacher_head_VG"].T)[valid]
    log_q, log_p = F.log_softmax(logits / temperature, -1), F.log_softmax(teacher_logits / temperature, -1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    ce = F.cross_entropy(logits, given["labels_N"][valid], reduction="sum")
    return ((1 - ce_weight) * temperature**2 * kl + ce_weight * ce) / denominator


def gradients(loss: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [given["student_hidden_NH"], given["student_head_VH"]])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_bytes", [1, SEVEN_ROWS, 10**9])
def test_loss_and_gradients_equal_autograd_over_whole_logits(
    temperature: float, ce_weight: float, chunk_bytes: int
) -> None:
    given = inputs()
    settings = LossSettings(temperature=temperature, ce_weight=ce_weight, chunk_bytes=chunk_bytes)
    loss = distance(given, denominator=17, settings=settings).loss
    wanted = reference_loss(given, 17, temperature, ce_weight)
    assert abs((loss - wanted).item()) < 1e-10
    for found, reference in zip(gradients(3 * loss, given), gradients(3 * wanted, given), strict=True):
        assert (found - reference).abs().max() < 1e-10


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
    wanted = reference_loss(wide, 1, 1.0, 0.0)
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
    assert relative_error(naive.detach(), gradients(reference_loss(wide, 1, 1.0, 0.0), wide)[1]) > 5e-2


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


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_the_logits_of_all_rows_never_exist_at_once(ce_weight: float) -> None:
    given = inputs()
    chunk = LossSettings(temperature=2.0, ce_weight=ce_weight, chunk_bytes=SEVEN_ROWS)
    with LargestTensor() as largest:
        gradients(distance(given, denominator=1, settings=chunk).loss, given)
    assert largest.num_elements == max(7 * VOCABULARY, VOCABULARY * TEACHER_HIDDEN)  # a chunk, or a head itself
    with LargestTensor() as largest:
        gradients(reference_loss(given, 1, 2.0, ce_weight), given)
    assert largest.num_elements == ROWS * VOCABULARY  # the probe does see whole logits


def test_without_gradients_nothing_is_prepared_for_them() -> None:
    given = inputs()
    with torch.no_grad(), LargestTensor() as largest:
        terms = distance(given, denominator=1, settings=LossSettings(chunk_bytes=1))
    assert not terms.loss.requires_grad
    assert largest.num_elements == VOCABULARY * TEACHER_HIDDEN  # a transposed view of the teacher's head
    wanted = reference_loss(given, 1, 1.0, 0.0)
    assert abs((terms.kl - wanted).item()) < 1e-10
