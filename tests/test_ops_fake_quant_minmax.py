"""fake_quant_minmax: all weights of a network in one call, each channel on the grid between its own extremes.

Broken on purpose, each seen red:

    no floor under the scale relative to the bound   one_value_each
    no floor under the width                         constant
    the zero-point rounded half up                   expanded_axis_1
    the zero-point of NaN converted as it is         nan_inf
    the scale by the reciprocal of the levels        plain
    grids written from 0 for every tensor            plain
    the last channel of a task lost                  plain
    the first tensor's bits for all                  plain
    the channel not looked up, Triton                plain
    any dense memory taken for slices                transposed
    out not copied back where it is not sliced       transposed
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_raises, assert_same, compiled, every, on_every_path, ours, refused, replayed, unchanged

from zsq_ext.ops import backend, cpu, fake_quant, fake_quant_minmax, reference
from zsq_ext.ops.cases import fake_quant_minmax as cases
from zsq_ext.quant import ranges

ALL = every(cases.FAKE_QUANT_MINMAX)
CASE = {case.name: case for case in cases.FAKE_QUANT_MINMAX}

pytestmark = pytest.mark.usefixtures("poison")


def composite(tensors, bits, axes, symmetric):
    """What a weight quantizer does to one tensor after the other."""
    for t, b, axis in zip(tensors, bits, axes, strict=True):
        lo, hi = ranges.min_max(t, axis)
        if symmetric:
            m = torch.maximum(lo.abs(), hi.abs())
            lo, hi = -m, m
        scale, zero_point, *range_ = ranges.affine_params(lo, hi, b, signed=True, include_zero=False)
        zero_point = zero_point * (not symmetric)
        yield fake_quant(t, scale, zero_point, *range_, axis=axis), scale, zero_point


# meaning


@ALL
def test_it_is_the_weight_quantizer(case):
    tensors, bits, axes, symmetric = case.args()
    outs, scales, zero_points = fake_quant_minmax(tensors, bits, axes, symmetric=symmetric, return_grid=True)
    for t, axis, *found, expected in zip(
        tensors, axes, outs, scales, zero_points, composite(*case.args()), strict=True
    ):
        # What a channel with NaN or infinity gets as a zero-point is up to the machine in the composite.
        odd = ~t.movedim(axis, 0).flatten(1).isfinite().all(1) if t.dim() > 1 else ~t.isfinite()
        wide = expected[1].isinf()  # from one end of the dtype to the other
        assert found[0].movedim(axis, 0)[odd | wide].isnan().all()
        assert found[0].shape == t.shape
        keep = ~(odd | wide)
        assert_same(found[0].movedim(axis, 0)[keep], expected[0].movedim(axis, 0)[keep])
        assert_same(found[1][keep], expected[1][keep])
        assert torch.equal(found[2][keep], expected[2][keep])


def test_in_numbers():
    weights = [torch.tensor([[-1.0, 0.1, 2.0], [0.0, 0.3, 0.75]]), torch.tensor([[1.0, 1.25]])]
    outs, scales, zero_points = fake_quant_minmax(weights, 2, return_grid=True)
    assert [t.tolist() for t in outs] == [[[-1, 0, 2], [0, 0.25, 0.75]], [[1.0, 1.25]]]
    assert scales[0].tolist() == [1, 0.25]
    assert scales[1].tolist() == pytest.approx([0.25 / 3])
    assert [t.tolist() for t in zero_points] == [[-1, -2], [-14]]
    symmetric, scales, zero_points = fake_quant_minmax(weights[:1], 2, symmetric=True, return_grid=True)
    assert scales[0].tolist() == pytest.approx([4 / 3, 0.5])
    assert zero_points[0].tolist() == [0, 0]
    torch.testing.assert_close(symmetric[0], torch.tensor([[-4 / 3, 0, 4 / 3], [0, 0.5, 0.5]]))


def test_a_tuple_a_list_and_nothing():
    weights = torch.randn(3, 4), torch.randn(2, 5)
    outs = fake_quant_minmax(weights, (3, 4))
    assert isinstance(outs, list)
    assert_same(fake_quant_minmax(list(weights), [3, 4], [0, 0]), outs)
    assert fake_quant_minmax([], 4) == []
    assert fake_quant_minmax((), 4, return_grid=True) == ([], [], [])


# parity


@ALL
def test_every_backend_has_the_reference_bits(case, fast):
    name, device = fast
    args = case.args(device)
    if refused(fast, "fake_quant_minmax", case.dtype, lambda: torch.ops.zsq.fake_quant_minmax(*args)):
        return
    with backend.backend(name), unchanged(args):
        outs, *grid = torch.ops.zsq.fake_quant_minmax(*args)
        into = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in args[0]]
        grid_of_out = torch.ops.zsq.fake_quant_minmax_out(*args, into)
    expected, *expected_grid = reference.fake_quant_minmax(*case.args())
    assert_same((*outs, *grid), (*expected, *expected_grid))
    assert_same((*into, *grid_of_out), (*expected, *expected_grid))


@ALL
def test_the_scalar_path_and_any_number_of_threads(case):
    found = on_every_path(lambda: cpu.fake_quant_minmax(*case.args()))
    assert_same(found, reference.fake_quant_minmax(*case.args()))


@pytest.mark.parametrize("name", ["plain", "transposed", "channels_last", "channels_last_axis_1", "strided", "fp16"])
def test_out(name, fast):
    backend_name, device = fast
    tensors, bits, axes, symmetric = CASE[name].args(device)
    expected = reference.fake_quant_minmax(*CASE[name].args())[0]
    strided = [torch.empty([2 * n for n in t.shape], dtype=t.dtype, device=device) for t in tensors]
    strided = [t[tuple(slice(None, None, 2) for _ in t.shape)] for t in strided]
    own = [t.clone() for t in tensors]
    with backend.backend(backend_name):
        for ins, outs in ((tensors, [torch.empty_like(t) for t in tensors]), (tensors, strided), (own, own)):
            versions = [out._version for out in outs]
            returned = fake_quant_minmax(ins, bits, axes, symmetric=symmetric, out=outs)
            assert all(a is b for a, b in zip(returned, outs, strict=True))
            assert_same(outs, expected)
            assert all(out._version > v for out, v in zip(outs, versions, strict=True)), "autograd would not notice"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    channels=st.integers(1, 6),
    length=st.integers(1, 70),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    power=st.integers(-10, 10),
)
def test_properties(seed, channels, length, bits, symmetric, power):
    x = torch.randn(channels, length, generator=torch.Generator().manual_seed(seed))
    (out,), (scale,), (zero_point,) = fake_quant_minmax([x], bits, symmetric=symmetric, return_grid=True)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert_same(out, fake_quant(x, scale, zero_point, qmin, qmax, axis=0))
    # Half a step, and the other half once, where the zero-point's own rounding, or a code that symmetry lacks, shifts
    # an end; float32 adds a few units of the last place of up to 2^8 steps.
    assert ((out - x).abs() <= scale[:, None] * (1 + 2**8 * 2.0**-22)).all()
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    assert_same(fake_quant_minmax([x[:, order]], bits, symmetric=symmetric)[0], out[:, order])
    if length > 1:  # wider than 1e-8, whatever the power
        assert_same(fake_quant_minmax([x * 2.0**power], bits, symmetric=symmetric)[0], out * 2.0**power)
    both = fake_quant_minmax([x[:1], x], bits, symmetric=symmetric)
    assert_same(both[0], out[:1])
    assert_same(both[1], out)


# gradients


def test_ste_is_the_identity_and_saves_nothing():
    tensors, bits, axes, _ = CASE["plain"].args()
    leaves = [t.requires_grad_() for t in tensors]
    outs, scales, zero_points = fake_quant_minmax(leaves, bits, axes, return_grid=True)
    assert not any(t.requires_grad for t in (*scales, *zero_points))
    assert outs[0].grad_fn.saved_tensors == ()
    grads = [torch.randn_like(t) for t in outs]
    for got, grad in zip(torch.autograd.grad(outs, leaves, grads), grads, strict=True):
        assert got is grad
    # one of three used: the others get none
    (got,) = torch.autograd.grad(fake_quant_minmax(leaves, bits, axes)[1].sum(), leaves[1])
    assert (got == 1).all()
    assert torch.autograd.grad(outs[2].sum(), leaves[:1], allow_unused=True) == (None,)


@pytest.mark.parametrize("name", ["plain", "transposed", "symmetric", "nan_inf", "channels_last", "fp16"])
def test_ste_clip_is_that_of_fake_quant(name, fast):
    backend_name, device = fast
    tensors, bits, axes, symmetric = CASE[name].args(device)
    for t in tensors[:2]:
        t.requires_grad_()
    grads = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t) for t in tensors]
    with backend.backend(backend_name):
        outs, scales, zero_points = fake_quant_minmax(
            tensors, bits, axes, symmetric=symmetric, grad="ste_clip", return_grid=True
        )
        found = torch.autograd.grad(outs, tensors[:2], grads)
    for got, grad, t, s, z, b, axis in zip(found, grads, tensors, scales, zero_points, bits, axes, strict=False):
        range_ = -(2 ** (b - 1)), 2 ** (b - 1) - 1, axis
        assert_same(got, reference.fake_quant_backward(grad, t, s, z, *range_))
    assert not fake_quant_minmax([tensors[2]], 4)[0].requires_grad


def test_symmetric_clips_and_ste_clip_says_so():
    x = torch.tensor([[-1.0, 0.2, 1.0]], requires_grad=True)
    (out,) = fake_quant_minmax([x], 2, symmetric=True, grad="ste_clip")
    out.sum().backward()
    assert x.grad.tolist() == [[1, 1, 0]]  # codes -1.5, 0.3 and 1.5, of -2 to 1


def test_no_gradient_where_none_is_wanted():
    tensors, bits, axes, _ = CASE["plain"].args()
    leaves = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        assert not any(t.requires_grad for t in fake_quant_minmax(leaves, bits, axes))
        fake_quant_minmax(leaves, bits, axes, out=leaves)


def test_autocast_keeps_the_dtype():
    tensors, bits, axes, _ = CASE["plain"].args()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(t.dtype == torch.float32 for t in fake_quant_minmax(tensors, bits, axes))


# errors


@every(cases.FAKE_QUANT_MINMAX_ERRORS)
def test_errors_name_the_argument(case):
    assert_raises(case, fake_quant_minmax, {"tensors": [torch.zeros(2, 3), torch.zeros(4, 5)], "bits": 4})


# torch's machinery


@pytest.mark.parametrize("name", ["plain", "transposed", "channels_last_axis_1", "expanded", "strided", "bf16", "fp64"])
def test_opcheck(name):
    tensors, *how = CASE[name].args()
    torch.library.opcheck(torch.ops.zsq.fake_quant_minmax, (tensors, *how))
    outs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    torch.library.opcheck(torch.ops.zsq.fake_quant_minmax_out, (tensors, *how, outs))


@pytest.mark.parametrize("grad", ["ste", "ste_clip"])
def test_compile_keeps_one_op(grad):
    tensors, bits, axes, symmetric = CASE["transposed"].args()
    leaves = [t.requires_grad_() for t in tensors]

    def loss(*tensors):
        outs = fake_quant_minmax(tensors, bits, axes, symmetric=symmetric, grad=grad)
        return sum((out * (i + 1)).square().sum() for i, out in enumerate(outs))

    out, graphs = compiled(loss, *leaves)
    assert [op for op in ours(graphs[0]) if "fake_quant_minmax" in op] == ["zsq.fake_quant_minmax.default"]
    got = torch.autograd.grad(out, leaves)
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_compile_writes_to_out(fast):
    name, device = fast
    tensors, *how = CASE["plain"].args(device)
    outs = [torch.full_like(t, 7) for t in tensors]

    def into(tensors, outs):
        return [out + 1 for out in fake_quant_minmax(tensors, how[0], how[1], out=outs)]

    torch._dynamo.reset()
    with backend.backend(name):
        more = torch.compile(into, backend="aot_eager", fullgraph=True)(tensors, outs)
    expected = reference.fake_quant_minmax(*CASE["plain"].args())[0]
    assert_same(outs, expected)
    assert_same(more, [t + 1 for t in expected])


def test_export_keeps_the_op():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(2, 4))

        def forward(self, x):
            a, b = fake_quant_minmax([self.a, self.b], 4)
            return x @ a.t() @ b.t()

    x = torch.randn(2, 3)
    with torch.no_grad():
        program = torch.export.export(Model(), (x,))
        assert "zsq.fake_quant_minmax" in str(program.graph)
    model = Model().requires_grad_(False)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), rtol=0, atol=0)


# GPU only


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_contents():
    tensors, *how = CASE["many"].args("cuda")
    with backend.backend("cuda"):
        found = replayed(lambda: torch.ops.zsq.fake_quant_minmax(tensors, *how), lambda: [t.normal_() for t in tensors])
    assert_same(found, reference.fake_quant_minmax(tensors, *how))
