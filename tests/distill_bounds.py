"""How far a backend of distill_head may be off: bounds of its rounding, derived term by term."""

import torch
from parity import assert_within, by

from zsq_ext.ops.reference.heads import LOG_FLOOR, kd_weight

NAMES = ("student", "teacher", "labels", "easy", "kd", "alpha", "temperature", "ce", "tau", "strict")
COLUMNS = ("value", "base", "shift", "ce", "lse", "wrong", "right", "agree")


def public(args):
    return dict(zip(NAMES, args, strict=True))


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
