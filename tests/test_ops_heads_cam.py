"""cam_map and count_active: what they mean, that every backend agrees, and how they behave under torch's machinery.

Broken on purpose on the CPU, each seen red; what saw it is in brackets. NaN turned into 0 by the ReLU [NaN passes];
the floor ignored [floor]; 16 positions, or the last channel, left out [resnet; channels_last]; the gradient let
through where the map is 0 [NaN passes]; weights and positions swapped where channels are last [channels_last]; 0
counted [nan_inf], the upper bound counted [edges], NaN counted [nan_inf].
"""

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from zsq_ext.ops import backend, cam_map, count_active, cpu, reference
from zsq_ext.ops.cases import heads as cases

ALL = pytest.mark.parametrize("case", cases.CAM, ids=lambda case: case.name)
CASE = {case.name: case for case in cases.CAM}

pytestmark = pytest.mark.usefixtures("poison")


def bits(t):
    """The tensor as integers, so that 0 and -0 differ; every NaN as one value, since only its place is promised."""
    t = t.detach().cpu().contiguous()
    if not t.is_floating_point():
        return t
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.view(kind).masked_fill(t.isnan(), -1)


def assert_same(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    wrong = bits(got) != bits(expected)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} differ"


def assert_map(case, got):
    """Within what K additions of rounded products may lose, half a unit of the sum of sizes each."""
    x, alpha, floor = case.args()
    expected = reference.cam_map(x, alpha, floor)
    weights = alpha.double() if floor is None else alpha.double().clamp_min(floor)
    sizes = (weights[:, :, None, None] * x.double()).abs().sum(1)
    slack = (min(x.size(1), 256) + 2 + x.size(1) // 256) * torch.finfo(case.compute).eps / 2 * sizes
    assert got.dtype == expected.dtype
    assert got.is_contiguous()
    finite = expected.isfinite()
    # 0 where the sum is minus infinity is no rounding: the rest of such a sum does not matter
    got = got.cpu()
    assert_same(got.masked_fill(finite, 0), expected.masked_fill(finite, 0))
    excess = (got.double() - expected.double()).abs() - slack.nan_to_num(torch.inf)
    assert (excess[finite] <= 0).all(), f"beyond the tolerance by up to {excess[finite].max()}"
    assert not (got < 0).any()


def backward_args(case, device="cpu"):
    x, alpha, floor = case.args(device)
    return x, alpha, reference.cam_map(*case.args()).to(device), case.grad(device), floor


def strides_of(x):
    last = x.stride(1) == 1 and not x.is_contiguous()
    dense = torch.empty(x.shape, device="meta")
    return (dense.contiguous(memory_format=torch.channels_last) if last else dense).stride()


# meaning


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("floor", [None, 1e-10])
def test_it_is_a_product_a_sum_and_a_relu(layout, floor):
    case = cases.CamCase("", dtype=torch.float64, floor=floor, layout=layout)
    x, alpha, _ = case.args()
    for name in ("reference", "cpu"):
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        with backend.backend(name):
            got = cam_map(ours, alpha, floor=floor)
            (grad,) = torch.autograd.grad(got, ours, case.grad())
        weights = alpha if floor is None else alpha.clamp_min(floor)
        expected = (weights[:, :, None, None] * theirs).sum(1).relu()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert_same(grad, torch.autograd.grad(expected, theirs, case.grad())[0])
        assert grad.stride() == x.stride()


def test_documented_examples():
    x = torch.tensor([[[[1.0, -2.0]], [[4.0, 1.0]]]])
    assert cam_map(x, torch.tensor([[1.0, 0.5]])).tolist() == [[[3, 0]]]
    assert count_active(torch.tensor([[[[-1.0, 0.0, 3.0, 6.0, 9.0]]]]), 6).tolist() == [[1]]


@ALL
def test_counts_are_those_of_comparisons(case):
    x = case.activation().to(case.compute)
    expected = x > 0 if case.upper is None else (x > 0) & (x < case.upper)
    assert_same(reference.count_active(case.activation(), case.upper), expected.sum((2, 3)).int())


def test_nan_passes_the_gradient_and_is_not_counted(fast):
    name, device = fast
    x = torch.tensor([[[[torch.nan, 1.0]], [[1.0, -3.0]]]], device=device).requires_grad_()
    with backend.backend(name):
        s = cam_map(x, torch.tensor([[2.0, 1.0]], device=device))
        assert s.isnan().tolist() == [[[True, False]]]
        assert torch.autograd.grad(s, x, torch.ones_like(s))[0].tolist() == [[[[2, 0]], [[1, 0]]]]
        assert count_active(x).tolist() == [[1, 1]]


# parity


@ALL
def test_map_agrees_with_the_reference(case, fast):
    name, device = fast
    args = case.args(device)
    if (reason := backend.reason_against(name, "cam_map", device, case.dtype)) is not None:
        with backend.backend(name), pytest.raises(NotImplementedError, match=reason):
            cam_map(*args[:2], floor=args[2])
        return
    before = args[0].clone()
    with backend.backend(name):
        assert_map(case, torch.ops.zsq.cam_map(*args))
    assert torch.equal(before.nan_to_num(), args[0].nan_to_num())


@ALL
def test_backward_agrees_with_the_reference(case, fast):
    name, device = fast
    if backend.reason_against(name, "cam_map_backward", device, case.dtype) is not None:
        pytest.skip(f"{name} has no backward for {case.dtype}: the map's test says so")
    args = backward_args(case, device)
    with backend.backend(name):
        got = torch.ops.zsq.cam_map_backward(*args)
    assert_same(got, reference.cam_map_backward(*backward_args(case)))
    assert got.stride() == strides_of(args[0])


@ALL
def test_count_agrees_with_the_reference(case, fast):
    name, device = fast
    if backend.reason_against(name, "count_active", device, case.dtype) is not None:
        pytest.skip(f"{name} has no count for {case.dtype}: the map's test says so")
    x = case.activation(device)
    with backend.backend(name):
        for upper in (None, case.upper):
            assert_same(count_active(x, upper), reference.count_active(case.activation(), upper))


@pytest.fixture
def scalar():
    native = pytest.importorskip("zsq_ext._C")
    before = native.set_simd(False)
    yield
    native.set_simd(before)


@ALL
def test_scalar_path_agrees_with_the_reference(case, scalar):
    assert_map(case, cpu.cam_map(*case.args()))
    assert_same(cpu.cam_map_backward(*backward_args(case)), reference.cam_map_backward(*backward_args(case)))
    args = case.activation(), case.upper
    assert_same(cpu.count_active(*args), reference.count_active(*args))


@pytest.mark.parametrize("name", ["contiguous_threads", "channels_last_threads", "contiguous_chunks"])
def test_a_backend_repeats_its_bits_on_any_number_of_threads(name, fast):
    where, device = fast
    case, found = CASE[name], []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            with backend.backend(where):
                found.append(torch.ops.zsq.cam_map(*case.args(device)))
                found.append(torch.ops.zsq.cam_map_backward(*backward_args(case, device)))
                found.append(count_active(case.activation(device)))
        finally:
            torch.set_num_threads(before)
    for i, t in enumerate(found[3:]):
        assert_same(t, found[i % 3].cpu())


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    last=st.booleans(),
)
def test_properties(seed, shape, last):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    alpha = torch.rand(shape[:2], generator=rng) + 0.1
    order = torch.randperm(shape[0], generator=rng)
    assert_same(cam_map(x[order], alpha[order]), cam_map(x, alpha)[order])
    assert_same(cam_map(x, 2 * alpha), 2 * cam_map(x, alpha))  # a factor of two is exact
    assert not cam_map(-x.abs(), alpha).any()
    assert_same(count_active(x) + count_active(-x), torch.full(shape[:2], shape[2] * shape[3], dtype=torch.int32))
    assert (count_active(x, 1.0) <= count_active(x)).all()


# gradients and torch


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout):
    x, alpha, _ = cases.CamCase("", (2, 3, 2, 2), torch.float64, layout=layout).args()
    torch.autograd.gradcheck(lambda x: cam_map(x, alpha, floor=-0.5), x.requires_grad_())


def test_the_weights_are_constants():
    x, alpha, _ = CASE["contiguous"].args()
    cam_map(x.requires_grad_(), alpha.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert alpha.grad is None
    assert not cam_map(x.detach(), alpha).requires_grad
    assert not count_active(x).requires_grad


def test_double_backward_is_refused():
    x, alpha, _ = CASE["contiguous"].args()
    (first,) = torch.autograd.grad(cam_map(x.requires_grad_(), alpha).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^cam_map: a gradient must be taken once"):
        first.sum().backward()


def test_autocast_keeps_the_dtype():
    x, alpha, _ = CASE["contiguous_bf16"].args()
    with torch.autocast("cpu", torch.bfloat16):
        assert cam_map(x, alpha).dtype == torch.float32


@pytest.mark.parametrize("case", cases.CAM_ERRORS, ids=lambda case: case.name)
def test_errors_name_the_argument(case):
    good = {"activation": torch.zeros(2, 3, 4, 4), "alpha": torch.zeros(2, 3), "floor": 1e-10}
    cam_map(**good)
    with pytest.raises(case.error) as raised:
        cam_map(**{**good, **case.change})
    assert str(raised.value) == case.message


@pytest.mark.parametrize("case", cases.COUNT_ERRORS, ids=lambda case: case.name)
def test_errors_of_counts_name_the_argument(case):
    good = {"x": torch.zeros(2, 3, 4, 4), "upper": 6}
    count_active(**good)
    with pytest.raises(case.error) as raised:
        count_active(**{**good, **case.change})
    assert str(raised.value) == case.message


@pytest.mark.parametrize("name", ["contiguous_floor", "channels_last_tail", "contiguous_fp16", "no_places", "strided"])
def test_opcheck(name, fast):
    where, device = fast
    case = CASE[name]
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    with backend.backend(where):
        torch.library.opcheck(torch.ops.zsq.cam_map.default, case.args(device), test_utils=utilities)
        torch.library.opcheck(torch.ops.zsq.cam_map_backward.default, backward_args(case, device), test_utils=utilities)
        args = case.activation(device), case.upper
        torch.library.opcheck(torch.ops.zsq.count_active.default, args, test_utils=utilities)


def test_compiles_without_a_break():
    case = CASE["channels_last_floor"]
    x, alpha, floor = case.args()

    def step(x):
        return cam_map(x, alpha * count_active(x, 6.0) / 35, floor=floor)

    graphs = []
    catch = aot_autograd(fw_compiler=lambda gm, _: (graphs.append(gm), make_boxed_func(gm.forward))[1])
    torch._dynamo.reset()
    a, b = (x.clone().requires_grad_() for _ in range(2))
    compiled, plain = torch.compile(step, backend=catch, fullgraph=True)(a), step(b)
    names = [str(node.target) for gm in graphs for node in gm.graph.nodes]
    assert {"zsq.cam_map.default", "zsq.count_active.default"} <= set(names)
    assert_same(compiled, plain)
    got, expected = (torch.autograd.grad(s, x, case.grad())[0] for s, x in ((compiled, a), (plain, b)))
    assert_same(got, expected)


class Map(torch.nn.Module):
    def forward(self, x, alpha):
        return cam_map(x, alpha, floor=1e-10), count_active(x, 6.0)


def test_export_keeps_the_ops():
    x, alpha, _ = CASE["contiguous"].args()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Map(), (x, alpha), dynamic_shapes=(batch, batch))
    assert "zsq.cam_map" in str(program.graph)
    assert "zsq.count_active" in str(program.graph)
    for a, b in zip(program.module()(x[:2], alpha[:2]), Map()(x[:2], alpha[:2]), strict=True):
        assert_same(a, b)


def test_meta_tensors_have_a_shape_and_no_values():
    x, alpha = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 3, device="meta")
    assert cam_map(x, alpha).shape == (2, 4, 5)
    assert count_active(x).dtype == torch.int32


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replays_with_new_contents(name):
    case = CASE["contiguous_resnet"]
    args = case.args("cuda")
    with backend.backend(name):
        torch.ops.zsq.cam_map(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, count = torch.ops.zsq.cam_map(*args), count_active(args[0])
        new = case.activation("cuda", seed=7)
        args[0].copy_(new)
        graph.replay()
        assert_same(out, torch.ops.zsq.cam_map(new, *args[1:]).cpu())
    assert_same(count, reference.count_active(new.cpu(), None))
