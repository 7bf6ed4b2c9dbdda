"""fake_quant: its gradients and errors, and torch's machinery. What it computes is in test_ops_fake_quant.py."""

import os

import pytest
import torch
from parity import (
    assert_exports,
    assert_raises,
    assert_same,
    compiled,
    every,
    other_stream,
    ours,
    replayed,
)

from zsq_ext.ops import backend, fake_quant, reference
from zsq_ext.ops.cases import fake_quant as cases

CASE = {case.name: case for case in cases.FAKE_QUANT}

pytestmark = pytest.mark.usefixtures("poison")


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
    with pytest.raises(NotImplementedError, match="a gradient must be taken once"):
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
def test_a_second_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    args = CASE["axis_1"].args("cuda:1")
    with backend.backend(name):
        assert_same(fake_quant(*args), reference.fake_quant(*args))


def test_env_is_clean():
    assert os.environ.get("ZSQ_BACKEND", "auto") == "auto", "these tests choose backends themselves"


def test_compiles_with_sizes_and_numbers_that_vary():
    scale, zero_point = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32)

    def run(x, factor):
        step = scale.clone().requires_grad_()
        fake_quant(x, step, zero_point, -8, 7, grad="lsq", grad_scale=factor).sum().backward()
        return step.grad

    forward = torch.compile(
        lambda x, factor: fake_quant(x, scale, zero_point, -8, 7, grad="lsq", grad_scale=factor),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for size, factor in ((3, 0.5), (5, 0.25)):
        x = torch.randn(size, 4)
        assert torch.equal(forward(x, factor), fake_quant(x, scale, zero_point, -8, 7))
        assert torch.equal(run(x, factor), run(x, 1.0) * factor)
