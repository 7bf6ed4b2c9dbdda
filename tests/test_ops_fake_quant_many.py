"""fake_quant_many: the bits of fake_quant, one tensor after the other, in one call.

Broken on purpose, each seen red:

    the last piece of a tensor lost                          slabs
    the sums of all tensors kept in the first one's slots    weights
    the first tensor's range for all                         weights
    sums not written one after another                       weights
    sums of a tensor without elements not zero               empty
    x's memory order kept under groups, dx not wanted        what_is_not_wanted, sums of grouped
    grad_scale of the first tensor for all                   autograd, weights
    dx handed out in the order of what a gradient came to    autograd, weights
    out not copied back where it is not dense                out_is_written, weights
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    assert_exports,
    assert_raises,
    assert_same,
    by,
    compiled,
    every,
    interpreted,
    on_every_path,
    ours,
    refused,
    replayed,
    skip_refused,
    unchanged,
)

from zsq_ext.ops import backend, fake_quant, fake_quant_many, reference
from zsq_ext.ops.cases import fake_quant_many as cases

ALL = every(cases.FAKE_QUANT_MANY)
CASE = {case.name: case for case in cases.FAKE_QUANT_MANY}
LEARNED = pytest.mark.parametrize("learned", [False, True], ids=["given", "learned"])

pytestmark = pytest.mark.usefixtures("poison")


def each(lists):
    """The arguments of fake_quant, tensor by tensor."""
    for *args, axis in zip(*lists, strict=True):
        yield *args, None if axis < 0 else axis


def one_by_one(grads, lists, need_dx=None, need_sums=None):
    """What the op of all must give, by the op of one."""
    dx, dscale, dzero_point = [], [], []
    n = len(grads)
    for grad, args, want_dx, want_sums in zip(
        grads, each(lists), need_dx or [True] * n, need_sums or [True] * n, strict=True
    ):
        first, *sums = torch.ops.zsq.fake_quant_lsq_backward(grad, *args)
        dx += [first] if want_dx else []
        for to, t in zip((dscale, dzero_point), sums, strict=True):
            to += [t.flatten()] if want_sums else []
    none = lists[1][0].new_empty(0)
    return [*dx, torch.cat([none, *dscale]), torch.cat([none, *dzero_point])]


def backward(grads, lists, need_dx=None, need_sums=None):
    n = len(grads)
    dx, *sums = torch.ops.zsq.fake_quant_many_backward(grads, *lists, need_dx or [True] * n, need_sums or [True] * n)
    return [*dx, *sums]


# parity


@ALL
@LEARNED
def test_the_forward_has_the_bits_of_one_by_one(case, learned, fast):
    name, device = fast
    lists = case.args(device, learned=learned)
    if refused(fast, "fake_quant_many", case.dtype, lambda: torch.ops.zsq.fake_quant_many(*lists)):
        return
    with backend.backend(name), unchanged(lists):
        got = torch.ops.zsq.fake_quant_many(*lists)
        expected = [fake_quant(*args, grad="lsq_plus" if learned else "ste") for args in each(lists)]
    assert_same(got, expected)
    assert [t.stride() for t in got] == [t.stride() for t in expected]
    assert_same(got, by("reference", "fake_quant_many")(*case.args(learned=learned)))


@ALL
@LEARNED
def test_gradients_have_the_bits_of_one_by_one(case, learned, fast):
    name, device = fast
    skip_refused(fast, "fake_quant_many", case.dtype)
    if case.name == "slabs" and interpreted(fast):
        pytest.skip("the interpreter takes a minute; parts has several sums per channel too")
    grads, lists = case.grads(device), case.args(device, learned=learned)
    with backend.backend(name):
        got, expected = backward(grads, lists), one_by_one(grads, lists)
    assert_same(got, expected)
    assert [t.stride() for t in got] == [t.stride() for t in expected]
    n = len(grads)
    on_cpu = case.args(learned=learned)
    assert_same(
        got[:n], [reference.fake_quant_backward(g, *args) for g, args in zip(case.grads(), each(on_cpu), strict=True)]
    )


@pytest.mark.parametrize("name", ["weights", "columns", "empty", "grouped", "layouts", "parts"])
@pytest.mark.parametrize("want", ["dx", "sums", "some of either"])
def test_what_is_not_wanted_is_left_out(name, want, fast):
    backend_name, device = fast
    grads, lists = CASE[name].grads(device), CASE[name].args(device)
    n = len(grads)
    need_dx = [want == "dx" or (want != "sums" and k % 3 != 1) for k in range(n)]
    need_sums = [want == "sums" or (want != "dx" and k % 3 != 0) for k in range(n)]
    with backend.backend(backend_name):
        got = backward(grads, lists, need_dx, need_sums)
        assert_same(got, one_by_one(grads, lists, need_dx, need_sums))
    assert len(got) == sum(need_dx) + 2
    assert got[-1].numel() == sum(s.numel() for s, need in zip(lists[1], need_sums, strict=True) if need)


@ALL
def test_neither_path_nor_threads_change_a_bit(case):
    pytest.importorskip("zsq_ext._C")
    grads, lists = case.grads(), case.args(learned=True)

    def found():
        with backend.backend("cpu"):
            return torch.ops.zsq.fake_quant_many(*lists), backward(grads, lists)

    outs, gradients = on_every_path(found)
    assert_same(outs, by("reference", "fake_quant_many")(*lists))
    with backend.backend("cpu"):
        assert_same(gradients, one_by_one(grads, lists))


@pytest.mark.parametrize("name", ["weights", "layouts", "grouped", "empty", "fp16"])
def test_out_is_written_and_returned(name, fast):
    backend_name, device = fast
    *lists, axes = CASE[name].args(device)
    axes = [None if axis < 0 else axis for axis in axes]
    expected = by("reference", "fake_quant_many")(*CASE[name].args())
    strided = [torch.empty([2 * n for n in t.shape], dtype=t.dtype, device=device) for t in lists[0]]
    strided = [t[tuple(slice(None, None, 2) for _ in t.shape)] for t in strided]
    own = [t.clone() for t in lists[0]]
    fresh = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in lists[0]]
    with backend.backend(backend_name):
        for tensors, outs in ((lists[0], fresh), (lists[0], strided), (own, own)):
            versions = [out._version for out in outs]
            found = fake_quant_many(tensors, *lists[1:], axes, out=tuple(outs))
            assert isinstance(found, list)
            assert all(a is b for a, b in zip(found, outs, strict=True))
            assert_same(outs, expected)
            assert all(out._version > v for out, v in zip(outs, versions, strict=True)), "autograd would not notice"


# gradients


def leaves(lists):
    """x, scale and zero_point of all but every third tensor want gradients, the second of them no x's."""
    for i, tensors in enumerate(lists[:3]):
        for k, t in enumerate(tensors):
            if t.is_floating_point() and k % 3 != 2 and (i, k) != (0, 1):
                t.requires_grad_()
    return lists


def taken(outs, inputs, grads):
    return torch.autograd.grad(
        [out for out in outs if out.requires_grad],
        [t for t in inputs if t.requires_grad],
        [grad for out, grad in zip(outs, grads, strict=True) if out.requires_grad],
        allow_unused=True,
    )


@pytest.mark.parametrize("name", ["weights", "columns", "grouped", "empty", "nan_inf", "fp16", "fp64"])
@pytest.mark.parametrize("grad", ["lsq", "lsq_plus", "ste_clip", "ste"])
def test_autograd_is_that_of_fake_quant(name, grad, fast):
    backend_name, device = fast
    case = CASE[name]
    skip_refused(fast, "fake_quant_many", case.dtype)
    lists = leaves(case.args(device, learned=grad == "lsq_plus"))
    *given_, axes = lists
    factors = [1.0 if k % 2 else 0.3 for k in range(len(axes))]
    inputs = [t for ts in lists[:3] for t in ts]
    grads = case.grads(device)
    with backend.backend(backend_name):
        got = fake_quant_many(*given_, [None if axis < 0 else axis for axis in axes], grad=grad, grad_scale=factors)
        one = [
            fake_quant(*args, grad=grad, grad_scale=factor) for args, factor in zip(each(lists), factors, strict=True)
        ]
        assert [t.requires_grad for t in got] == [t.requires_grad for t in one]
        assert_same(got, one)
        for a, b in zip(taken(got, inputs, grads), taken(one, inputs, grads), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_same(a, b)


def test_tensors_that_no_gradient_comes_to_cost_nothing():
    tensors, scales, zero_points, qmin, qmax, axes = CASE["weights"].args()
    inputs = [t.requires_grad_() for t in (*tensors, *scales)]
    found = fake_quant_many(tensors, scales, zero_points, qmin, qmax, axes)
    got = torch.autograd.grad(found[2].sum(), inputs, allow_unused=True, retain_graph=True)
    assert [k for k, t in enumerate(got) if t is not None] == [2, 2 + len(tensors)]
    sum(out.sum() for out in found).backward()
    scales[0].grad.zero_()  # a part of what all sums share, and nobody else's
    assert_same([scales[2].grad], [got[2 + len(tensors)]])


def test_ste_is_the_identity_and_saves_nothing():
    tensors, *rest = CASE["weights"].args()
    found = fake_quant_many([t.requires_grad_() for t in tensors], *rest, grad="ste")
    assert found[0].grad_fn.saved_tensors == ()
    grads = CASE["weights"].grads()
    assert all(a is b for a, b in zip(torch.autograd.grad(found, tensors, grads), grads, strict=True))


def test_lsq_is_differentiable_once():
    tensors, scales, *rest = CASE["weights"].args()
    scales[0].requires_grad_()
    found = fake_quant_many(tensors, scales, *rest)
    (dscale,) = torch.autograd.grad(found[0], scales[0], CASE["weights"].grads()[0].requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="a gradient must be taken once"):
        dscale.sum().backward()


def test_no_gradient_where_none_is_wanted():
    tensors, scales, *rest = CASE["weights"].args()
    assert not any(t.requires_grad for t in fake_quant_many(tensors, scales, *rest))
    scales = [t.requires_grad_() for t in scales]
    assert not any(t.requires_grad for t in fake_quant_many(tensors, scales, *rest, grad="ste_clip"))
    with torch.no_grad():
        assert not any(t.requires_grad for t in fake_quant_many(tensors, scales, *rest))
        fake_quant_many(tensors, scales, *rest, out=tensors)


def test_a_tuple_a_list_one_value_for_all_and_nothing():
    tensors = torch.randn(3, 4), torch.randn(2, 5)
    scales, zero_points = (torch.rand(3) + 0.1, torch.rand(1) + 0.1), (torch.zeros(1).int(), torch.ones(2).int())
    found = fake_quant_many(tensors, scales, zero_points, -8, 7)
    assert isinstance(found, list)
    assert_same(found, fake_quant_many(list(tensors), list(scales), list(zero_points), [-8, -8], (7, 7), [-2, 0]))
    assert_same(found, [fake_quant(*args, -8, 7, 0) for args in zip(tensors, scales, zero_points, strict=True)])
    assert fake_quant_many([], [], [], -8, 7) == []


def test_autocast_keeps_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert all(t.dtype == torch.float32 for t in fake_quant_many(*CASE["weights"].args()))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), data=st.data())
def test_properties(seed, data):
    """A tensor does not know its neighbours, nor its place among them."""
    made = [case.args(seed=seed + k) for k, case in enumerate(data.draw(st.lists(st.sampled_from(ONES), max_size=6)))]
    made.append(ONES[0].args(seed=seed))
    order = data.draw(st.permutations(range(len(made))))
    grads = [torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed)) for args in made]

    def all_of(chosen):
        *lists, axes = ([made[k][i] for k in chosen] for i in range(6))
        lists = *lists, [-1 if axis is None else axis for axis in axes]
        found = backward([grads[k] for k in chosen], lists)
        assert_same(found, one_by_one([grads[k] for k in chosen], lists))
        return dict(zip(chosen, torch.ops.zsq.fake_quant_many(*lists), strict=True))

    straight, mixed = all_of(range(len(made))), all_of(order)
    assert_same([straight[k] for k in order], [mixed[k] for k in order])


ONES = [case for name in ("weights", "shapes", "columns", "grouped", "empty") for case in CASE[name].each]


# errors


@every(cases.FAKE_QUANT_MANY_ERRORS)
def test_errors_name_the_argument(case):
    good = {
        "tensors": [torch.zeros(2, 3), torch.zeros(4, 5)],
        "scales": [torch.ones(2), torch.ones(1)],
        "zero_points": [torch.zeros(1, dtype=torch.int32)] * 2,
        "qmin": -8,
        "qmax": 7,
    }
    assert_raises(case, fake_quant_many, good)


# torch's machinery


@pytest.mark.parametrize("name", ["weights", "columns", "layouts", "grouped", "empty", "bf16", "fp64"])
def test_opcheck(name):
    lists = CASE[name].args()
    if name in ("grouped", "bf16", "fp64"):  # opcheck compares results by value, and NaN differs from itself
        lists = [values[:2] for values in lists]
    grads = CASE[name].grads()[: len(lists[0])]
    torch.library.opcheck(torch.ops.zsq.fake_quant_many, lists)
    outs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in lists[0]]
    torch.library.opcheck(torch.ops.zsq.fake_quant_many_out, (*lists, outs))
    n = len(grads)
    for need in ([True] * n, [k % 2 == 0 for k in range(n)]):
        torch.library.opcheck(torch.ops.zsq.fake_quant_many_backward, (grads, *lists, need, need[::-1]))


@pytest.mark.parametrize("grad", ["lsq", "ste_clip", "ste"])
def test_compile_keeps_the_sums_and_opens_the_rest(grad):
    tensors, scales, zero_points, qmin, qmax, axes = CASE["weights"].args()
    inputs = [t.requires_grad_() for t in (*tensors, *scales)]
    n = len(tensors)

    def loss(*inputs):
        found = fake_quant_many(inputs[:n], inputs[n:], zero_points, qmin, qmax, axes, grad=grad)
        return sum((out * (i + 1)).square().sum() for i, out in enumerate(found))

    total, graphs = compiled(loss, *inputs)
    got = torch.autograd.grad(total, inputs, allow_unused=True)
    assert [op for seen in graphs for op in ours(seen)] == ["zsq.fake_quant_many_backward.default"] * (grad == "lsq")
    for a, b in zip(got, torch.autograd.grad(loss(*inputs), inputs, allow_unused=True), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same(a, b)


def test_compile_of_a_forced_backend_keeps_the_op(fast):
    name, device = fast
    lists = CASE["weights"].args(device)
    outs = [torch.full_like(t, 7) for t in lists[0]]

    def into(tensors, outs):
        found = fake_quant_many(tensors, *lists[1:], out=outs)
        return [a + b for a, b in zip(found, fake_quant_many(tensors, *lists[1:]), strict=True)]

    torch._dynamo.reset()
    with backend.backend(name):
        twice = torch.compile(into, backend="aot_eager", fullgraph=True)(lists[0], outs)
    expected = by("reference", "fake_quant_many")(*CASE["weights"].args())
    assert_same(outs, expected)
    assert_same(twice, [t + t for t in expected])


def test_export_keeps_the_op():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(2, 4))
            self.register_buffer("step", torch.tensor([0.1]))
            self.register_buffer("zero", torch.zeros(1, dtype=torch.int32))

        def forward(self, x):
            a, b = fake_quant_many([self.a, self.b], [self.step] * 2, [self.zero] * 2, -8, 7)
            return x @ a.t() @ b.t()

    assert_exports(Model().requires_grad_(False), (torch.randn(2, 3),), (torch.randn(5, 3),), "fake_quant_many")


# GPU only


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_contents():
    case = CASE["more_than_a_table"]
    grads, lists = case.grads("cuda"), case.args("cuda")

    def change():
        for t in lists[0]:
            t.normal_()

    with backend.backend("cuda"):
        outs, found = replayed(lambda: (torch.ops.zsq.fake_quant_many(*lists), backward(grads, lists)), change)
        assert_same(outs, by("reference", "fake_quant_many")(*lists))
        assert_same(found, one_by_one(grads, lists))
