"""distill_head: what it means, that every backend stays within derived bounds of float64, and torch's machinery.

Broken on purpose on the CPU, each seen red; what saw it is in brackets. The shift's last step left out
[kl_batchmean_close]; e^r - 1 - r by subtraction, in the scalar and in the vector code [keeps its digits]; the floor
of the teacher's probabilities dropped [logits that disagree completely; kl_batchmean_far]; hard samples kept in the
cross-entropy's value or in its gradient [every case with labels]; the label kept among the other classes [every case;
at the threshold]; the last classes, or one lane of eight, left out of a sum [keeps its digits]; < for <= [at the
threshold]; of equal logits the last one predicted [ties]; NaN below other logits, in the scalar and in the vector
code [nan_inf]; the teacher's gradient without the divergence's value, the gradient without the temperature [keeps its
digits]; exponentials of the logits themselves, 1 - p for the odds, log-sum-exp minus logit for the cross-entropy [a
sure teacher]; a label that does not exist ignored [out of range].
"""

import math

import pytest
import torch
import torch.nn.functional as F
from distill_bounds import assert_backward, assert_forward, backward_args, public
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    assert_same,
    by,
    every,
    path,
    refused,
    skip_refused,
    unchanged,
)

from zsq_ext.ops import KD_SCALINGS, backend, distill_head
from zsq_ext.ops.cases import heads as cases
from zsq_ext.ops.reference.heads import LOG_FLOOR

ALL = every(cases.DISTILL)
CASE = {case.name: case for case in cases.DISTILL}

pytestmark = pytest.mark.usefixtures("poison")


def eager(student, teacher, labels, easy, kd, alpha, temperature, ce, tau, strict):
    """What fine-tuning loops write, about 25 launches there and back: (kd, ce)."""
    if kd == "mse":
        divergence = alpha * F.mse_loss(student, teacher)
    elif kd == "entropy":
        log_p = ((student - teacher) / temperature).log_softmax(1)
        divergence = alpha * temperature**2 * (log_p.exp() * log_p).sum(1).mean()
    else:
        log_q = (student / temperature).log_softmax(1)
        log_p = (teacher / temperature).log_softmax(1).clamp_min(LOG_FLOOR)
        r = log_q - log_p
        kl = (log_p.exp() * (torch.expm1(r) - r)).sum(1).mean()
        divergence = alpha * temperature**2 * (kl if kd == "kl_batchmean" else kl / student.size(1))
    if labels is None:
        return divergence, torch.zeros_like(divergence)
    if easy is None:
        right = teacher.detach().softmax(1).gather(1, labels[:, None])[:, 0]
        easy = torch.ones_like(right) > 0 if tau is None else 1 - right < tau if strict else 1 - right <= tau
    each = F.cross_entropy(student, labels, reduction="none")
    return divergence, ce * torch.where(easy, each, 0).mean()


# meaning


@pytest.mark.parametrize("kd", KD_SCALINGS)
@pytest.mark.parametrize("trust", ["all", "below", "up_to", "given"])
def test_it_is_what_loops_write_in_float64(kd, trust):
    """Value and both gradients, on the reference and on the CPU: to a few hundred roundings of 1e-16."""
    for values in ("normal", "close", "far"):
        case = cases.DistillCase("", (12, 37), torch.float64, kd, trust=trust, values=values)
        args = case.args()
        for name in ("reference", "cpu"):
            found = []
            for function in (eager, lambda *a: distill_head(**public(a))[:2]):
                student, teacher = (t.clone().requires_grad_() for t in args[:2])
                with backend.backend(name):
                    terms = function(student, teacher, *args[2:])
                    found += [[*terms, *torch.autograd.grad(terms, (student, teacher), case.grads())]]
            for e, g in zip(*found, strict=True):
                # eager's own digits: e^r - 1 - r cancels to 1e-16 |r| where the logits are close
                torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12 * e.abs().max().item() + 1e-18)


@pytest.mark.parametrize("kd", KD_SCALINGS)
def test_it_is_what_loops_write_in_float32(kd):
    case = cases.DistillCase("", (64, 100), kd=kd, temperature=20.0)
    args = case.args()
    student, teacher = (t.clone().requires_grad_() for t in args[:2])
    got = distill_head(**{**public(args), "student": student, "teacher": teacher})[:2]
    theirs = [t.clone().requires_grad_() for t in args[:2]]
    expected = eager(*theirs, *args[2:])
    # in float32 it is eager that loses digits: 2^-24 |r| of r^2 / 2, and r is 1 / 20 here
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    for g, e in zip(
        torch.autograd.grad(got, (student, teacher), case.grads()),
        torch.autograd.grad(expected, theirs, case.grads()),
        strict=True,
    ):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("classes", [10, 1000])
def test_float32_keeps_its_digits_where_student_and_teacher_agree(gap, classes, fast):
    """Eager's KL is 1e-4 off at a gap of 0.01 and noise at 1e-4; this one is not, and neither is its gradient."""
    name, device = fast
    rng = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(64, classes, generator=rng)
    student = teacher + gap * torch.randn(64, classes, generator=rng)
    with backend.backend("reference"):
        wide = [t.double().requires_grad_() for t in (student, teacher)]
        exact = distill_head(*wide, alpha=20.0).kd
        exact_grads = torch.autograd.grad(exact, wide)
    with backend.backend(name):
        ours = [t.to(device).requires_grad_() for t in (student, teacher)]
        kd = distill_head(*ours, alpha=20.0).kd
        grads = torch.autograd.grad(kd, ours)
    assert kd.item() == pytest.approx(exact.item(), rel=1e-5, abs=0)
    for g, e in zip(grads, exact_grads, strict=True):
        assert (g.cpu().double() - e).norm() < 1e-4 * e.norm()


def test_documented_example():
    teacher = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    out = distill_head(teacher + torch.tensor([[2.0, 0], [0, 0]]), teacher, torch.tensor([0, 0]), kd="mse", tau=0.5)
    assert (out.kd.item(), out.easy.tolist()) == (1, [True, False])
    assert out.ce.item() == pytest.approx(torch.log1p(torch.tensor(-3.0).exp()).item() / 2)
    assert [t.item() for t in (out.right, out.agree, out.trusted)] == [1, 2, 1]


def test_equal_logits_give_exactly_nothing(fast):
    name, device = fast
    x = CASE["kl_batchmean"].args(device)[0].requires_grad_()
    with backend.backend(name):
        for kd in ("kl_batchmean", "mse"):
            total = distill_head(x, x.detach(), kd=kd).kd
            assert total == 0
            assert not torch.autograd.grad(total, x)[0].any()


def test_logits_that_disagree_completely(fast):
    name, device = fast
    student = torch.tensor([[500.0, 0.0, -500.0]], device=device).requires_grad_()
    with backend.backend(name):
        kd = distill_head(student, -student.detach(), temperature=1.0).kd
        (grad,) = torch.autograd.grad(kd, student)
    assert kd.item() == pytest.approx(1000, rel=1e-6)
    # e^80 times e^-80, each 80 half-units of its exponent off
    torch.testing.assert_close(grad.cpu(), torch.tensor([[1.0, 0.0, -1.0]]), rtol=160 * 2**-24, atol=1e-30)


def test_entropy_is_lowest_where_the_logits_agree():
    teacher = CASE["entropy"].args()[1]
    best = distill_head(teacher, teacher, kd="entropy", alpha=2.0, temperature=5.0).kd.item()
    assert best == pytest.approx(-2 * 25 * math.log(37), rel=1e-6)
    moved = teacher + torch.linspace(0, 1, 37)
    assert distill_head(moved, teacher, kd="entropy", alpha=2.0, temperature=5.0).kd > best


def test_all_but_mse_ignore_a_shift_of_the_logits():
    student, teacher = (t.double() for t in CASE["kl_batchmean"].args()[:2])
    for kd in KD_SCALINGS:
        moved, still = (distill_head(s, teacher, kd=kd).kd.item() for s in (student + 3, student))
        assert (moved > still + 1) if kd == "mse" else moved == pytest.approx(still, rel=1e-12)


def test_the_cross_entropy_is_divided_by_the_whole_batch():
    student, teacher, labels, *_ = CASE["given"].args()
    half = torch.arange(12) % 2 == 0
    each = F.cross_entropy(student, labels, reduction="none")
    for easy in (half, ~half & half, half | ~half):
        torch.testing.assert_close(distill_head(student, teacher, labels, easy=easy).ce, each[easy].sum() / 12)


@pytest.mark.parametrize("strict", [True, False])
def test_at_the_threshold(strict, fast):
    """Two classes as likely as each other: delta is 1/2 exactly."""
    name, device = fast
    teacher = torch.tensor([[3.0, 3.0], [3.0, 3.0001], [3.0001, 3.0]], device=device)
    with backend.backend(name):
        out = distill_head(teacher, teacher, torch.zeros(3, dtype=torch.int64, device=device), tau=0.5, strict=strict)
    assert out.easy.tolist() == [not strict, False, True]


def test_a_sure_teacher_is_not_rounded_to_certainty(fast):
    name, device = fast
    teacher = torch.tensor([[50.0, 0.0]], device=device)  # delta is e^-50
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    with backend.backend(name):
        for tau, easy in ((1.9e-22, False), (2e-22, True)):
            assert distill_head(teacher, teacher, labels, tau=tau).easy.item() is easy
        assert distill_head(teacher, teacher, labels).ce.item() == pytest.approx(1.9287e-22, rel=1e-4, abs=0)


def test_a_label_out_of_range_is_seen(fast):
    name, device = fast
    args = list(CASE["all"].args(device))
    args[2] = args[2].clone()
    args[2][3], args[2][5] = -1, 37
    student = args[0].clone().requires_grad_()
    for tau in (None, 0.5):
        with backend.backend(name):
            out = distill_head(**{**public(args), "student": student, "tau": tau})
            assert out.ce.isnan()
            assert out.kd.isfinite()
            (grad,) = torch.autograd.grad(out.ce, student)
        assert grad.isnan().all(1).nonzero().flatten().tolist() == [3, 5]
        assert grad.isnan().any(1).sum() == 2


def test_infinite_logits_are_seen(fast):
    name, device = fast
    for which in (0, 1):
        args = list(CASE["all"].args(device))
        args[which] = args[which].clone()
        args[which][2, 20] = torch.inf
        with backend.backend(name):
            for kd in KD_SCALINGS:
                assert not distill_head(**{**public(args), "kd": kd}).kd.isfinite()


# parity


@ALL
def test_forward_agrees_with_the_reference(case, fast):
    name, device = fast
    args = case.args(device)
    if refused(fast, "distill_head", case.dtype, lambda: distill_head(**public(args))):
        return
    with backend.backend(name), unchanged(args):
        assert_forward(case, torch.ops.zsq.distill_head(*args))


@ALL
def test_backward_agrees_with_the_reference(case, fast):
    name, device = fast
    skip_refused(fast, "distill_head_backward", case.dtype)
    with backend.backend(name):
        assert_backward(case, torch.ops.zsq.distill_head_backward(*backward_args(case, device)))


@pytest.mark.parametrize(("kd", "ce"), [(True, False), (False, True)])
def test_one_gradient_alone(kd, ce, fast):
    name, device = fast
    case = CASE["given"]
    args = backward_args(case, device, kd, ce)
    with backend.backend(name):
        assert_backward(case, torch.ops.zsq.distill_head_backward(*args), kd=kd, ce=ce)
        for need in ((True, False), (False, True)):
            ds, dt = torch.ops.zsq.distill_head_backward(*args[:-2], *need)
            assert (ds.numel() > 0, dt.numel() > 0) == need


@ALL
def test_scalar_path_agrees_with_the_reference(case, scalar):
    assert_forward(case, by("cpu", "distill_head")(*case.args()))
    assert_backward(case, by("cpu", "distill_head_backward")(*backward_args(case)))


def test_a_backend_repeats_its_bits(fast):
    name, device = fast
    case = CASE["threads"]
    with backend.backend(name):
        first, again = (torch.ops.zsq.distill_head(*case.args(device)) for _ in range(2))
    assert_same(again, first)


def test_any_number_of_threads_gives_the_same_bits():
    case, found = CASE["threads"], []
    for threads in (1, 2, 5):
        with path(threads=threads):
            found.append(
                (by("cpu", "distill_head")(*case.args()), by("cpu", "distill_head_backward")(*backward_args(case)))
            )
        assert_same(found[-1], found[0])


# properties


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 6), st.integers(2, 40)),
    spread=st.floats(0.01, 100),
    temperature=st.floats(0.05, 50),
    shift=st.floats(-20, 20),
)
def test_properties(seed, shape, spread, temperature, shift):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(shape[1], (shape[0],), generator=rng)
    student.requires_grad_()
    out = distill_head(student, teacher, labels, kd="kl_batchmean", temperature=temperature, tau=0.5)
    assert out.kd >= 0
    assert out.ce >= 0
    assert out.trusted == out.easy.sum()
    moved = distill_head(student + shift, teacher - shift, labels, kd="kl_batchmean", temperature=temperature, tau=0.5)
    # a shift rounds logits of up to 500, divided by T, and a probability moves by as much of itself
    slack = 1e-13 * (spread * 5 + 20) / temperature
    torch.testing.assert_close(moved.kd, out.kd, rtol=1e-9 + slack, atol=temperature**2 * slack)
    assert torch.equal(moved.easy, out.easy)
    (grad,) = torch.autograd.grad(out.kd + out.ce, student)
    assert grad.sum(1).abs().max() <= 1e-12 * (1 + temperature + grad.abs().max())
    order = torch.randperm(shape[0], generator=rng)
    again = distill_head(student[order], teacher[order], labels[order], temperature=temperature, tau=0.5)
    torch.testing.assert_close((again.kd, again.ce), (out.kd, out.ce), rtol=1e-12, atol=1e-15)
