"""fake_quant: what it means, that every backend gives the same bits, and how it behaves under torch's machinery.

Broken on purpose in LSQ's backward on the CPU, each seen red: dx not masked (per_tensor), x / scale not subtracted
inside (per_tensor), the clip sum's sign (per_tensor), NaN dropped from it (nan_inf), the last slab lost (threads), the
tail's lanes lost (axis_1).

Of groups and `out`, likewise: a group's length taken for a channel's (groups), x's memory order kept under groups
(groups_channels_last), `out` written as if it were dense, and its version not counted up (out_is_written, per_tensor).
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    assert_exports,
    assert_raises,
    assert_same,
    compiled,
    every,
    interpreted,
    on_every_path,
    other_stream,
    ours,
    path,
    refused,
    replayed,
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


# gradients


@pytest.mark.parametrize("name", ["per_tensor", "edges", "nan_inf", "channels_last_axis_1", "expanded", "fp16_channel"])
def test_ste_clip_masks_before_rounding(name, fast):
    backend_name, device = fast
    args = CASE[name].args(device)
    x = args[0].requires_grad_()
    grad = CASE[name].grad(device)
    with backend.backend(backend_name):
        (got,) = torch.autograd.grad(fake_quant(*args), x, grad)
    assert_same(got, reference.fake_quant_backward(CASE[name].grad(), *CASE[name].args()))


def test_edges_are_inside():
    scale, zero_point = torch.tensor([0.5]), torch.tensor([1], dtype=torch.int32)
    # codes before rounding: -8, 7, then just outside either, though they round to -8 and 7
    x = torch.tensor([-4.5, 3.0, -4.5001, 3.0001], requires_grad=True)
    fake_quant(x, scale, zero_point, -8, 7).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_ste_is_the_identity_and_saves_nothing():
    x, *grid = CASE["nan_inf"].args()
    x.requires_grad_()
    out = fake_quant(x, *grid, grad="ste")
    assert not hasattr(out.grad_fn, "saved_tensors") or out.grad_fn.saved_tensors == ()
    grad = CASE["nan_inf"].grad()
    (got,) = torch.autograd.grad(out, x, grad)
    assert got is grad


def straight_through(x, scale, zero_point, qmin, qmax):
    """LSQ+ as autograd has it, where rounding has the gradient of the identity and clamping comes first."""
    z = zero_point + (zero_point.round() - zero_point).detach()
    inner = (x / scale + z).clamp(qmin, qmax)
    code = (torch.round(x / scale) + z).clamp(qmin, qmax)
    return ((inner + (code - inner).detach()) - z) * scale


@pytest.mark.parametrize("grad_scale", [1.0, 0.01])
def test_lsq_is_straight_through_autograd(grad_scale):
    case = cases.FakeQuantCase("fp64", dtype=torch.float64, zero_point="inside")
    x, scale, zero_point, qmin, qmax, _ = case.learned()
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)]
    upstream = case.grad()
    expected = torch.autograd.grad(straight_through(*inputs, qmin, qmax), inputs, upstream)
    out = fake_quant(*inputs, qmin, qmax, grad="lsq_plus", grad_scale=grad_scale)
    dx, *sums = torch.autograd.grad(out, inputs, upstream)
    assert_same(dx, torch.ops.zsq.fake_quant_backward(upstream, *(t.detach() for t in inputs), qmin, qmax))
    for got, want in zip(sums, expected[1:], strict=True):
        torch.testing.assert_close(got, grad_scale * want, rtol=1e-12, atol=1e-12)  # 1152 terms in fp64


def test_lsq_in_numbers():
    scale, zero_point = torch.tensor([0.5], requires_grad=True), torch.tensor([1], dtype=torch.int32)
    # unrounded codes -8 and 7 (the edges), 1.6, then -9 and 8.5
    x = torch.tensor([-4.5, 3.0, 0.3, -5.0, 3.75], requires_grad=True)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    (fake_quant(x, scale, zero_point, -8, 7, grad="lsq") * weights).sum().backward()
    assert x.grad.tolist() == [1, 10, 100, 0, 0]
    # 0 at the edges, 1 - 0.6 between, and qmin - zero_point = -9, qmax - zero_point = 6 beyond
    torch.testing.assert_close(scale.grad, torch.tensor([100 * 0.4 - 9 * 1000 + 6 * 10000]))
    learned = torch.tensor([1.5], requires_grad=True)  # rounds to 2: now unrounded codes are one higher
    (fake_quant(x, scale.detach(), learned, -8, 7, grad="lsq_plus") * weights).sum().backward()
    assert learned.grad.tolist() == [-0.5 * (10 + 10000)]


def test_lsq_beyond_the_range_is_the_true_gradient():
    x = torch.tensor([[-9.0, 9.0], [5.0, -20.0]], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor([1, -2], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *a: fake_quant(*a, zero_point, -4, 3, axis=0, grad="lsq"), (x, scale))


@pytest.mark.parametrize("axis", [None, 1])
def test_nan_keeps_to_its_channel(axis, fast):
    name, device = fast
    x = torch.zeros(2, 3, 4, device=device)
    x[1, 1, 2] = torch.nan
    channels = 1 if axis is None else 3
    grid = torch.ones(channels, device=device), torch.zeros(channels, device=device), -8, 7, axis
    with backend.backend(name):
        dx, *sums = torch.ops.zsq.fake_quant_lsq_backward(torch.ones_like(x), x, *grid)
    assert dx.sum() == 23
    for sum_ in sums:
        assert sum_.isnan().tolist() == ([True] if axis is None else [False, True, False])


def test_lsq_sums_over_what_was_broadcast():
    x, scale = torch.randn(2, 4, 3), torch.tensor([0.3], requires_grad=True)
    zero_point = torch.tensor([0.0, 1.0, 2.0, -3.4], requires_grad=True)
    fake_quant(x, scale, zero_point, -8, 7, axis=1, grad="lsq_plus").sum().backward()
    _, dscale, dzero_point = reference.fake_quant_lsq_backward(
        torch.ones_like(x), x, scale.detach().expand(4), zero_point.detach(), -8, 7, 1
    )
    torch.testing.assert_close(scale.grad, dscale.sum(0, keepdim=True))
    torch.testing.assert_close(zero_point.grad, dzero_point)


def test_lsq_gives_what_is_wanted_and_is_differentiable_once():
    x, scale, zero_point, *range_ = CASE["axis_1"].args()
    scale.requires_grad_()
    out = fake_quant(x, scale, zero_point, *range_, grad="lsq")
    (dscale,) = torch.autograd.grad(out, scale, CASE["axis_1"].grad().requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dscale.sum().backward()
    assert not fake_quant(x, scale, zero_point, *range_, grad="ste").requires_grad
    with torch.no_grad():
        assert not fake_quant(x, scale, zero_point, *range_, grad="lsq").requires_grad


def test_double_backward():
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    grad = torch.randn(9, requires_grad=True)
    out = fake_quant(x, torch.tensor([0.25]), torch.zeros(1, dtype=torch.int32), -4, 3)
    (first,) = torch.autograd.grad(out, x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), grad)
    mask = (x >= -1) & (x <= 0.75)
    assert torch.equal(second, torch.where(mask, 2 * grad, 0))


def test_no_gradient_where_none_is_wanted():
    args = CASE["per_tensor"].args()
    assert not fake_quant(*args).requires_grad
    args[0].requires_grad_()
    with torch.no_grad():
        assert not fake_quant(*args).requires_grad


def test_autocast_keeps_the_dtype():
    args = CASE["per_tensor"].args()
    with torch.autocast("cpu", torch.bfloat16):
        assert fake_quant(*args).dtype == torch.float32


# errors


@every(cases.FAKE_QUANT_ERRORS)
def test_errors_name_the_argument(case):
    good = {
        "x": torch.zeros(2, 4, 3),
        "scale": torch.ones(4),
        "zero_point": torch.zeros(4, dtype=torch.int32),
        "qmin": -8,
        "qmax": 7,
        "axis": 1,
    }
    fake_quant(**good, check=True)
    assert_raises(case, fake_quant, good)


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


# torch's machinery

# Not nan_inf: opcheck compares results by value, and NaN differs from itself.
OPCHECK = ["per_tensor", "axis_1", "empty", "strided", "expanded", "channels_last_axis_1", "fp16", "bf16", "fp64"]
OPCHECK += ["groups", "groups_channels_last"]
DENSE = torch.contiguous_format


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    args = CASE[name].args()
    torch.library.opcheck(torch.ops.zsq.fake_quant, args)
    torch.library.opcheck(torch.ops.zsq.fake_quant_out, (*args, torch.empty_like(args[0], memory_format=DENSE)))
    torch.library.opcheck(torch.ops.zsq.fake_quant_backward, (CASE[name].grad(), *args))
    torch.library.opcheck(torch.ops.zsq.fake_quant_lsq_backward, (CASE[name].grad(), *args))
    torch.library.opcheck(torch.ops.zsq.fake_quant_lsq_backward, (CASE[name].grad(), *CASE[name].learned()))


@pytest.mark.parametrize("name", ["per_tensor", "channels_last_axis_1", "bf16_channel", "ties_channel", "groups"])
@pytest.mark.parametrize("grad", ["ste_clip", "ste"])
def test_compile_decomposes_under_auto(name, grad):
    args = CASE[name].args()
    x = args[0].requires_grad_()
    upstream = CASE[name].grad()
    with backend.backend("auto"):
        out, graphs = compiled(lambda *a: fake_quant(*a, grad=grad), *args)
    assert any("round" in op for op in graphs[0])
    assert not ours(graphs[0])
    assert_same(out, reference.fake_quant(*CASE[name].args()))
    (got,) = torch.autograd.grad(out, x, upstream)
    (expected,) = torch.autograd.grad(fake_quant(*args, grad=grad), x, upstream)
    assert_same(got, expected)


@pytest.mark.parametrize("grad", ["lsq", "lsq_plus"])
def test_compile_keeps_the_sums_of_lsq_opaque(grad):
    case = CASE["channels_last_axis_1"]
    x, scale, zero_point, *range_ = case.learned() if grad == "lsq_plus" else case.args()
    inputs = [t.requires_grad_() for t in (x, scale, zero_point) if t.is_floating_point()]

    def loss(*args):
        return fake_quant(*args, grad=grad, grad_scale=0.25)

    with backend.backend("auto"):
        out, graphs = compiled(loss, x, scale, zero_point, *range_)
        got = torch.autograd.grad(out, inputs, case.grad())
        expected = torch.autograd.grad(loss(x, scale, zero_point, *range_), inputs, case.grad())
    forward, backward = graphs
    assert not ours(forward)
    assert ours(backward) == ["zsq.fake_quant_lsq_backward.default"]
    assert_same(got, expected)


@pytest.mark.parametrize("name", ["per_tensor", "groups_channels_last"])
def test_compile_writes_to_out(name, fast):
    backend_name, device = fast
    args, expected = CASE[name].args(device), reference.fake_quant(*CASE[name].args())
    for chosen in ("auto", backend_name):
        out = torch.full_like(args[0], 7)
        with backend.backend(chosen):
            (result, more), graphs = compiled(lambda *a: ((r := fake_quant(*a[:-1], out=a[-1])), r + 1), *args, out)
        assert any("zsq" in op or "auto_functionalized" in op for op in graphs[0]) == (chosen != "auto")
        assert_same(out, expected)
        assert_same(result, expected)
        assert_same(more, expected + 1)


def test_compile_keeps_a_forced_backend_opaque(fast):
    name, device = fast
    args = CASE["axis_1"].args(device)
    x = args[0].requires_grad_()
    with backend.backend(name):
        out, graphs = compiled(fake_quant, *args)
        (got,) = torch.autograd.grad(out, x, CASE["axis_1"].grad(device))
    assert any("zsq.fake_quant" in op for op in graphs[0])
    assert_same(out, reference.fake_quant(*CASE["axis_1"].args()))
    assert_same(got, reference.fake_quant_backward(CASE["axis_1"].grad(), *CASE["axis_1"].args()))


def test_compile_notices_a_changed_backend():
    args = CASE["axis_1"].args()
    torch._dynamo.reset()
    once = torch.compile(fake_quant, backend="aot_eager", fullgraph=True)
    once(*args)
    pytest.importorskip("zsq_ext._C")
    with backend.backend("cuda"), pytest.raises(NotImplementedError, match="cuda: "):
        once(*args)


def test_export_keeps_the_op():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor([0.1, 0.2, 0.3]))
            self.register_buffer("zero_point", torch.zeros(3, dtype=torch.int32))

        def forward(self, x):
            return fake_quant(x, self.scale, self.zero_point, -8, 7, axis=1)

    assert_exports(Model(), (torch.randn(2, 3, 4),), (torch.randn(5, 3, 4),), "fake_quant")


def test_export_keeps_the_op_with_a_learned_grid():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
            self.zero_point = torch.nn.Parameter(torch.tensor([0.5, -1.2, 3.0]))

        def forward(self, x):
            return fake_quant(x, self.scale, self.zero_point, -8, 7, axis=1, grad="lsq_plus")

    with torch.no_grad():
        assert_exports(Model(), (torch.randn(2, 3, 4),), (torch.randn(5, 3, 4),), "fake_quant")


def test_meta_tensors_have_a_shape_and_no_values():
    x, scale = torch.empty(2, 3, device="meta"), torch.empty(3, device="meta")
    out = fake_quant(x, scale, torch.empty(3, dtype=torch.int32, device="meta"), -8, 7, axis=1)
    assert (out.device.type, out.shape) == ("meta", x.shape)


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replays_with_new_contents(name):
    x, *grid = CASE["axis_1"].args("cuda")
    with backend.backend(name):
        out = replayed(lambda: fake_quant(x, *grid), lambda: x.copy_(torch.randn_like(x)))
    assert_same(out, reference.fake_quant(x, *grid))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("case", ["axis_1", "parts", "parts_channels_last"])
def test_cuda_graph_replays_lsq_with_new_contents(case, name):
    (x, *grid), grad = CASE[case].learned("cuda"), CASE[case].grad("cuda")
    op = torch.ops.zsq.fake_quant_lsq_backward
    with backend.backend(name):
        found = replayed(lambda: op(grad, x, *grid), lambda: x.copy_(torch.randn_like(x)))
        assert_same(found, op(grad, x, *grid))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_runs_on_the_current_stream(name):
    x, *grid = CASE["threads"].args("cuda")
    with other_stream(), backend.backend(name):
        x.mul_(2)
        out = fake_quant(x, *grid)
    assert_same(out, reference.fake_quant(x, *grid))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("channels", [1, 3])
def test_more_than_2_31_elements(name, channels):
    n = 2**31 + 3 * 1024 + 3 * 7  # not a whole block; a multiple of 3
    n -= n % 3
    x = torch.zeros(channels, n // channels, dtype=torch.float16, device="cuda")
    x[:, -5:] = torch.tensor([0.24, 0.26, 9.0, -9.0, torch.nan], dtype=torch.float16)
    scale = torch.tensor([0.5, 0.25, 1.0], device="cuda")[:channels]
    zero_point = torch.zeros(channels, dtype=torch.int32, device="cuda")
    with backend.backend(name):
        out = fake_quant(x, scale, zero_point, -8, 7, axis=0)
    assert_same(out[:, -5:], reference.fake_quant(x[:, -5:], scale, zero_point, -8, 7, 0))
    assert not out[:, :-5].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("last", [False, True])
def test_lsq_of_more_than_2_31_elements(name, last):
    n = 2**31 // 3 + 1031
    x = torch.zeros(3, n, dtype=torch.float16, device="cuda")
    grad = torch.zeros_like(x)
    x[:, -5:] = torch.tensor([0.24, 0.26, 9.0, -9.0, 0.5], dtype=torch.float16)
    grad[:, -5:] = 1
    if last:
        x, grad = x.t().contiguous(), grad.t().contiguous()
    grid = torch.tensor([0.5, 0.25, 1.0], device="cuda"), torch.zeros(3, dtype=torch.int32, device="cuda"), -8, 7
    with backend.backend(name):
        dx, *sums = torch.ops.zsq.fake_quant_lsq_backward(grad, x, *grid, 1 if last else 0)
    if last:
        x, grad, dx = x.t(), grad.t(), dx.t()
    tail = reference.fake_quant_lsq_backward(grad[:, -5:], x[:, -5:], *grid, 0)
    assert_same(dx[:, -5:], tail[0])
    assert not dx[:, :-5].any()
    for got, expected in zip(sums, tail[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=2.0**-20, atol=0)  # five terms


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_second_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    args = CASE["axis_1"].args("cuda:1")
    with backend.backend(name):
        assert_same(fake_quant(*args), reference.fake_quant(*args))


def test_env_is_clean():
    assert os.environ.get("ZSQ_BACKEND", "auto") == "auto", "these tests choose backends themselves"
