"""adaround: what it means, and that every backend agrees.

No two libraries share an exponential, so h is compared within a tolerance; everything behind it is computed here again,
in numpy, from the h that a backend itself gives, and compared bit for bit (w_hat) or within what the formula's own
roundings allow (v's gradient, the sums).

Broken on purpose on the CPU, each seen red: NaN turned into a bound (nan_inf), the gradient let through outside the
range (conv) and where h is clamped (conv), the tail's lanes lost (documented example), the last piece lost (pieces),
the regulariser's sign (conv), dscale from codes not clamped (conv), v = 0 rounded down (documented example), a
reciprocal estimated instead of a division (the start), one coefficient of the exponential off in its fifth digit and
a gradient sent at |2h - 1| = 0 (both: scalar path beside AVX2), the logarithm's correction left out (conv), the first
channel's grid for all (the published composite), the base's sign lost (the start).
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    assert_same,
    assert_within,
    by,
    every,
    on_every_path,
    refused,
    skip_refused,
    unchanged,
)

from zsq_ext.ops import adaround, adaround_start, backend
from zsq_ext.ops.cases import adaround as cases

ALL = every(cases.ADAROUND)
CASE = {case.name: case for case in cases.ADAROUND}

pytestmark = pytest.mark.usefixtures("poison")


def unit_of(dtype):
    """Half a unit in the last place of 1: what one rounding may be off by, relatively."""
    return torch.finfo(dtype).eps / 2


def h_of(v, op):
    """What `op` makes of v: with a step of 1 and a base of 0 it comes out as it is."""
    v = v.to(torch.float64 if v.dtype == torch.float64 else torch.float32)
    one, zero = torch.ones(1, dtype=v.dtype, device=v.device), torch.zeros(1, dtype=torch.int32, device=v.device)
    base = torch.zeros(v.shape, dtype=torch.int16, device=v.device)
    (h,), _ = op([v], [base], [one], [zero], [-1], [2], None, None, False)
    return h


class Formula:
    """Everything behind h, in the type that computes; and from there on in float64, with what that may be off by."""

    # A backend adds up to 512 numbers, and then 8 lanes of them, before it goes on in float64; float64 has nothing to
    # go on in.
    CHAIN = 512 + 8

    def __init__(self, h, v, base, scale, zero_point, qmin, qmax, axis, beta):
        self.kind = h.dtype
        self.dtype, self.u = v.dtype, unit_of(h.dtype)
        shape = [1] * v.dim()
        if axis is not None:
            shape[axis] = scale.numel()
            axis %= v.dim()
        self.others = tuple(dim for dim in range(v.dim()) if scale.numel() == 1 or dim != axis)
        self.shape = scale.shape
        self.h = h.cpu().numpy()
        self.stretched = 1.2 * torch.sigmoid(v.detach().cpu().double()).numpy() - 0.1
        self.s = scale.cpu().reshape(shape).numpy()
        self.z = zero_point.cpu().reshape(shape).numpy().astype(self.s.dtype)
        self.code = np.add(base.cpu().numpy().astype(self.s.dtype), self.h)
        self.clamped = np.where(self.code < qmin, self.s.dtype.type(qmin), self.code)
        self.clamped = np.where(self.code > qmax, self.s.dtype.type(qmax), self.clamped)
        self.inside = (self.code >= qmin) & (self.code <= qmax)
        self.beta = None if beta is None else float(beta)

    def w_hat(self):
        w = np.multiply(np.subtract(self.clamped, self.z), self.s)
        return torch.from_numpy(np.asarray(w)).to(self.dtype)

    def _power(self):
        """(|2h - 1|, its power beta - 1, what that may be off by). log and exp are off by 2 units each, the product by
        half a one, all of them multiplied by the logarithm's size but for the last; below e^-87 it stays there."""
        a = np.abs(2 * self.h - 1).astype(np.float64)  # rounded here as there: near 1 its power makes much of it
        with np.errstate(all="ignore"):
            p = a ** (self.beta - 1)
            log = np.where(p > 0, np.abs(np.log(np.maximum(p, 1e-300))), 0)
        return a, p, p * self.u * (6 + 6 * np.minimum(log, 100)) + 2e-38

    def reg(self):
        a, p, off = self._power()
        terms = 1 - p * a
        chain = self.CHAIN if self.kind == torch.float32 else max(self.CHAIN, terms.size)
        slack = (off * a + 3 * self.u).sum() + (chain + 2) * self.u * np.abs(terms).sum()
        return torch.tensor(terms.sum()), slack

    def backward(self, grad, grad_reg):
        """((dv, slack), (dscale, slack)). Next to where the clamp of h begins it may have begun or not."""
        g, h, u = grad.cpu().double().numpy(), self.h.astype(np.float64), self.u
        s = (h + 0.1) / 1.2
        slope = 1.2 * s * (1 - s)
        dh = np.where(self.inside, g * self.s, 0)
        off = 2 * u * np.abs(dh)
        if self.beta is not None:
            _, p, off_p = self._power()
            weight = float(grad_reg) * 2 * self.beta
            term = weight * p * np.sign(2 * h - 1)
            dh, off = dh - term, off + abs(weight) * off_p + 3 * u * np.abs(term)
        dv = dh * slope
        # s is read back from h, in which its last places are lost
        slack = off * slope + np.abs(dh) * 8 * u + 2 * u * np.abs(dv)
        clamped = (h == 0) | (h == 1)
        near = np.abs(np.abs(self.stretched - 0.5) - 0.5) < 8 * u
        slack = np.where(clamped, np.where(near, np.abs(dv) + slack, 0), slack)
        dv = np.where(clamped, 0, dv)
        slack = slack + np.abs(dv) * unit_of(self.dtype) * 2 + torch.finfo(self.dtype).tiny
        dv = np.where(np.isnan(h), 0, dv)
        terms = g * (self.clamped.astype(np.float64) - self.z)
        chain = self.CHAIN if self.kind == torch.float32 else max(self.CHAIN, terms.size)
        sums = terms.sum(self.others), (chain + 4) * u * np.abs(terms).sum(self.others)
        found = (dv, slack), tuple(np.asarray(t).reshape(self.shape) for t in sums)
        return [tuple(torch.from_numpy(np.asarray(t, dtype=np.float64)) for t in pair) for pair in found]


# 2 units of the exponential, times at most a quarter, and what three roundings add in a number below 1.2
def assert_h(h, v):
    expected = (1.2 * torch.sigmoid(v.cpu().double()) - 0.1).clamp(0, 1)
    assert_within(h, expected, 4 * unit_of(h.dtype))


def assert_forward(found, case, op, device="cpu"):
    (w_hat,), reg = found
    args = case.lists(device)
    h = h_of(args[0][0], op)
    assert_h(h, args[0][0])
    formula = Formula(h, *(a[0] for a in args[:6]), *args[6:])
    assert_same(w_hat.cpu(), formula.w_hat())
    if case.beta is not None:
        assert reg.dtype == case.compute
        assert_within(reg, *formula.reg())


def assert_backward(found, case, op, device="cpu"):
    (dv,), (dscale,) = found
    args, grads = case.lists(device), case.grads()
    formula = Formula(h_of(args[0][0], op), *(a[0] for a in args[:6]), *args[6:])
    for got, (expected, slack) in zip((dv, dscale), formula.backward(*grads), strict=True):
        assert_within(got, expected, slack)
    assert (dv.dtype, dscale.dtype) == (case.dtype, case.compute)


# meaning


@ALL
def test_reference_is_the_formula(case):
    assert_forward(by("reference", "adaround")(*case.lists(), False), case, by("reference", "adaround"))
    assert_backward(by("reference", "adaround_backward")(*case.backward_args()), case, by("reference", "adaround"))


def test_documented_example():
    v, base = torch.tensor([[0.0, -3.0, 3.0]]), torch.tensor([[2, 2, 7]], dtype=torch.int16)
    scale, zero_point = torch.tensor([0.5]), torch.zeros(1, dtype=torch.int32)
    w_hat, reg = adaround(v, base, scale, zero_point, -8, 7, beta=2.0)
    torch.testing.assert_close(w_hat, torch.tensor([[1.25, 1.0, 3.5]]))
    torch.testing.assert_close(reg, torch.tensor(1.0))
    assert adaround(v, base, scale, zero_point, -8, 7, hard=True).tolist() == [[1.5, 1.0, 3.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_it_starts_at_the_weight(axis, dtype):
    torch.manual_seed(0)
    w = torch.randn(6, 5, 3, 3, dtype=dtype)
    channels = 1 if axis is None else w.size(axis)
    scale = torch.rand(channels, dtype=dtype) * 0.1 + 0.05
    zero_point = torch.randint(-3, 4, (channels,), dtype=torch.int32)
    base, v = adaround_start(w, scale, zero_point, -128, 127, axis)
    w_hat = adaround(v, base, scale, zero_point, -128, 127, axis)
    # h is off by 4 half units of 1, and as much again through v; the codes, up to 128, by three roundings.
    step = scale.max()
    assert ((w_hat - w).abs() <= step * unit_of(dtype) * (10 + 4 * 128)).all()
    # Beyond the range the base stops two codes below it and one above, where no v matters any more.
    base, v = adaround_start(torch.tensor([-9.0, -0.4, 0.0, 9.0]), torch.ones(1), zero_point[:1] * 0, -2, 1)
    assert base.tolist() == [-4, -1, 0, 2]
    for up in (-9.0, 9.0):
        ends = adaround(torch.full((4,), up), base, torch.ones(1), zero_point[:1] * 0, -2, 1)
        assert ends[[0, 3]].tolist() == [-2, 1]
    with pytest.raises(ValueError, match=r"^adaround_start: scale must be positive and finite, got 0.0 in channel 1$"):
        adaround_start(w, torch.tensor([1, 0, 1, 1, 1.0, 1], dtype=dtype), torch.zeros(6).int(), -8, 7)
    with pytest.raises(TypeError, match=r"^adaround_start: w must be a float32, .* got torch.int64$"):
        adaround_start(torch.arange(3), scale, zero_point, -8, 7)


def test_a_hard_rounding_is_what_a_decided_soft_one_was(fast):
    name, device = fast
    for label in ("conv", "nan_inf", "edges", "fp16", "transposed"):
        v, *rest = CASE[label].args(device)
        decided = torch.where(v >= 0, 9, torch.where(v < 0, -9, v)).to(v.dtype)
        with backend.backend(name):
            assert_same(adaround(v, *rest, hard=True), adaround(decided, *rest))
            assert not adaround(v.requires_grad_(), *rest, hard=True).requires_grad


# parity


@ALL
def test_forward_agrees_with_the_reference(case, fast):
    name, device = fast
    args = case.lists(device)
    if refused(fast, "adaround", case.dtype, lambda: torch.ops.zsq.adaround(*args, False)):
        return
    with backend.backend(name), unchanged(args):
        found = torch.ops.zsq.adaround(*args, False)
        assert_forward(found, case, torch.ops.zsq.adaround, device)
        again = torch.ops.zsq.adaround(*args, False)
        (without,), nothing = torch.ops.zsq.adaround(*args[:7], None, False)
    assert found[0][0].stride() == by("reference", "adaround")(*case.lists(), False)[0][0].stride()
    assert_same(again, found)
    assert_same(without, found[0][0])
    assert nothing.numel() == 0


@ALL
def test_backward_agrees_with_the_reference(case, fast):
    name, device = fast
    skip_refused(fast, "adaround", case.dtype)
    args = case.backward_args(device)
    with backend.backend(name), unchanged(args):
        found = torch.ops.zsq.adaround_backward(*args)
        assert_backward(found, case, torch.ops.zsq.adaround, device)
        again = torch.ops.zsq.adaround_backward(*args)
        (alone,), nothing = torch.ops.zsq.adaround_backward(*args[:-1], False)
    assert found[0][0].stride() == by("reference", "adaround_backward")(*case.backward_args())[0][0].stride()
    assert_same(again, found)
    assert_same(alone, found[0][0])
    assert nothing == []


@ALL
def test_fast_backends_agree_on_every_bit(case, fast):
    pytest.importorskip("zsq_ext._C")
    name, device = fast
    skip_refused(fast, "adaround", case.dtype)
    with backend.backend(name):
        (w_hat,), _ = torch.ops.zsq.adaround(*case.lists(device), False)
        (dv,), _ = torch.ops.zsq.adaround_backward(*case.backward_args(device))
    assert_same(w_hat, by("cpu", "adaround")(*case.lists(), False)[0][0])
    assert_same(dv, by("cpu", "adaround_backward")(*case.backward_args())[0][0])


@ALL
def test_neither_path_nor_threads_change_a_bit(case):
    on_every_path(
        lambda: (
            by("cpu", "adaround")(*case.lists(), False),
            by("cpu", "adaround")(*case.lists()[:7], None, True),
            by("cpu", "adaround_backward")(*case.backward_args()),
        )
    )


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0, 7.3, 20.0, 300.0])
def test_h_and_its_power_over_the_whole_range(beta, fast):
    name, device = fast
    v = torch.cat([torch.linspace(-3, 3, 20001), torch.linspace(-1e-3, 1e-3, 2001), torch.tensor([2.39789, -2.39789])])
    one, zero = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    v, base = v.to(device), torch.zeros(len(v), dtype=torch.int16, device=device)
    beta = torch.tensor(beta, device=device)
    args = [v], [base], [one], [zero], [-8], [7], None, beta
    with backend.backend(name):
        h = h_of(v, torch.ops.zsq.adaround)
        _, reg = torch.ops.zsq.adaround(*args, False)
        (dv,), _ = torch.ops.zsq.adaround_backward([torch.zeros_like(v)], *args, one[0], False)
    assert_h(h, v)
    formula = Formula(h, *(a[0] for a in args[:6]), None, beta)
    assert_within(reg, *formula.reg())
    assert_within(dv, *formula.backward(torch.zeros_like(v), one[0])[0])


def test_a_block_is_its_weights_one_by_one(fast):
    name, device = fast
    many = [list(part) for part in zip(*(case.args(device) for case in cases.BLOCK), strict=True)]
    beta, grad_reg = torch.tensor(3.0, device=device), torch.tensor(0.5, device=device)
    grads = [case.grads(device)[0] for case in cases.BLOCK]
    with backend.backend(name):
        op, op_backward = torch.ops.zsq.adaround, torch.ops.zsq.adaround_backward
        found, reg = op(*many[:6], 0, beta, False)
        dv, dscale = op_backward(grads, *many[:6], 0, beta, grad_reg, True)
        total, chain = 0.0, 0.0
        for k in range(len(cases.BLOCK)):
            one = [[part[k]] for part in many[:6]]
            (w_hat,), part = op(*one, 0, beta, False)
            (dv_,), (dscale_,) = op_backward([grads[k]], *one, 0, beta, grad_reg, True)
            for a, b in ((found[k], w_hat), (dv[k], dv_), (dscale[k], dscale_)):
                assert_same(a, b)
            total, chain = total + part.double().item(), chain + abs(part.double().item())
    assert_within(reg, torch.tensor(total, dtype=torch.float64), 2 * unit_of(torch.float32) * chain)


def test_more_weights_than_one_launch_takes(fast):
    name, device = fast
    case = cases.AdaRoundCase("small", shape=(3, 40))
    many = [list(part) for part in zip(*(case.args(device, seed) for seed in range(70)), strict=True)]
    grads = [case.grads(device, seed)[0] for seed in range(70)]
    beta, grad_reg = torch.tensor(3.0, device=device), torch.tensor(0.5, device=device)
    with backend.backend(name):
        found, reg = torch.ops.zsq.adaround(*many[:6], 0, beta, False)
        dv, dscale = torch.ops.zsq.adaround_backward(grads, *many[:6], 0, beta, grad_reg, True)
        for k in (0, 31, 32, 69):
            one = [[part[k]] for part in many[:6]]
            (w_hat,), _ = torch.ops.zsq.adaround(*one, 0, beta, False)
            (dv_,), (dscale_,) = torch.ops.zsq.adaround_backward([grads[k]], *one, 0, beta, grad_reg, True)
            for a, b in ((found[k], w_hat), (dv[k], dv_), (dscale[k], dscale_)):
                assert_same(a, b)
    _, expected = by("reference", "adaround")(
        *([t.cpu() if torch.is_tensor(t) else t for t in p] for p in many[:6]), 0, beta.cpu(), False
    )
    torch.testing.assert_close(reg.cpu(), expected, rtol=1e-5, atol=0)  # 8400 terms of float32, each off by a few units


# properties


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), length=st.integers(1, 300), power=st.integers(-20, 20), beta=st.floats(1, 30))
def test_properties(seed, length, power, beta):
    case = cases.AdaRoundCase("any", shape=(2, length), beta=beta)
    v, base, scale, zero_point, qmin, qmax, axis = case.args(seed=seed)
    grad, _ = case.grads(seed=seed)
    beta = torch.tensor(beta)
    rest = scale, zero_point, qmin, qmax, axis
    out, reg = adaround(v, base, *rest, beta=beta)
    down, up = (adaround(torch.full_like(v, end), base, *rest) for end in (-9.0, 9.0))
    assert ((down <= out) & (out <= up)).all(), "not between its neighbours"
    hard = adaround(v, base, *rest, hard=True)
    assert ((hard == down) | (hard == up)).all(), "not decided"
    assert 0 <= reg <= v.numel() * (1 + 2**-20)
    assert (adaround(v + 0.5, base, *rest) >= out).all(), "not monotonic"
    # an element does not know its place: neither SIMD's tail nor a piece's end changes it
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    assert_same(adaround(v[:, order], base[:, order], *rest), out[:, order])
    # powers of two scale without rounding
    unit = 2.0**power
    assert_same(adaround(v, base, scale * unit, *rest[1:]), out * unit)
    op = torch.ops.zsq.adaround_backward
    lists = [v], [base], [scale], [zero_point], [qmin], [qmax], axis
    (dv,), (dscale,) = op([grad], *lists, beta, torch.tensor(0.3), True)
    (more,), (dscale_more,) = op([grad * unit], *lists, beta, torch.tensor(0.3) * unit, True)
    assert_within(more, (dv * unit).double(), 1e-30)  # but for what is too small for a float of full length
    assert_same(dscale_more, dscale * unit)
