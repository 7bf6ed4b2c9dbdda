"""fake_quant: what it means, and that every backend gives the same bits.

Broken on purpose in LSQ's backward on the CPU, each seen red: dx not masked (per_tensor), x / scale not subtracted
inside (per_tensor), the clip sum's sign (per_tensor), NaN dropped from it (nan_inf), the last slab lost (threads), the
tail's lanes lost (axis_1).

Of groups and `out`, likewise: a group's length taken for a channel's (groups), x's memory order kept under groups
(groups_channels_last), `out` written as if it were dense, and its version not counted up (out_is_written, per_tensor).
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    assert_same,
    every,
    interpreted,
    on_every_path,
    path,
    refused,
    skip_refused,
    unchanged,
)

from zsq_ext.ops import backend, cpu, fake_quant, reference
from zsq_ext.ops.cases import fake_quant as cases
from zsq_ext.ops.layout import empty_for

ALL = every(cases.FAKE_QUANT)
CASE = {case.name: case for case in cases.FAKE_QUANT}

pytestmark = pytest.mark.usefixtures("poison")


def along(axis, shape, *grid):
    """The grid's numbers, shaped to broadcast: one, or one per channel or group along axis."""
    sizes = [1] * len(shape)
    if axis is not None:
        sizes[axis] = grid[0].numel()
    return [t.reshape(sizes) for t in grid]


# meaning


@ALL
def test_reference_is_the_formula(case):
    x, scale, zero_point, qmin, qmax, axis = case.args()
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    v, s, z = (t.to(scale.dtype).numpy() for t in (x.reshape(case.seen), *along(axis, case.seen, scale, zero_point)))
    with np.errstate(all="ignore"):
        ratio = np.divide(v, s, dtype=kind)
        code = np.add(np.rint(ratio), z, dtype=kind)
        code = np.where(code < qmin, kind(qmin), np.where(code > qmax, kind(qmax), code))
        expected = torch.from_numpy(np.asarray(np.multiply(np.subtract(code, z, dtype=kind), s, dtype=kind)))
        inside = np.asarray((ratio + z >= qmin) & (ratio + z <= qmax))
    assert_same(reference.fake_quant(*case.args()), expected.to(x.dtype).reshape(case.shape))
    grad = case.grad()
    expected = torch.where(torch.from_numpy(inside).reshape(case.shape), grad, torch.zeros_like(grad))
    assert_same(reference.fake_quant_backward(grad, *case.args()), expected)


def test_documented_example():
    x = torch.tensor([[-3.0, 0.26], [0.5, 9.0]])
    scale, zero_point = torch.tensor([0.5, 1.0]), torch.zeros(2, dtype=torch.int32)
    assert fake_quant(x, scale, zero_point, -8, 7, axis=0).tolist() == [[-3.0, 0.5], [0.0, 7.0]]


def lsq_sums(grad, x, scale, zero_point, qmin, qmax, axis):
    """LSQ's two sums as the formula has them, and how far off each may be: float32 terms, added in float64."""
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    if scale.dim() == 2:
        seen = scale.numel(), x.numel() // max(scale.numel(), 1)
        grad, x = grad.reshape(seen), x.reshape(seen)
    others = tuple(dim for dim in range(x.dim()) if scale.numel() == 1 or dim != axis)
    g, v, s, z = (t.to(scale.dtype).numpy() for t in (grad, x, *along(axis, x.shape, scale, zero_point)))
    with np.errstate(all="ignore"):
        z = np.rint(z)
        ratio = np.divide(v, s, dtype=kind)
        where = np.add(ratio, z, dtype=kind)
        below, above = where < qmin, where > qmax
        inside = np.subtract(np.add(np.rint(ratio), z) - z, ratio, dtype=kind)
        step = g * np.where(below, qmin - z, np.where(above, qmax - z, inside)).astype(kind)
        clip = np.where(np.isnan(where), np.nan, np.where(below | above, -g, 0)) * s.astype(np.float64)
        # No backend adds more than 64 float32 numbers before it goes on in float64; float64 has nothing to go on in.
        # Each addition, and the roundings at the end, are off by half an ulp of at most the sum of magnitudes.
        chain = 64 if kind is np.float32 else x.numel()
        for terms in (step.astype(np.float64), clip):
            bound = (chain + 4) * np.finfo(kind).eps / 2 * np.abs(terms).sum(others)
            yield tuple(torch.from_numpy(np.asarray(t)).reshape(scale.shape) for t in (terms.sum(others), bound))


def assert_sums(got, args):
    """args are (grad, x, *grid) on the CPU."""
    for name, sums, (expected, bound) in zip(("dscale", "dzero_point"), got, lsq_sums(*args), strict=True):
        assert sums.dtype == args[2].dtype
        assert sums.shape == args[2].shape
        sums = sums.cpu().double()
        assert torch.equal(sums.isnan(), expected.isnan()), name
        wrong = (sums - expected).abs() > bound  # NaN and infinities of one sign are not
        assert not wrong.any(), f"{name}: {sums[wrong]} instead of {expected[wrong]}, more than {bound[wrong]} off"


@ALL
@pytest.mark.parametrize("kind", ["args", "learned"])
def test_reference_of_lsq_is_the_formula(case, kind):
    args, grad = getattr(case, kind)(), case.grad()
    dx, *sums = reference.fake_quant_lsq_backward(grad, *args)
    assert_same(dx, reference.fake_quant_backward(grad, *args))
    assert_sums(sums, (grad, *args))


# parity


@ALL
def test_forward_has_the_reference_bits(case, fast):
    name, device = fast
    args = case.args(device)
    if refused(fast, "fake_quant", case.dtype, lambda: fake_quant(*args)):
        return
    with backend.backend(name), unchanged(args):
        got = fake_quant(*args)
    assert_same(got, reference.fake_quant(*case.args()))
    assert got.stride() == empty_for(*args[:2]).stride()


@ALL
def test_backward_has_the_reference_bits(case, fast):
    name, device = fast
    skip_refused(fast, "fake_quant_backward", case.dtype)
    args, grad = case.args(device), case.grad(device)
    with backend.backend(name):
        got = torch.ops.zsq.fake_quant_backward(grad, *args)
    assert_same(got, reference.fake_quant_backward(case.grad(), *case.args()))
    assert got.stride() == empty_for(*args[:2]).stride()


@pytest.mark.parametrize(
    "name", ["per_tensor", "axis_1", "ties_channel", "channels_last_odd", "zp_outside", "fp16", "fp64"]
)
def test_a_learned_zero_point_is_rounded_half_to_even(name, fast):
    backend_name, device = fast
    skip_refused(fast, "fake_quant", CASE[name].dtype)
    x, scale, zero_point, *range_ = CASE[name].learned(device)
    with backend.backend(backend_name):
        got = fake_quant(x, scale, zero_point, *range_, grad="lsq_plus")
        dx = torch.ops.zsq.fake_quant_backward(CASE[name].grad(device), x, scale, zero_point, *range_)
    x, scale, zero_point, *range_ = CASE[name].learned()
    rounded = x, scale, torch.round(zero_point).int(), *range_
    assert_same(got, reference.fake_quant(*rounded))
    assert_same(dx, reference.fake_quant_backward(CASE[name].grad(), *rounded))


@ALL
@pytest.mark.parametrize("kind", ["args", "learned"])
def test_lsq_has_the_reference_bits_and_its_sums(case, kind, fast):
    name, device = fast
    skip_refused(fast, "fake_quant_lsq_backward", case.dtype)
    args = case.grad(device), *getattr(case, kind)(device)
    with backend.backend(name), unchanged(args):
        dx, *sums = torch.ops.zsq.fake_quant_lsq_backward(*args)
        again = (dx, *sums) if interpreted(fast) else torch.ops.zsq.fake_quant_lsq_backward(*args)
    on_cpu = case.grad(), *getattr(case, kind)()
    assert_same(dx, reference.fake_quant_backward(*on_cpu))
    assert dx.stride() == empty_for(*args[1:3]).stride()
    assert_sums(sums, on_cpu)
    assert_same(again, (dx, *sums))


@ALL
def test_scalar_path_has_the_reference_bits(case, scalar):
    assert_same(cpu.fake_quant(*case.args()), reference.fake_quant(*case.args()))
    grad = case.grad()
    assert_same(cpu.fake_quant_backward(grad, *case.args()), reference.fake_quant_backward(grad, *case.args()))


# The last two have more channels than a slab of 64 Ki elements meets, in rows and in channels-last memory.
SLABS = (
    *cases.FAKE_QUANT,
    cases.FakeQuantCase("many_channels", shape=(2, 40000, 3), axis=1, zero_point="inside"),
    cases.FakeQuantCase("wide_rows", shape=(3, 70003), axis=1, zero_point="inside"),
)


@every(SLABS)
def test_sums_depend_on_neither_path_nor_threads(case):
    args = case.grad(), *case.learned()
    assert_sums(on_every_path(lambda: cpu.fake_quant_lsq_backward(*args))[1:], args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", [2.0**-24, 3.1e-6, 0.37, 1.0, 900.0])
@pytest.mark.parametrize("simd", [True, False])
def test_every_16_bit_float_is_read_and_written(dtype, step, simd):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    args = x, torch.tensor([step]), torch.zeros(1, dtype=torch.int32), -(2**24), 2**24
    with path(simd):
        assert_same(cpu.fake_quant(*args), reference.fake_quant(*args))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["threads", "channels_last_odd", "tail"])
def test_any_number_of_threads(name, threads):
    args = CASE[name].args()
    with path(threads=threads):
        assert_same(fake_quant(*args), reference.fake_quant(*args))


def test_scale_and_zero_point_broadcast_and_need_not_be_contiguous():
    x = torch.randn(2, 4, 3)
    scale, zero_point = torch.rand(8)[::2] + 0.1, torch.tensor([3], dtype=torch.int32)
    expected = reference.fake_quant(x, scale, zero_point.expand(4), -8, 7, 1)
    assert_same(fake_quant(x, scale, zero_point, -8, 7, axis=-2), expected)
    assert_same(
        fake_quant(x, scale[:1], zero_point, -8, 7, axis=1), reference.fake_quant(x, scale[:1], zero_point, -8, 7)
    )


def test_groups_broadcast_too():
    x, scale = torch.randn(2, 4, 3), torch.rand(2, 6) + 0.1
    zero_point = torch.tensor([3], dtype=torch.int32)
    expected = reference.fake_quant(x.view(12, 2), scale.view(12), zero_point.expand(12), -8, 7, 0).view(x.shape)
    assert_same(fake_quant(x, scale, zero_point, -8, 7, axis=0), expected)
    assert_same(fake_quant(x, scale.t().contiguous().t(), zero_point, -8, 7, axis=-3), expected)


# memory that is given


@ALL
def test_out_is_written_and_returned(case, fast):
    name, device = fast
    skip_refused(fast, "fake_quant_out", case.dtype)
    args, expected = case.args(device), reference.fake_quant(*case.args())
    outs = {
        "contiguous": torch.empty(case.shape, dtype=case.dtype, device=device),
        "as x": torch.empty_like(args[0]),
        "strided": torch.empty([2 * n for n in case.shape], dtype=case.dtype, device=device)[
            tuple(slice(None, None, 2) for _ in case.shape)
        ],
    }
    with backend.backend(name):
        for label, out in outs.items():
            version = out._version
            assert fake_quant(*args, out=out) is out, label
            assert_same(out, expected)
            assert out._version > version, "autograd would not notice"
        if case.layout != "expanded":
            x = args[0].clone()
            assert fake_quant(x, *args[1:], out=x) is x
            assert_same(x, expected)


def test_out_under_no_grad_is_for_learned_grids_too():
    x, scale, zero_point, *range_ = CASE["axis_1"].learned()
    for t in (x, scale, zero_point):
        t.requires_grad_()
    with torch.no_grad():
        out = fake_quant(x, scale, zero_point, *range_, grad="lsq_plus", out=torch.empty_like(x))
    assert_same(out, reference.fake_quant(*CASE["axis_1"].learned()))
    assert not out.requires_grad


# properties


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    scale=st.floats(2.0**-10, 2.0**10, width=32),
    bits_=st.integers(2, 8),
    signed=st.booleans(),
    zero_point=st.integers(-20, 20),
)
def test_properties(values, scale, bits_, signed, zero_point):
    qmin = -(2 ** (bits_ - 1)) if signed else 0
    qmax = qmin + 2**bits_ - 1
    x = torch.tensor(values)
    s, z = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
    out = fake_quant(x, s, z, qmin, qmax)
    # Steps away from zero. Exact: |code - zero_point| < 2^9, and a product of it with the scale, divided by the
    # scale, is off by less than half.
    steps = (out / s).round()
    assert torch.equal(steps * s, out), "not on the grid"
    assert torch.equal((steps + z).clamp(qmin, qmax), steps + z), "outside the range"
    assert torch.equal(fake_quant(out, s, z, qmin, qmax), out), "not idempotent"
    inside = (x / s + z >= qmin) & (x / s + z <= qmax)
    # Half a step, and what rounding to float32 adds: the ratio's, of at most 2^9 steps, and the product's.
    assert ((out - x).abs() <= s * (0.5 + 2**9 * 2.0**-23))[inside].all()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    length=st.integers(1, 600),
    channels=st.integers(1, 12),
    last=st.booleans(),
    power=st.integers(-20, 20),
)
def test_properties_of_lsq(seed, length, channels, last, power):
    case = cases.FakeQuantCase("any", shape=(length, channels) if last else (channels, length), axis=int(last))
    x, scale, zero_point, *range_ = case.learned(seed=seed)
    grad = case.grad(seed=seed)
    op = torch.ops.zsq.fake_quant_lsq_backward
    dx, dscale, dzero_point = op(grad, x, scale, zero_point, *range_)
    unit = 2.0**power  # powers of two scale without rounding
    expected = dx, dscale, dzero_point * unit
    for got, want in zip(op(grad, x * unit, scale * unit, zero_point, *range_), expected, strict=True):
        assert_same(got, want)
    for got, want in zip(op(grad * unit, x, scale, zero_point, *range_), (dx, dscale, dzero_point), strict=True):
        assert_same(got, want * unit)
    # a channel does not know its neighbours; the layout changes the order of its sum
    one = *(t.select(case.axis, 0) for t in (grad, x)), scale[:1], zero_point[:1], *range_[:2], None
    first, *sums = op(*one)
    assert_same(first, dx.select(case.axis, 0))
    assert_sums(sums, one)
