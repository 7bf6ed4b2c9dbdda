"""cam_map and count_active: what they mean, that every backend agrees, and how they behave under torch's machinery.

Broken on purpose on the CPU, each seen red; what saw it is in brackets. NaN turned into 0 by the ReLU [NaN passes];
the floor ignored [floor]; 16 positions, or the last channel, left out [resnet; channels_last]; the gradient let
through where the map is 0 [NaN passes]; weights and positions swapped where channels are last [channels_last]; 0
counted [nan_inf], the upper bound counted [edges], NaN counted [nan_inf].
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    assert_exports,
    assert_raises,
    assert_same,
    assert_within,
    compiled,
    every,
    path,
    refused,
    replayed,
    skip_refused,
    strides_like,
    unchanged,
)

from zsq_ext.ops import backend, cam_map, count_active, cpu, reference
from zsq_ext.ops.cases import heads as cases

ALL = every(cases.CAM)
CASE = {case.name: case for case in cases.CAM}

pytestmark = pytest.mark.usefixtures("poison")


def assert_map(case, got):
    """Within what K additions of rounded products may lose, half a unit of the sum of sizes each."""
    x, alpha, floor = case.args()
    expected = reference.cam_map(x, alpha, floor)
    weights = alpha.double() if floor is None else alpha.double().clamp_min(floor)
    sizes = (weights[:, :, None, None] * x.double()).abs().sum(1)
    slack = (min(x.size(1), 256) + 2 + x.size(1) // 256) * torch.finfo(case.compute).eps / 2 * sizes
    assert got.dtype == expected.dtype
    assert got.is_contiguous()
    # 0 where the sum is minus infinity is no rounding: its slack is infinite, the rest of such a sum does not matter
    assert_within(got, expected, slack)
    assert not (got < 0).any()


def backward_args(case, device="cpu"):
    x, alpha, floor = case.args(device)
    return x, alpha, reference.cam_map(*case.args()).to(device), case.grad(device), floor


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
    if refused(fast, "cam_map", case.dtype, lambda: cam_map(*args[:2], floor=args[2])):
        return
    with backend.backend(name), unchanged(args):
        assert_map(case, torch.ops.zsq.cam_map(*args))


@ALL
def test_backward_agrees_with_the_reference(case, fast):
    name, device = fast
    skip_refused(fast, "cam_map_backward", case.dtype)
    args = backward_args(case, device)
    with backend.backend(name):
        got = torch.ops.zsq.cam_map_backward(*args)
    assert_same(got, reference.cam_map_backward(*backward_args(case)))
    assert got.stride() == strides_like(args[0])


@ALL
def test_count_agrees_with_the_reference(case, fast):
    name, device = fast
    skip_refused(fast, "count_active", case.dtype)
    x = case.activation(device)
    with backend.backend(name):
        for upper in (None, case.upper):
            assert_same(count_active(x, upper), reference.count_active(case.activation(), upper))


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
    for threads in (1, 2, 5):
        with path(threads=threads), backend.backend(where):
            found.append(torch.ops.zsq.cam_map(*case.args(device)))
            found.append(torch.ops.zsq.cam_map_backward(*backward_args(case, device)))
            found.append(count_active(case.activation(device)))
    for i, t in enumerate(found[3:]):
        assert_same(t, found[i % 3])


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


@every(cases.CAM_ERRORS)
def test_errors_name_the_argument(case):
    good = {"activation": torch.zeros(2, 3, 4, 4), "alpha": torch.zeros(2, 3), "floor": 1e-10}
    assert_raises(case, cam_map, good)


@every(cases.COUNT_ERRORS)
def test_errors_of_counts_name_the_argument(case):
    good = {"x": torch.zeros(2, 3, 4, 4), "upper": 6}
    assert_raises(case, count_active, good)


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

    a, b = (x.clone().requires_grad_() for _ in range(2))
    (found, graphs), plain = compiled(step, a), step(b)
    assert {"zsq.cam_map.default", "zsq.count_active.default"} <= set(graphs[0])
    assert_same(found, plain)
    got, expected = (torch.autograd.grad(s, x, case.grad())[0] for s, x in ((found, a), (plain, b)))
    assert_same(got, expected)


class Map(torch.nn.Module):
    def forward(self, x, alpha):
        return cam_map(x, alpha, floor=1e-10), count_active(x, 6.0)


def test_export_keeps_the_ops():
    x, alpha, _ = CASE["contiguous"].args()
    assert_exports(Map(), (x, alpha), (x[:2], alpha[:2]), "cam_map", "count_active")


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
    new = case.activation("cuda", seed=7)
    with backend.backend(name):
        out, count = replayed(lambda: (torch.ops.zsq.cam_map(*args), count_active(args[0])), lambda: args[0].copy_(new))
        assert_same(out, torch.ops.zsq.cam_map(new, *args[1:]))
    assert_same(count, reference.count_active(new.cpu(), None))
