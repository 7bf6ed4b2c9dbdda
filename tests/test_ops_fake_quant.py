"""fake_quant: what it means, that every backend gives the same bits, and how it behaves under torch's machinery."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from zsq_ext.ops import backend, cases, cpu, fake_quant, reference

ALL = pytest.mark.parametrize("case", cases.FAKE_QUANT, ids=lambda case: case.name)
CASE = {case.name: case for case in cases.FAKE_QUANT}

pytestmark = pytest.mark.usefixtures("poison")


def bits(t):
    """The tensor as integers, so that 0 and -0 differ; every NaN as one value, since only its place is promised."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().cpu().contiguous().view(kind).masked_fill(t.detach().cpu().isnan(), -1)


def assert_same(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    wrong = bits(got) != bits(expected)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} differ"


# meaning


@ALL
def test_reference_is_the_formula(case):
    x, scale, zero_point, qmin, qmax, axis = case.args()
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = scale.numel()
    v, s, z = (t.to(scale.dtype).numpy() for t in (x, scale.reshape(shape), zero_point.reshape(shape)))
    with np.errstate(all="ignore"):
        ratio = np.divide(v, s, dtype=kind)
        code = np.add(np.rint(ratio), z, dtype=kind)
        code = np.where(code < qmin, kind(qmin), np.where(code > qmax, kind(qmax), code))
        expected = torch.from_numpy(np.asarray(np.multiply(np.subtract(code, z, dtype=kind), s, dtype=kind)))
        inside = np.asarray((ratio + z >= qmin) & (ratio + z <= qmax))
    assert_same(reference.fake_quant(*case.args()), expected.to(x.dtype))
    grad = case.grad()
    expected = torch.where(torch.from_numpy(inside), grad, torch.zeros_like(grad))
    assert_same(reference.fake_quant_backward(grad, *case.args()), expected)


def test_documented_example():
    x = torch.tensor([[-3.0, 0.26], [0.5, 9.0]])
    scale, zero_point = torch.tensor([0.5, 1.0]), torch.zeros(2, dtype=torch.int32)
    assert fake_quant(x, scale, zero_point, -8, 7, axis=0).tolist() == [[-3.0, 0.5], [0.0, 7.0]]


# parity


@ALL
def test_forward_has_the_reference_bits(case, fast):
    name, device = fast
    args = case.args(device)
    if (reason := backend.reason_against(name, "fake_quant", device, case.dtype)) is not None:
        with backend.backend(name), pytest.raises(NotImplementedError, match=reason):
            fake_quant(*args)
        return
    copies = [t.clone() for t in args[:3]]
    with backend.backend(name):
        got = fake_quant(*args)
    assert_same(got, reference.fake_quant(*case.args()))
    assert got.stride() == torch.empty_like(args[0]).stride()
    for before, after in zip(copies, args[:3], strict=True):
        assert torch.equal(before.nan_to_num(), after.nan_to_num()), "an input was modified"


@ALL
def test_backward_has_the_reference_bits(case, fast):
    name, device = fast
    if backend.reason_against(name, "fake_quant_backward", device, case.dtype) is not None:
        pytest.skip(f"{name} takes no {case.dtype}: the forward's test says so")
    args, grad = case.args(device), case.grad(device)
    with backend.backend(name):
        got = torch.ops.zsq.fake_quant_backward(grad, *args)
    assert_same(got, reference.fake_quant_backward(case.grad(), *case.args()))
    assert got.stride() == torch.empty_like(args[0]).stride()


@pytest.fixture
def scalar():
    native = pytest.importorskip("zsq_ext._C")
    before = native.set_simd(False)
    yield
    native.set_simd(before)


@ALL
def test_scalar_path_has_the_reference_bits(case, scalar):
    assert_same(cpu.fake_quant(*case.args()), reference.fake_quant(*case.args()))
    grad = case.grad()
    assert_same(cpu.fake_quant_backward(grad, *case.args()), reference.fake_quant_backward(grad, *case.args()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", [2.0**-24, 3.1e-6, 0.37, 1.0, 900.0])
@pytest.mark.parametrize("simd", [True, False])
def test_every_16_bit_float_is_read_and_written(dtype, step, simd):
    native = pytest.importorskip("zsq_ext._C")
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    args = x, torch.tensor([step]), torch.zeros(1, dtype=torch.int32), -(2**24), 2**24
    before = native.set_simd(simd)
    try:
        assert_same(cpu.fake_quant(*args), reference.fake_quant(*args))
    finally:
        native.set_simd(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["threads", "channels_last_odd", "tail"])
def test_any_number_of_threads(name, threads):
    args = CASE[name].args()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(fake_quant(*args), reference.fake_quant(*args))
    finally:
        torch.set_num_threads(before)


def test_threads_survive_a_fork():
    code = """
import os, torch
from zsq_ext.ops import fake_quant
torch.set_num_threads(2)
x, s, z = torch.randn(1 << 19), torch.ones(1), torch.zeros(1, dtype=torch.int32)
before = fake_quant(x, s, z, -8, 7)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(fake_quant(x, s, z, -8, 7), before) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_scale_and_zero_point_broadcast_and_need_not_be_contiguous():
    x = torch.randn(2, 4, 3)
    scale, zero_point = torch.rand(8)[::2] + 0.1, torch.tensor([3], dtype=torch.int32)
    expected = reference.fake_quant(x, scale, zero_point.expand(4), -8, 7, 1)
    assert_same(fake_quant(x, scale, zero_point, -8, 7, axis=-2), expected)
    assert_same(
        fake_quant(x, scale[:1], zero_point, -8, 7, axis=1), reference.fake_quant(x, scale[:1], zero_point, -8, 7)
    )


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


@pytest.mark.parametrize("case", cases.FAKE_QUANT_ERRORS, ids=lambda case: case.name)
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
    with pytest.raises(case.error) as raised:
        fake_quant(**{**good, **case.change})
    assert str(raised.value) == case.message


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


# torch's machinery

# Not nan_inf: opcheck compares results by value, and NaN differs from itself.
OPCHECK = ["per_tensor", "axis_1", "empty", "strided", "expanded", "channels_last_axis_1", "fp16", "bf16", "fp64"]


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    args = CASE[name].args()
    torch.library.opcheck(torch.ops.zsq.fake_quant, args)
    torch.library.opcheck(torch.ops.zsq.fake_quant_backward, (CASE[name].grad(), *args))


def _graph_of(function, *args):
    """Compiles without generating code, and gives the result with the operators of the forward's graph."""
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()

    return torch.compile(function, backend=aot_autograd(fw_compiler=look), fullgraph=True)(*args), seen


@pytest.mark.parametrize("name", ["per_tensor", "channels_last_axis_1", "bf16_channel", "ties_channel"])
@pytest.mark.parametrize("grad", ["ste_clip", "ste"])
def test_compile_decomposes_under_auto(name, grad):
    args = CASE[name].args()
    x = args[0].requires_grad_()
    upstream = CASE[name].grad()
    with backend.backend("auto"):
        out, ops = _graph_of(lambda *a: fake_quant(*a, grad=grad), *args)
    assert any("round" in op for op in ops)
    assert not any("zsq" in op for op in ops)
    assert_same(out, reference.fake_quant(*CASE[name].args()))
    (got,) = torch.autograd.grad(out, x, upstream)
    (expected,) = torch.autograd.grad(fake_quant(*args, grad=grad), x, upstream)
    assert_same(got, expected)


def test_compile_keeps_a_forced_backend_opaque(fast):
    name, device = fast
    args = CASE["axis_1"].args(device)
    x = args[0].requires_grad_()
    with backend.backend(name):
        out, ops = _graph_of(fake_quant, *args)
        (got,) = torch.autograd.grad(out, x, CASE["axis_1"].grad(device))
    assert any("zsq.fake_quant" in op for op in ops)
    assert_same(out, reference.fake_quant(*CASE["axis_1"].args()))
    assert_same(got, reference.fake_quant_backward(CASE["axis_1"].grad(), *CASE["axis_1"].args()))


def test_compile_notices_a_changed_backend():
    args = CASE["axis_1"].args()
    torch._dynamo.reset()
    compiled = torch.compile(fake_quant, backend="aot_eager", fullgraph=True)
    compiled(*args)
    pytest.importorskip("zsq_ext._C")
    with backend.backend("cuda"), pytest.raises(NotImplementedError, match="cuda: "):
        compiled(*args)


def test_export_keeps_the_op():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor([0.1, 0.2, 0.3]))
            self.register_buffer("zero_point", torch.zeros(3, dtype=torch.int32))

        def forward(self, x):
            return fake_quant(x, self.scale, self.zero_point, -8, 7, axis=1)

    x = torch.randn(2, 3, 4)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Model(), (x,), dynamic_shapes=(batch,))
    assert "zsq.fake_quant" in str(program.graph)
    more = torch.randn(5, 3, 4)
    assert_same(program.module()(more), Model()(more))


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
        fake_quant(x, *grid)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fake_quant(x, *grid)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_same(out, reference.fake_quant(x, *grid))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_runs_on_the_current_stream(name):
    x, *grid = CASE["threads"].args("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), backend.backend(name):
        torch.cuda._sleep(20_000_000)  # were the kernel on another stream, it would read x before the next line
        x.mul_(2)
        out = fake_quant(x, *grid)
    stream.synchronize()
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
def test_a_second_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    args = CASE["axis_1"].args("cuda:1")
    with backend.backend(name):
        assert_same(fake_quant(*args), reference.fake_quant(*args))


def test_env_is_clean():
    assert os.environ.get("ZSQ_BACKEND", "auto") == "auto", "these tests choose backends themselves"
