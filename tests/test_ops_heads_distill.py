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
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    assert_exports,
    assert_raises,
    assert_same,
    assert_within,
    by,
    compiled,
    every,
    path,
    refused,
    replayed,
    skip_refused,
    unchanged,
)

from zsq_ext.ops import KD_SCALINGS, backend, distill_head, reference
from zsq_ext.ops.cases import heads as cases
from zsq_ext.ops.reference.heads import LOG_FLOOR, kd_weight

ALL = every(cases.DISTILL)
CASE = {case.name: case for case in cases.DISTILL}
NAMES = ("student", "teacher", "labels", "easy", "kd", "alpha", "temperature", "ce", "tau", "strict")
COLUMNS = ("value", "base", "shift", "ce", "lse", "wrong", "right", "agree")

pytestmark = pytest.mark.usefixtures("poison")


def public(args):
    return dict(zip(NAMES, args, strict=True))


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


# how far a backend may be off


class Bounds:
    """What rounding may do, in float64, to a backend that computes in floats of half-unit u.

    K additions follow one another at worst; an exponential is off by 2 units (4 u) and by its argument's own error,
    that is by up to 4 roundings of numbers as large as M, the largest quotient, or the largest logit at temperature 1.
    """

    def __init__(self, case):
        self.case, self.args = case, case.args()
        student, teacher, *_ = self.args
        info = torch.finfo(case.compute)
        self.u, self.tiny = info.eps / 2, 1e-36 if info.bits == 32 else 0.0  # below e^-87 an exponential may be 0
        self.T = self.args[NAMES.index("temperature")]
        self.s, self.t = (x.double().nan_to_num(0, neginf=0) for x in (student, teacher))
        self.chain = student.size(1) + 12
        self.top = torch.maximum(self.s.abs(), self.t.abs()).amax(1, keepdim=True) if student.numel() else self.s

    def normaliser(self, top, lse):
        """Of a log-sum-exp: the sum's relative error, and the logarithm's and the addition's rounding."""
        return self.u * (self.chain + 8 * top + 2 * lse.abs())

    def ratio(self, base, shift):
        """(log_p, p, r, what r may be off by beside the shift): errors of u's two operations and of the last one."""
        u = (self.s - self.t) / self.T
        log_p, r = self.t / self.T - base, u - shift
        bounded = log_p < LOG_FLOOR
        r = torch.where(bounded, self.s / self.T - base - shift - LOG_FLOOR, r)
        off = self.u * (2 * u.abs() + 2 * r.abs() + shift.abs())
        off = torch.where(bounded, self.normaliser(self.top / self.T, base) + off, off)
        return log_p, log_p.clamp_min(LOG_FLOOR).exp(), r, off

    def rows(self, rows):
        """Slack of each column of rows, [B, 8], those that are flags aside."""
        value, base, shift, ce, lse, wrong, _, _ = rows.double()[:, :, None].unbind(1)
        top, kd = self.top / self.T, self.case.kd
        zero = torch.zeros_like(value)
        if kd == "mse":
            slack = [self.u * self.chain * value, zero, zero]
        elif kd == "entropy":
            u = (self.s - self.t) / self.T
            base_off = self.normaliser(2 * top, base)
            log_p = u - base
            p, off = log_p.exp(), base_off + self.u * (4 * u.abs() + log_p.abs())
            terms = p * ((log_p.abs() + 1) * off + self.u * self.chain * log_p.abs())
            slack = [terms.sum(1, keepdim=True), base_off, zero]
        else:
            _, p, r, off = self.ratio(base, shift)
            base_off = self.normaliser(top, base)
            grown = (p * torch.expm1(r).abs()).sum(1, keepdim=True)
            # the root of sum p (e^(r) - 1) moves by the terms' errors that they do not share
            drift = self.u * (self.chain + 16 + 8 * top) * grown + (p * (1 + torch.expm1(r).abs()) * off).sum(1, True)
            drift = drift + 2 * self.u * shift.abs()
            relative = base_off + self.u * (self.chain + 40)
            each = relative * value + (p * torch.expm1(r).abs() * off).sum(1, keepdim=True) + 4 * drift**2
            slack = [each, base_off, drift + self.u * base_off]
        odds = self.u * (self.chain + 8 + 8 * self.top)
        slack += [
            2 * odds * ce.abs() + torch.where(ce > 0.1, odds, 0),
            self.normaliser(self.top, lse),
            2 * odds * wrong,
        ]
        return torch.cat(slack, 1) + self.tiny

    def slopes(self, rows, grads):
        """Slack of both gradients, [B, K], with these rows given."""
        value, base, shift, _, lse, wrong, _, _ = rows.double()[:, :, None].unbind(1)
        _, teacher, labels, _, kd, alpha, _, ce, *_ = self.args
        samples, classes = teacher.shape
        grad_kd, grad_ce = (g.double().abs() for g in grads)
        weight = grad_kd * kd_weight(kd, alpha, self.T, samples, classes) / (1 if kd == "mse" else self.T)
        exp_off = self.u * (8 + 4 * self.top / self.T + 2 * base.abs())
        if kd == "mse":
            size = 2 * (self.s - self.t).abs()
            ds = dt = weight * size * 8 * self.u
        elif kd == "entropy":
            u = (self.s - self.t) / self.T
            log_p = u - base
            p, off = log_p.exp(), self.u * (2 * u.abs() + 3 * log_p.abs() + 3 * value.abs())
            ds = dt = weight * p * (off + (log_p - value).abs() * (exp_off + off))
        else:
            _, p, r, off = self.ratio(base, shift)
            grown = torch.expm1(r).abs()
            ds = weight * p * (grown * (exp_off + 40 * self.u) + (1 + grown) * off)
            dt = weight * p * ((r + value).abs() * (exp_off + 8 * self.u) + off + 2 * self.u * (r.abs() + value))
        if labels is not None:
            soft = (self.s - lse).exp().scatter(1, labels[:, None], wrong)
            ds = ds + grad_ce * ce / samples * soft * self.u * (12 + 4 * self.top + 2 * lse.abs())
        return ds, dt


def rounding_of(t):
    """What storing t in its dtype may change, subnormals included; and one more addition."""
    info = torch.finfo(t.dtype)
    return t.double().abs().nan_to_num(0) * info.eps * 1.5 + info.smallest_normal * info.eps


def assert_forward(case, got):
    bounds, (kd, ce, easy, counts, rows) = Bounds(case), by("reference", "distill_head")(*case.args())
    slack = bounds.rows(rows)
    for i, name in enumerate(COLUMNS):
        column = slack[:, i] + rounding_of(rows[:, i]) if i < 6 else 0
        # of an infinite normaliser everything after it is NaN, whether it is infinite or NaN itself
        got_i, expected_i = (t[:, i].nan_to_num(torch.nan, torch.nan, torch.nan) for t in (got[4], rows))
        kind = (got[4][:, i], rows[:, i]) if name in ("value", "ce", "wrong") else (got_i, expected_i)
        assert_within(*kind, column, name)
    assert torch.equal(got[2].cpu(), easy)
    assert torch.equal(got[3].cpu(), counts)
    student, _, _, _, kind, alpha, temperature, weight, *_ = case.args()
    samples, classes = student.shape
    scale = abs(kd_weight(kind, alpha, temperature, samples, classes))
    assert_within(got[0], kd, scale * slack[:, 0].sum() + rounding_of(kd), "kd")
    assert_within(got[1], ce, weight * slack[:, 3].mean() + rounding_of(ce), "ce")
    assert [t.dtype for t in got] == [case.compute] * 2 + [torch.bool, torch.int64] + [case.compute]


def backward_args(case, device="cpu", kd=True, ce=True):
    """What the backward gets after a forward of the reference, both gradients wanted."""
    _, _, easy, _, rows = by("reference", "distill_head")(*case.args())
    student, teacher, labels, _, *rest = case.args(device)
    grad_kd, grad_ce = case.grads(device)
    grads = grad_kd if kd else None, grad_ce if ce else None
    return student, teacher, labels, easy.to(device), rows.to(device), *grads, *rest[:4], True, True


def assert_backward(case, got, **which):
    expected = by("reference", "distill_head_backward")(*backward_args(case, **which))
    slacks = Bounds(case).slopes(backward_args(case)[4], case.grads())
    for name, g, e, slack in zip(("dstudent", "dteacher"), got, expected, slacks, strict=True):
        assert g.dtype == case.dtype
        assert_within(g, e, slack + rounding_of(e) + Bounds(case).tiny, name)


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


# gradients and torch


@pytest.mark.parametrize("kd", KD_SCALINGS)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_gradcheck(kd, name):
    args = public(cases.DistillCase("", (3, 5), torch.float64, kd, temperature=2.0).args())
    leaves = [args[k].clone().requires_grad_() for k in ("student", "teacher")]
    with backend.backend(name):
        torch.autograd.gradcheck(lambda s, t: distill_head(**{**args, "student": s, "teacher": t})[:2], leaves)


def test_the_teacher_costs_nothing_where_it_is_not_trained(monkeypatch):
    asked = []
    original = reference.distill_head_backward
    monkeypatch.setattr(
        reference, "distill_head_backward", lambda *args: (asked.append((*args[3], *args[5])), original(*args))[1]
    )
    backend.find.cache_clear()
    args = public(CASE["kl_batchmean"].args())
    student, teacher = args["student"].clone().requires_grad_(), args["teacher"].clone().requires_grad_()
    with backend.backend("reference"):
        distill_head(**{**args, "student": student}).kd.backward()
        distill_head(**{**args, "teacher": teacher}).kd.backward()
        out = distill_head(**{**args, "student": student, "teacher": teacher})
        out.ce.backward()
    backend.find.cache_clear()
    assert teacher.grad is not None
    wants = [(kd is not None, ce is not None, *need) for kd, ce, *need in asked]
    assert wants == [(True, False, True, False), (True, False, False, True), (False, True, True, False)]
    assert not any(t.requires_grad for t in out[2:])


def test_double_backward_is_refused():
    args = public(CASE["kl_batchmean"].args())
    student = args["student"].requires_grad_()
    (first,) = torch.autograd.grad(distill_head(**args).kd, student, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^distill_head: a gradient must be taken once"):
        first.sum().backward()


def test_no_gradient_where_none_is_wanted():
    args = public(CASE["kl_batchmean"].args())
    assert not any(t.requires_grad for t in distill_head(**args))
    args["student"].requires_grad_()
    with torch.no_grad():
        assert not any(t.requires_grad for t in distill_head(**args))


def test_autocast_keeps_the_dtype():
    args = public(CASE["kl_batchmean_bf16"].args())
    with torch.autocast("cpu", torch.bfloat16):
        out = distill_head(**args)
    assert (out.kd.dtype, out.ce.dtype) == (torch.float32, torch.float32)


@every(cases.DISTILL_ERRORS)
def test_errors_name_the_argument(case):
    good = {"student": torch.zeros(4, 5), "teacher": torch.zeros(4, 5), "labels": torch.zeros(4, dtype=torch.int64)}
    good |= {"tau": 0.5, "check": True}
    assert_raises(case, distill_head, good)


@pytest.mark.parametrize("name", ["kl_batchmean", "entropy_no_labels", "given", "mse_fp16", "two_classes", "strided"])
def test_opcheck(name, fast):
    where, device = fast
    case = CASE[name]
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    with backend.backend(where):
        torch.library.opcheck(torch.ops.zsq.distill_head.default, case.args(device), test_utils=utilities)
        torch.library.opcheck(
            torch.ops.zsq.distill_head_backward.default, backward_args(case, device), test_utils=utilities
        )


def test_compiles_without_a_break():
    args = public(CASE["given"].args())

    def step(student, teacher):
        out = distill_head(**{**args, "student": student, "teacher": teacher})
        return out.kd + 2 * out.ce, out.right, out.easy

    pairs = [[args[k].clone().requires_grad_() for k in ("student", "teacher")] for _ in range(2)]
    (found, graphs), plain = compiled(step, *pairs[0]), step(*pairs[1])
    assert any("distill_head" in op for op in graphs[0])
    assert_same(found, plain)
    assert_same(torch.autograd.grad(found[0], pairs[0]), torch.autograd.grad(plain[0], pairs[1]))


class Head(torch.nn.Module):
    def forward(self, student, teacher, labels):
        return distill_head(student, teacher, labels, alpha=20.0, tau=0.5)[:3]


def test_export_keeps_the_op():
    student, teacher, labels = CASE["kl_batchmean"].args()[:3]
    assert_exports(Head(), (student, teacher, labels), (student[:5], teacher[:5], labels[:5]), "distill_head")


def test_meta_tensors_have_a_shape_and_no_values():
    logits = torch.empty(4, 10, device="meta")
    out = distill_head(logits, logits, torch.empty(4, dtype=torch.int64, device="meta"))
    assert (out.kd.shape, out.easy.shape, out.right.dtype) == ((), (4,), torch.int64)


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replays_with_new_contents(name):
    case = CASE["threads"]
    args = case.args("cuda")
    other = case.args("cuda", seed=7)

    def change():
        for t, new in zip(args[:3], other[:3], strict=True):
            t.copy_(new)

    with backend.backend(name):
        out = replayed(lambda: torch.ops.zsq.distill_head(*args), change)
        assert_same(out, torch.ops.zsq.distill_head(*other))
