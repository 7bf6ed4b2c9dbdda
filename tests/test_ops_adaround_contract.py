"""adaround: its gradients and errors, and torch's machinery. What it computes is in test_ops_adaround.py."""

import math

import pytest
import torch
from parity import (
    assert_exports,
    assert_raises,
    assert_same,
    compiled,
    every,
    ours,
    replayed,
)

from zsq_ext.ops import adaround, adaround_many, backend, cpu
from zsq_ext.ops.cases import adaround as cases

CASE = {case.name: case for case in cases.ADAROUND}

pytestmark = pytest.mark.usefixtures("poison")


# gradients


def composite(v, base, scale, zero_point, qmin, qmax, axis, beta):
    """What is published, as autograd has it."""
    shape = [1] * v.dim()
    if axis is not None:
        shape[axis] = -1
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    h = torch.clamp(torch.sigmoid(v) * (1.1 + 0.1) - 0.1, 0, 1)
    w_hat = ((base + h).clamp(qmin, qmax) - zero_point) * scale
    return w_hat, (1 - (2 * h - 1).abs().pow(beta)).sum()


@pytest.mark.parametrize("beta", [1.0, 2.0, 2.5, 20.0])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_are_those_of_the_published_composite(axis, beta):
    case = cases.AdaRoundCase("fp64", dtype=torch.float64, axis=axis, beta=beta)
    args, (grad, grad_reg) = case.args(), case.grads()
    leaves = [args[0].requires_grad_(), args[2].requires_grad_()]
    expected = torch.autograd.grad(composite(*args, beta), leaves, [grad, grad_reg])
    got = torch.autograd.grad(adaround(*args, beta=beta), leaves, [grad, grad_reg])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)  # 288 terms in fp64


@pytest.mark.parametrize("beta", [None, 1.0, 3.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(beta, layout):
    case = cases.AdaRoundCase("fp64", shape=(3, 4, 2, 2), dtype=torch.float64, layout=layout, beta=beta)
    v, base, scale, *rest = case.args()
    v = v.clamp(-2.3, 2.3) + 0.01  # away from where h is clamped, and from |2h - 1| = 0
    leaves = v.requires_grad_(), scale.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, scale: adaround(v, base, scale, *rest, beta=beta), leaves)


def test_gradients_in_numbers():
    v, base = torch.tensor([0.0, 0.0, 0.0, 9.0, -9.0], requires_grad=True), torch.tensor([1, 7, -9, 2, 2]).short()
    scale, zero_point = torch.tensor([0.5], requires_grad=True), torch.tensor([3], dtype=torch.int32)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    (adaround(v, base, scale, zero_point, -8, 7, None) * weights).sum().backward()
    # the slope of h at 0 is 1.2 / 4; above and below the range, and where h is clamped, nothing moves
    torch.testing.assert_close(v.grad, torch.tensor([0.5 * 0.3, 0, 0, 0, 0]))
    # 1.5 - 3, then 7 - 3, -8 - 3, 3 - 3, 2 - 3
    torch.testing.assert_close(scale.grad, torch.tensor([-1.5 + 40 - 1100 + 0 - 10000]))


@pytest.mark.parametrize("wanted", [("v",), ("scale",), ("v", "scale")])
def test_only_what_is_wanted_is_computed(wanted, monkeypatch):
    asked = []
    before = cpu.adaround_backward

    def spy(*args):
        asked.append(args[-1])
        return before(*args)

    monkeypatch.setattr(cpu, "adaround_backward", spy)
    backend.find.cache_clear()
    v, base, scale, *rest = CASE["conv"].args()
    leaves = [t.requires_grad_() for name, t in (("v", v), ("scale", scale)) if name in wanted]
    with backend.backend("cpu"):
        w_hat, reg = adaround(v, base, scale, *rest, beta=2.0)
        torch.autograd.grad(w_hat.sum() + reg, leaves)
    backend.find.cache_clear()
    assert asked == ["scale" in wanted]


@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_may_use_either_output(which):
    v, base, scale, *rest = CASE["conv"].args()
    v.requires_grad_()
    (got,) = torch.autograd.grad(adaround(v, base, scale, *rest, beta=2.0)[which].sum(), v)
    out = composite(v.detach().requires_grad_(), base, scale, *rest, 2.0)
    leaf = v.detach().requires_grad_()
    (expected,) = torch.autograd.grad(composite(leaf, base, scale, *rest, 2.0)[which].sum(), leaf)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert out[0].shape == v.shape


def test_scale_and_zero_point_broadcast():
    v, base, scale, zero_point, *rest = CASE["conv"].args()
    one = scale[:1].clone().requires_grad_()
    out = adaround(v, base, one, zero_point, *rest)
    assert_same(out, adaround(v, base, one.detach().expand(8), zero_point, *rest))
    full = one.detach().expand(8).clone().requires_grad_()
    (expected,) = torch.autograd.grad(adaround(v, base, full, zero_point, *rest).sum(), full)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), one)[0], expected.sum(0, keepdim=True))


def test_it_is_differentiable_once_and_not_where_none_is_wanted():
    v, base, scale, *rest = CASE["conv"].args()
    assert not adaround(v, base, scale, *rest).requires_grad
    v.requires_grad_()
    with torch.no_grad():
        assert not adaround(v, base, scale, *rest).requires_grad
    upstream = torch.ones_like(v).requires_grad_()
    (dv,) = torch.autograd.grad(adaround(v, base, scale, *rest), v, upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="a gradient must be taken once"):
        dv.sum().backward()


def test_a_schedule_may_live_on_the_device():
    v, base, scale, *rest = CASE["conv"].args()
    beta = torch.tensor(20.0)
    for _ in range(3):
        assert_same(adaround(v, base, scale, *rest, beta=beta)[1], adaround(v, base, scale, *rest, beta=float(beta))[1])
        beta.sub_(6)


def test_autocast_keeps_the_dtype():
    v, base, scale, *rest = CASE["conv"].args()
    expected = adaround(v, base, scale, *rest, beta=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(adaround(v, base, scale, *rest, beta=2.0), expected, strict=True):
            assert_same(got, want)


# errors


def good_call():
    return {
        "v": torch.zeros(4, 3),
        "base": torch.zeros(4, 3, dtype=torch.int16),
        "scale": torch.ones(4),
        "zero_point": torch.zeros(4, dtype=torch.int32),
        "qmin": -8,
        "qmax": 7,
        "axis": 0,
        "beta": 2.0,
    }


@every(cases.ADAROUND_ERRORS)
def test_errors_name_the_argument(case):
    assert_raises(case, adaround, good_call())


def test_errors_of_many_name_the_place():
    good = {k: [v, v] if torch.is_tensor(v) else v for k, v in good_call().items()}
    adaround_many(**good)
    for change, message in (
        ({"v": []}, "adaround_many: v must hold at least one tensor, got 0"),
        ({"scale": good["scale"][:1]}, "adaround_many: scale must have 2 tensors, got 1"),
        ({"qmax": [7, -9]}, "adaround_many: qmin must be <= qmax[1], both within 32766 of 0, got -8 and -9"),
        ({"scale": [torch.ones(4), torch.ones(3)]}, "adaround_many: scale[1] must have shape (1,) or (4,), got (3,)"),
        (
            {"v": [torch.zeros(4, 3), torch.zeros(4, 3).half()]},
            "adaround_many: v[1] must be torch.float32 as v[0] is, got torch.float16",
        ),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            adaround_many(**{**good, **change})
        assert str(raised.value) == message


# torch's machinery

# Not nan_inf: opcheck compares results by value, and NaN differs from itself.
OPCHECK = [
    "conv",
    "no_beta",
    "transposed",
    "per_tensor",
    "empty",
    "strided",
    "expanded",
    "channels_last",
    "fp16",
    "fp64",
]


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    case = CASE[name]
    torch.library.opcheck(torch.ops.zsq.adaround, (*case.lists(), False))
    torch.library.opcheck(torch.ops.zsq.adaround, (*case.lists()[:7], None, True))
    torch.library.opcheck(torch.ops.zsq.adaround_backward, case.backward_args())
    torch.library.opcheck(torch.ops.zsq.adaround_backward, (*case.backward_args()[:-1], False))


@pytest.mark.parametrize("learned", [("v",), ("v", "scale")])
@pytest.mark.parametrize("beta", [None, 3.0])
def test_compile_keeps_sums_and_decomposes_the_rest(beta, learned):
    case = CASE["channels_last"]
    v, base, scale, *rest = case.args()
    leaves = [t.requires_grad_() for name, t in (("v", v), ("scale", scale)) if name in learned]

    def loss(v, scale):
        # torch traces no autograd function that meets a tensor twice
        twice = ([t, t.clone()] for t in (v, base, scale, rest[0]))
        out = adaround_many(*twice, *rest[1:], beta=beta)
        (first, second), reg = out if beta is not None else (out, 0.0)
        return (first * second).sum() + reg

    with backend.backend("auto"):
        out, seen = compiled(loss, v, scale)
        got = torch.autograd.grad(out, leaves)
        expected = torch.autograd.grad(loss(v, scale), leaves)
    forward, backward = map(ours, seen)
    assert forward == ([] if beta is None else ["zsq.adaround.default"])
    assert backward == ([] if learned == ("v",) else ["zsq.adaround_backward.default"])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # another exponential


def test_compile_keeps_a_forced_backend_opaque(fast):
    name, device = fast
    v, base, scale, *rest = CASE["conv"].args(device)
    v.requires_grad_()
    with backend.backend(name):
        out, seen = compiled(lambda v: adaround(v, base, scale, *rest), v)
        (got,) = torch.autograd.grad(out.sum(), v)
        assert_same(out, adaround(v, base, scale, *rest))
        assert_same(got, torch.autograd.grad(adaround(v, base, scale, *rest).sum(), v)[0])
    assert ours(seen[0]) == ["zsq.adaround.default"]


class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        v, base, scale, zero_point, *_ = CASE["conv"].args()
        self.v, self.scale = torch.nn.Parameter(v), torch.nn.Parameter(scale)
        self.register_buffer("base", base)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x):
        w, reg = adaround(self.v, self.base, self.scale, self.zero_point, -8, 7, beta=2.0)
        return torch.nn.functional.conv2d(x, w), reg


def test_export_keeps_the_op():
    with torch.no_grad():
        assert_exports(Weight(), (torch.randn(2, 4, 5, 5),), (torch.randn(5, 4, 5, 5),), "adaround")


def test_meta_tensors_have_a_shape_and_no_values():
    v, base, scale, zero_point, *rest = (t.to("meta") if torch.is_tensor(t) else t for t in CASE["conv"].args())
    w_hat, reg = adaround(v, base, scale, zero_point, *rest, beta=2.0)
    assert (w_hat.device.type, w_hat.shape, reg.shape) == ("meta", v.shape, ())
    assert math.prod(reg.shape) == 1


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replays_with_new_contents(name):
    many = [list(part) for part in zip(*(case.args("cuda") for case in cases.BLOCK), strict=True)]
    beta = torch.tensor(20.0, device="cuda")

    def call():
        return torch.ops.zsq.adaround(*many[:6], 0, beta, False)

    def change():
        many[0][0].copy_(torch.randn_like(many[0][0]))
        beta.fill_(3.0)

    with backend.backend(name):
        assert_same(replayed(call, change), call())
