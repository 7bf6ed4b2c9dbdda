"""Fine-tuning losses: limits, gradients, precision and errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_ext.tune import losses


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    spread=st.floats(0.01, 100),
    temperature=st.floats(0.05, 50),
    reduction=st.sampled_from(["mean", "batchmean"]),
)
def test_kl_is_the_divergence(seed, spread, temperature, reduction):
    student, teacher = (spread * normal(6, 9, seed=seed + i, dtype=torch.float64) for i in (0, 1))
    ours = losses.kd_kl(student, teacher, 3.0, temperature, reduction)
    p, q = (teacher / temperature).log_softmax(1), (student / temperature).log_softmax(1)
    exact = (p.exp() * (p - q)).sum(1).mean() / (1 if reduction == "batchmean" else 9)
    # the clamp replaces probabilities below e^-80
    torch.testing.assert_close(ours, 3 * temperature**2 * exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01])
def test_kl_keeps_its_digits_when_student_and_teacher_agree(classes, gap):
    teacher = 3 * normal(256, classes, seed=1)
    student = teacher + gap * normal(256, classes, seed=2)
    ours = losses.kd_kl(student, teacher).item()
    exact = losses.kd_kl(student.double(), teacher.double()).item()
    assert ours == pytest.approx(exact, rel=1e-4)
    assert losses.kd_kl(teacher, teacher) == 0


def test_kl_survives_logits_that_disagree_completely():
    student = torch.tensor([[500.0, 0.0, -500.0]]).requires_grad_()
    loss = losses.kd_kl(student, torch.tensor([[-500.0, 0.0, 500.0]]), 1.0, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1000, rel=1e-6)
    torch.testing.assert_close(student.grad, torch.tensor([[1.0, 0.0, -1.0]]))


@pytest.mark.parametrize("scaling", losses.KD_SCALINGS)
def test_gradients_of_every_scaling(scaling):
    student, teacher = (normal(3, 4, seed=i, dtype=torch.float64).requires_grad_() for i in (3, 4))
    assert torch.autograd.gradcheck(lambda s, t: losses.kd(s, t, scaling, 0.7, 2.0), (student, teacher))
    # the gradient vanishes where the logits agree
    same = teacher.detach().clone().requires_grad_()
    losses.kd(same, teacher.detach(), scaling, temperature=2.0).backward()
    torch.testing.assert_close(same.grad, torch.zeros_like(same), rtol=0, atol=1e-12)


def test_the_kl_gradient_is_the_difference_of_probabilities():
    student, teacher = normal(5, 7, seed=5).requires_grad_(), normal(5, 7, seed=6)
    losses.kd_kl(student, teacher, alpha=1.0, temperature=4.0).backward()
    expected = 4 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)) / 5
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-7)


def test_entropy_is_lowest_where_the_logits_agree():
    teacher = normal(4, 10, seed=7)
    best = losses.kd(teacher, teacher, "entropy", alpha=2.0, temperature=5.0).item()
    assert best == pytest.approx(-2 * 25 * math.log(10), rel=1e-6)
    assert losses.kd(teacher + normal(4, 10, seed=8), teacher, "entropy", alpha=2.0, temperature=5.0) > best


def test_all_but_mse_ignore_a_shift_of_the_logits():
    student, teacher = normal(4, 10, seed=9), normal(4, 10, seed=10)
    for scaling in losses.KD_SCALINGS:
        moved, still = losses.kd(student + 3, teacher, scaling), losses.kd(student, teacher, scaling)
        assert (moved > still + 1) if scaling == "mse" else moved.item() == pytest.approx(still.item(), rel=1e-3)


@pytest.mark.parametrize("scaling", losses.KD_SCALINGS)
def test_low_precision_logits_are_widened(scaling):
    student, teacher = normal(4, 10, seed=11).half(), normal(4, 10, seed=12).half()
    loss = losses.kd(student, teacher, scaling)
    assert loss.dtype == torch.float32
    assert loss == losses.kd(student.float(), teacher.float(), scaling)


def test_difficulty_is_one_minus_the_label_probability():
    logits, labels = normal(8, 5, seed=13), torch.arange(8) % 5
    right = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(losses.difficulty(logits, labels), 1 - right)
    sure = torch.tensor([[50.0, 0.0]])
    assert losses.difficulty(sure, torch.tensor([0])).item() == pytest.approx(math.exp(-50), rel=1e-5)


def test_masked_ce_divides_by_the_whole_batch():
    logits, labels = normal(8, 5, seed=14), torch.arange(8) % 5
    easy = torch.tensor([True, False] * 4)
    each = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses.masked_ce(logits, labels, easy), each[easy].sum() / 8)
    torch.testing.assert_close(losses.masked_ce(logits, labels, torch.ones(8, dtype=torch.bool)), each.mean())
    none = logits.clone().requires_grad_()
    loss = losses.masked_ce(none, labels, torch.zeros(8, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not none.grad.any()


def test_feature_alignment_by_hand_and_both_gradients():
    teacher, student = (normal(2, 3, 2, 2, seed=i, dtype=torch.float64).requires_grad_() for i in (15, 16))
    energies = [(x**2).mean((2, 3)) for x in (teacher, student)]
    units = [e / e.norm(dim=1, keepdim=True) for e in energies]
    loss = losses.feature_alignment([teacher, teacher], [student, student])
    torch.testing.assert_close(loss, 2 * F.mse_loss(*units))
    assert torch.autograd.gradcheck(lambda t, s: losses.feature_alignment([t], [s]), (teacher, student))


def test_feature_alignment_in_half_precision_does_not_overflow():
    big = (300 * normal(2, 3, 4, 4, seed=17)).half()
    loss = losses.feature_alignment([big], [big.flip(0)])
    assert torch.isfinite(loss)
    assert loss.dtype == torch.float32


def test_signed_perturbation_moves_one_step_and_is_a_constant():
    x = normal(2, 3, 4, 4, seed=18).requires_grad_()
    grad = normal(2, 3, 4, 4, seed=19)
    grad[0, 0, 0, 0] = 0
    moved = losses.signed_perturbation(x, grad, 0.25)
    assert not moved.requires_grad
    torch.testing.assert_close(moved - x.detach(), 0.25 * grad.sign(), rtol=0, atol=1e-6)
    assert moved[0, 0, 0, 0] == x[0, 0, 0, 0]


def test_errors_name_the_argument():
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"kd_kl: student and teacher must have one shape .* \(2, 3\) and \(2, 4\)"):
        losses.kd_kl(a, b)
    with pytest.raises(ValueError, match="kd: student and teacher must have one shape"):
        losses.kd(a, b, "mse")
    with pytest.raises(ValueError, match="kd_kl: temperature must be positive, got 0"):
        losses.kd_kl(a, a, temperature=0)
    with pytest.raises(ValueError, match="kd: temperature must be positive, got -1"):
        losses.kd(a, a, "entropy", temperature=-1)
    with pytest.raises(ValueError, match="reduction must be"):
        losses.kd_kl(a, a, reduction="sum")
    with pytest.raises(ValueError, match="kd: scaling must be one of kl_mean, kl_batchmean, mse, entropy, got 'kl'"):
        losses.kd(a, a, "kl")
    maps = [torch.ones(2, 3, 4, 4)]
    with pytest.raises(ValueError, match="same number of layers, at least one, got 1 and 2"):
        losses.feature_alignment(maps, maps * 2)
    with pytest.raises(ValueError, match="got 0 and 0"):
        losses.feature_alignment([], [])
    with pytest.raises(ValueError, match="maps of layer 0 must have one shape"):
        losses.feature_alignment(maps, [torch.ones(2, 3, 4, 5)])
