"""bn_act and channel_sums: what they mean, that every backend agrees, and how they behave under torch's machinery.

Broken on purpose on the CPU, each seen red: NaN through relu or relu6 turned into a bound, a gradient let through at
exactly 0 or at exactly 6, the residual's mask ignored, the mean not subtracted, the last partial sum of a channel lost,
one lane of eight lost, the residual added before b, half of the second sum's gradient, one sample's gradients of the
sums used for all.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from zsq_ext.ops import backend, bn_act, channel_sums, cpu, reference, statistics_of
from zsq_ext.ops.cases import bn_act as cases
from zsq_ext.ops.reference.bn_act import _normalised, _per_channel

ALL = pytest.mark.parametrize("case", cases.BN_ACT, ids=lambda case: case.name)
CASE = {case.name: case for case in cases.BN_ACT}

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


def assert_within(got, expected, slack):
    """NaN and infinities in the same places, and elsewhere no further apart than slack."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    got, expected = got.detach().cpu().double(), expected.double()
    finite = expected.isfinite()
    assert_same(got.masked_fill(finite, 0), expected.masked_fill(finite, 0))
    excess = (got - expected).abs() - torch.as_tensor(slack).double().nan_to_num(torch.inf)
    assert (excess[finite] <= 0).all(), f"beyond the tolerance by up to {excess[finite].max()}"


# How many numbers are added one after the other before a sum is widened to float64: 512 rows, or 4096 neighbours in 8
# lanes, and the lanes themselves. Each addition is off by half a unit in the last place of at most the sum of sizes.
CHAIN = 512 + 8


def slack_of_sum(terms, case, stats):
    """What a sum of these terms [N, C, ...] may be off by."""
    axes = list(range(2, terms.dim())) if stats == "sample" else [0, *range(2, terms.dim())]
    sizes = terms.double().abs()
    return CHAIN * torch.finfo(case.compute).eps / 2 * (sizes.sum(axes) if axes else sizes)


def before_activation(args):
    v, a, _ = _normalised(*(args[k] for k in ("u", "mean", "var", "gamma", "beta", "eps", "residual")))
    return v, _per_channel(a, args["u"])


def slack_of_silu(v, size, dtype):
    """What silu, or its slope, times `size` may be off by.

    The exponential of t is off by |t| half units from rounding its argument and by 2 units of its own; 4 operations
    follow. In the slope 1 - s is off by a unit of 1, times v. Near the overflow of the exponential, at 88, a result
    below 1e-35 may vanish. A 16-bit result may round the other way.
    """
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    info, size = torch.finfo(dtype), size.double().abs()
    slack = size * unit * (8 + 2 * v.double().abs()) + 1e-35 * (1 + size)
    return slack if info.bits > 16 else slack + size * info.eps + info.smallest_normal * info.eps


def op_args(args, save_mask):
    return *args.values(), save_mask


def backward_args(case, device="cpu"):
    """What bn_act_backward gets after a forward of the reference, all gradients wanted."""
    args = case.args()
    saves = case.residual and case.act in ("relu", "relu6")
    mask = reference.bn_act(*op_args(args, saves))[3] if saves else None
    grads = case.grads(device)
    args = case.args(device)
    residual = None if saves else args["residual"]
    rest = (args[k] for k in ("mean", "var", "gamma", "beta", "eps"))
    mask = None if mask is None else mask.to(device)
    return args["u"], *grads, *rest, residual, mask, case.act, True, case.residual, True


def strides_of(u):
    last = u.dim() > 2 and u.stride(1) == 1 and not u.is_contiguous()
    dense = torch.empty(u.shape, device="meta")
    return (dense.movedim(1, -1).contiguous().movedim(-1, 1) if last else dense).stride()


# meaning


@ALL
def test_reference_is_the_formula(case):
    args = case.args()
    kind = np.float64 if case.dtype == torch.float64 else np.float32
    shape = [1, -1, *[1] * (len(case.shape) - 2)]

    def wide(name):
        return args[name].to(case.compute).numpy()

    with np.errstate(all="ignore"):
        inv = kind(1) / np.sqrt(wide("var") + kind(args["eps"]))
        a = wide("gamma") * inv if case.affine else inv
        b = (wide("beta") if case.affine else kind(0)) - wide("mean") * a
        v = np.multiply(a.reshape(shape), wide("u")) + b.reshape(shape)
        if case.residual:
            v = v + wide("residual")
        y = {
            "none": lambda: v,
            "relu": lambda: np.where(v < 0, kind(0), v),
            "relu6": lambda: np.where(v < 0, kind(0), np.where(v > 6, kind(6), v)),
            "silu": lambda: v / (kind(1) + np.exp(-v)),
            "hardswish": lambda: v * np.clip(v + kind(3), 0, 6) * kind(1 / 6),
        }[case.act]()
        d = (wide("u") - wide("mean").reshape(shape)).astype(np.float64)
    got, s1, s2, mask = reference.bn_act(*op_args(args, False))
    y = torch.from_numpy(y).to(case.dtype)
    if case.act == "silu":
        assert_within(got, y, slack_of_silu(torch.from_numpy(v), y, case.dtype))
    else:
        assert_same(got, y)
    assert mask.numel() == 0
    if case.stats is not None:
        axes = tuple(range(2, d.ndim)) if case.stats == "sample" else (0, *range(2, d.ndim))
        d = torch.from_numpy(d)
        with np.errstate(all="ignore"):
            assert_within(s1, torch.from_numpy(d.numpy().sum(axes)).to(case.compute), slack_of_sum(d, case, case.stats))
            squares = torch.from_numpy((d.numpy() ** 2).sum(axes)).to(case.compute)
            assert_within(s2, squares, slack_of_sum(d.square(), case, case.stats))


def eager(u, mean, var, gamma, beta, eps, residual=None, act="none", stats=None):
    """What networks compute, with the statistics as hooks take them."""
    v = F.batch_norm(u, mean, var, gamma, beta, False, 0.0, eps)
    if residual is not None:
        v = v + residual
    acts = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
    y = acts.get(act, lambda v: v)(v)
    d = u - mean.view(1, -1, *[1] * (u.dim() - 2))
    axes = [0, *range(2, u.dim())] if stats == "batch" else list(range(2, u.dim()))
    return y if stats is None else (y, d.sum(axes), d.square().sum(axes))


def wide_args(case):
    """The case's arguments in float64, the floats among them as leaves that want a gradient."""
    args = {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in case.args().items()}
    leaves = [args[k].detach().requires_grad_() for k in ("u", "gamma", "beta", "residual") if args[k] is not None]
    args |= zip([k for k in ("u", "gamma", "beta", "residual") if args[k] is not None], leaves, strict=True)
    return args, leaves


EAGER = [f"{act}{tail}" for act in ("none", "relu", "relu6", "silu", "hardswish") for tail in ("", "_residual")]
EAGER += ["no_stats", "no_affine", "sample", "sample_residual", "tail_channels_last", "expanded", "permuted", "fp64"]
EAGER += ["relu_nan_inf"]  # relu6's gradient at NaN is another in torch's vector code than in its scalar code


@pytest.mark.parametrize("name", EAGER)
def test_gradients_are_those_of_the_plain_network(name):
    case = CASE[name]
    args, leaves = wide_args(case)
    grads = [g.double() for g in case.grads() if g is not None]

    def run(function):
        outs = function(**args)
        outs = outs if isinstance(outs, tuple) else (outs,)
        return outs, torch.autograd.grad(outs, leaves, grads)

    got, expected = run(bn_act), run(eager)
    for g, e in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        # the plain network rounds in another order: a handful of roundings, on sums of up to 1e3 terms
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_documented_example():
    u = torch.tensor([[1.0, -1.0], [3.0, 5.0]])
    mean, var = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 1.0])
    y, s1, s2 = bn_act(u, mean, var, None, None, 0.0, act="relu", stats="batch")
    assert y.tolist() == [[0, 0], [1, 2]]
    assert (s1.tolist(), s2.tolist()) == ([2, -2], [4, 20])
    data_mean, data_var = statistics_of(s1, s2, 2, mean)
    assert (data_mean.tolist(), data_var.tolist()) == ([2, 2], [1, 9])


def test_a_missing_affine_part_is_one_and_zero():
    args = CASE["none"].args()
    ones = {**args, "gamma": torch.ones(8), "beta": torch.zeros(8)}
    assert_same(bn_act(**{**args, "gamma": None, "beta": None})[0], bn_act(**ones)[0])


def test_edges_pass_no_gradient_and_nan_passes_it():
    u = torch.tensor([[-1.0, -0.0, 0.0, 1e-45, 3.0, 6.0, 6.0001, torch.nan]]).requires_grad_()
    zero, one = torch.zeros(8), torch.ones(8)
    passed = {"relu": [0, 0, 0, 1, 1, 1, 1, 1], "relu6": [0, 0, 0, 1, 1, 0, 0, 1]}
    for act, expected in passed.items():
        (alone,) = torch.autograd.grad(bn_act(u, zero, one, None, None, 0.0, act=act), u, torch.ones(1, 8))
        behind = bn_act(u, zero, one, None, None, 0.0, act=act, residual=torch.zeros(1, 8))
        assert alone.tolist()[0] == expected
        assert torch.autograd.grad(behind, u, torch.ones(1, 8))[0].tolist()[0] == expected


# parity


@ALL
def test_forward_agrees_with_the_reference(case, fast):
    name, device = fast
    args = case.args(device)
    if (reason := backend.reason_against(name, "bn_act", device, case.dtype)) is not None:
        with backend.backend(name), pytest.raises(NotImplementedError, match=reason):
            bn_act(**args)
        return
    copies = {k: t.clone() for k, t in args.items() if isinstance(t, torch.Tensor)}
    saves = case.act in ("relu", "relu6")
    with backend.backend(name):
        y, s1, s2, mask = torch.ops.zsq.bn_act(*op_args(args, saves))
    expected = reference.bn_act(*op_args(case.args(), saves))
    assert_forward(case, (y, s1, s2, mask), expected)
    assert y.stride() == strides_of(args["u"])
    for k, before in copies.items():
        assert torch.equal(before.nan_to_num(), args[k].nan_to_num()), f"{k} was modified"


def assert_forward(case, got, expected):
    args = case.args()
    y, s1, s2, mask = got
    if case.act == "silu":
        assert_within(y, expected[0], slack_of_silu(before_activation(args)[0], expected[0], case.dtype))
    else:
        assert_same(y, expected[0])
    assert_same(mask, expected[3])
    if case.stats is not None:
        d = args["u"].to(case.compute) - _per_channel(args["mean"], args["u"])
        assert_within(s1, expected[1], slack_of_sum(d, case, case.stats))
        assert_within(s2, expected[2], slack_of_sum(d.double().square(), case, case.stats))


@ALL
def test_backward_agrees_with_the_reference(case, fast):
    name, device = fast
    if backend.reason_against(name, "bn_act_backward", device, case.dtype) is not None:
        pytest.skip(f"{name} has no backward for {case.dtype}: the forward's test says so")
    with backend.backend(name):
        got = torch.ops.zsq.bn_act_backward(*backward_args(case, device))
    assert_backward(case, got)
    assert got[0].stride() == strides_of(case.args(device)["u"])


def assert_backward(case, got):
    expected = reference.bn_act_backward(*backward_args(case))
    args, (grad, _, _) = case.args(), case.grads()
    v, a = before_activation(args)
    size = 1 + v.double().abs()
    slack_g = slack_of_silu(v, grad.double() * size, case.dtype) if case.act == "silu" else None
    if slack_g is None:
        assert_same(got[0], expected[0])
        assert_same(got[1], expected[1])
    else:
        slack_u = slack_of_silu(v, a * grad.double() * size, case.dtype)
        # the sum with the statistics' term rounds once more
        assert_within(got[0], expected[0], slack_u + expected[0].double().abs() * torch.finfo(case.dtype).eps)
        assert_within(got[1], expected[1], slack_g if case.residual else 0)
    # Sums of g and of g * (u - mean), for which silu's slope has its slack too; the product with inv rounds once more.
    d = (args["u"].to(case.compute) - _per_channel(args["mean"], args["u"])).double()
    inv = (args["var"] + args["eps"]).rsqrt().double()
    g = grad.double() * (size if case.act in ("silu", "hardswish") else 1)
    own = torch.zeros_like(g) if slack_g is None else slack_g
    for sums, factor, scale in ((3, torch.ones_like(d), 1), (2, d, inv)):
        more = (own * factor.abs()).sum([0, *range(2, d.dim())])
        assert_within(got[sums], expected[sums], (slack_of_sum(g * factor, case, "batch") + more) * scale)


@pytest.fixture
def scalar():
    native = pytest.importorskip("zsq_ext._C")
    before = native.set_simd(False)
    yield
    native.set_simd(before)


@ALL
def test_scalar_path_agrees_with_the_reference(case, scalar):
    saves = case.act in ("relu", "relu6")
    assert_forward(case, cpu.bn_act(*op_args(case.args(), saves)), reference.bn_act(*op_args(case.args(), saves)))
    assert_backward(case, cpu.bn_act_backward(*backward_args(case)))


@pytest.mark.parametrize("simd", [True, False])
def test_silu_over_the_whole_range(simd):
    """Every exponent and sign: the vector code's own exponential, and where it overflows."""
    native = pytest.importorskip("zsq_ext._C")
    bits_ = torch.arange(0, 2**31 - 2**23, 65521, dtype=torch.int64).to(torch.int32)  # up to the infinities
    v = torch.cat([torch.linspace(-130, 130, 52001), bits_.view(torch.float32)])
    u = torch.cat([v, -v])[None, :, None].expand(1, -1, 8).movedim(1, 2).contiguous()
    zero, one = torch.zeros(8), torch.ones(8)
    args = u, zero, one, None, None, 0.0, None, "silu", None, False
    before = native.set_simd(simd)
    try:
        got = cpu.bn_act(*args)[0]
    finally:
        native.set_simd(before)
    exact = reference.bn_act(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))[0]
    assert_within(got, exact.float(), slack_of_silu(u, exact, torch.float32))


@ALL
def test_sums_alone_are_the_same(case, fast):
    name, device = fast
    args = case.args(device)
    if case.stats is None or backend.reason_against(name, "channel_sums", device, case.dtype) is not None:
        pytest.skip("no statistics, or none on this backend: the forward's test says so")
    grads = case.grads(device)[1:]
    with backend.backend(name):
        u = args["u"].requires_grad_()
        s1, s2 = channel_sums(u, args["mean"], case.stats)
        (du,) = torch.autograd.grad((s1, s2), u, grads)
        with_y = torch.ops.zsq.bn_act(*op_args(args, False))
    assert_same(s1, with_y[1])
    assert_same(s2, with_y[2])
    assert_same(du, reference.channel_sums_backward(case.args()["u"], case.args()["mean"], *case.grads()[1:]))
    assert du.stride() == strides_of(args["u"])


def test_a_backend_repeats_its_bits(fast):
    name, device = fast
    for case in (CASE["pieces"], CASE["pieces_channels_last"]):
        if backend.reason_against(name, "bn_act", device, case.dtype) is not None:
            pytest.skip(f"{name} has no bn_act: the forward's test says so")
        with backend.backend(name):
            first = torch.ops.zsq.bn_act(*op_args(case.args(device), True))
            again = torch.ops.zsq.bn_act(*op_args(case.args(device), True))
            for a, b in zip(first, again, strict=True):
                assert_same(a, b.cpu())


@pytest.mark.parametrize("name", ["threads", "threads_channels_last", "tail", "pieces_sample"])
def test_any_number_of_threads_gives_the_same_bits(name):
    case, found = CASE[name], []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            with backend.backend("auto"):
                forward = torch.ops.zsq.bn_act(*op_args(case.args(), True))
                found.append([*forward, *torch.ops.zsq.bn_act_backward(*backward_args(case))])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same(a, b)


# gradients


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu", "hardswish"])
@pytest.mark.parametrize("stats", [None, "batch", "sample"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(act, stats, layout):
    case = cases.BnActCase("", (2, 3, 2, 2), torch.float64, act, stats, residual=True, layout=layout)
    args = case.args()
    names = [k for k in ("u", "gamma", "beta", "residual") if args[k] is not None]
    leaves = [args[k].clone().requires_grad_() for k in names]
    torch.autograd.gradcheck(lambda *t: bn_act(**{**args, **dict(zip(names, t, strict=True))}), leaves)


def test_gradcheck_of_sums():
    u = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(3, dtype=torch.float64)
    for stats in ("batch", "sample"):
        torch.autograd.gradcheck(lambda u, stats=stats: channel_sums(u, mean, stats), u)


@pytest.mark.parametrize("wanted", [("u",), ("gamma",), ("beta",), ("residual",), ("u", "beta"), ("gamma", "residual")])
@pytest.mark.parametrize("act", ["none", "relu6"])
def test_only_what_is_wanted_is_computed(wanted, act, monkeypatch):
    asked = []
    monkeypatch.setattr(reference, "bn_act_backward", _spy(asked, reference.bn_act_backward))
    backend.find.cache_clear()
    args = {**CASE["relu_residual"].args(), "act": act}
    args |= {k: args[k].clone().requires_grad_() for k in wanted}
    with backend.backend("reference"):
        outs = bn_act(**args)
        got = torch.autograd.grad(outs, [args[k] for k in wanted], CASE["relu_residual"].grads())
    everything = {k: t.clone().requires_grad_() for k, t in args.items() if k in ("u", "gamma", "beta", "residual")}
    expected = torch.autograd.grad(
        bn_act(**{**args, **everything}), [everything[k] for k in wanted], CASE["relu_residual"].grads()
    )
    for k, g, e in zip(wanted, got, expected, strict=True):
        (assert_same if k in ("u", "residual") else torch.testing.assert_close)(g, e)
    backend.find.cache_clear()
    # without an activation the residual's gradient is y's: nothing writes it again
    assert asked[0] == ("u" in wanted, "residual" in wanted and act != "none", bool({"gamma", "beta"} & set(wanted)))


def _spy(asked, function):
    def run(*args):
        asked.append(args[-3:])
        return function(*args)

    return run


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_a_loss_may_use_any_of_the_outputs(which):
    case = CASE["relu6_residual"]
    args, leaves = wide_args(case)
    grads = [g.double() for g in case.grads()]

    def run(function):
        outs = function(**args)
        got = torch.autograd.grad([outs[i] for i in which], leaves, [grads[i] for i in which], allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(got, leaves, strict=True)]

    for got, expected in zip(run(bn_act), run(eager), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("act", "residual", "tensors", "bytes_"),
    [("relu", False, 5, 0), ("relu", True, 6, 4 * 8 * 5), ("silu", False, 5, 0), ("silu", True, 6, 4 * 8 * 36 * 4)],
)
def test_what_is_saved(act, residual, tensors, bytes_):
    args = {**CASE["relu_residual"].args(), "act": act}
    u = args["u"].requires_grad_()
    residual = args["residual"] if residual else None
    y, _, _ = bn_act(**{**args, "residual": residual})
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert len(saved) == tensors
    assert saved[0] is u
    # beyond u and the parameters: one bit per element, a byte for each started 8 of a row of 36; or the residual itself
    assert sum(t.nbytes for t in saved[5:]) == bytes_
    assert act == "relu" or residual is None or saved[5] is residual


def test_double_backward_is_refused():
    args = CASE["silu_residual"].args()
    u = args["u"].requires_grad_()
    (first,) = torch.autograd.grad(bn_act(**args)[0].sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^bn_act: a gradient must be taken once"):
        first.sum().backward()
    s1, s2 = channel_sums(u, args["mean"])
    (first,) = torch.autograd.grad(s1.sum() + s2.sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^channel_sums: a gradient must be taken once"):
        first.sum().backward()


def test_no_gradient_where_none_is_wanted():
    args = CASE["relu_residual"].args()
    assert not any(t.requires_grad for t in bn_act(**args))
    args["u"].requires_grad_()
    with torch.no_grad():
        assert not any(t.requires_grad for t in bn_act(**args))
        assert not any(t.requires_grad for t in channel_sums(args["u"], args["mean"]))


def test_autocast_keeps_the_dtype():
    args = CASE["relu"].args()
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in bn_act(**args)} == {torch.float32}


# errors


@pytest.mark.parametrize("case", cases.BN_ACT_ERRORS, ids=lambda case: case.name)
def test_errors_name_the_argument(case):
    good = dict.fromkeys(("mean", "var", "gamma", "beta"), torch.ones(4))
    good |= {"u": torch.zeros(2, 4, 3), "eps": 1e-5, "residual": torch.zeros(2, 4, 3), "act": "relu", "stats": "batch"}
    bn_act(**good)
    with pytest.raises(case.error) as raised:
        bn_act(**{**good, **case.change})
    assert str(raised.value) == case.message


@pytest.mark.parametrize("case", cases.CHANNEL_SUMS_ERRORS, ids=lambda case: case.name)
def test_errors_of_sums_name_the_argument(case):
    good = {"u": torch.zeros(2, 4, 3), "mean": torch.zeros(4), "stats": "sample"}
    channel_sums(**good)
    with pytest.raises(case.error) as raised:
        channel_sums(**{**good, **case.change})
    assert str(raised.value) == case.message


def test_a_count_is_positive():
    with pytest.raises(ValueError, match=r"^statistics_of: count must be > 0, got 0$"):
        statistics_of(torch.zeros(3), torch.zeros(3), 0, torch.zeros(3))


# properties


def _problem(seed, n=6, c=3, places=5):
    rng = torch.Generator().manual_seed(seed)
    u = torch.randn(n, c, places, generator=rng, dtype=torch.float64)
    mean, var = (
        torch.randn(c, generator=rng, dtype=torch.float64),
        torch.rand(c, generator=rng, dtype=torch.float64) + 1,
    )
    return u, mean, var


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), cut=st.integers(0, 6), channels_last=st.booleans())
def test_sums_add_over_splits_of_the_batch(seed, cut, channels_last):
    u, mean, _ = _problem(seed)
    u = u.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else u
    whole = channel_sums(u, mean)
    parts = [channel_sums(part, mean) for part in (u[:cut], u[cut:])]
    each = channel_sums(u, mean, "sample")
    for i in range(2):
        torch.testing.assert_close(parts[0][i] + parts[1][i], whole[i], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(each[i].sum(0), whole[i], rtol=1e-13, atol=1e-13)
    data_mean, data_var = statistics_of(*whole, 30, mean)
    torch.testing.assert_close(data_mean, u.mean((0, 2)), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(data_var, u.var((0, 2), correction=0), rtol=1e-13, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), act=st.sampled_from(["none", "relu", "relu6", "silu", "hardswish"]))
def test_samples_may_change_places(seed, act):
    u, mean, var = _problem(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    here = bn_act(u, mean, var, None, None, 1e-5, act=act, stats="sample")
    there = bn_act(u[order], mean, var, None, None, 1e-5, act=act, stats="sample")
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a[order], b, rtol=1e-13, atol=1e-13)


def _gradient(loss, *inputs):
    inputs = [u.clone().requires_grad_() for u in inputs]
    return torch.autograd.grad(loss(*inputs), inputs)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_published_losses_have_their_closed_forms(seed):
    """The gradients of kernels' three statistics losses, written out, against autograd through S1 and S2."""
    u, mu, var = _problem(seed)
    other = _problem(seed + 1)[0]
    sig, c, n = var.sqrt(), 3, 30
    exact = {"rtol": 1e-12, "atol": 1e-12}

    def wide(t):
        return t[None, :, None]

    def mean_var(u):  # SynQ, HAST, GDFQ: mean over channels
        m, v = statistics_of(*channel_sums(u, mu), n, mu)
        return F.mse_loss(m, mu) + F.mse_loss(v, var)

    m, v = u.mean((0, 2)), u.var((0, 2), correction=0)
    k = 2 / (c * n)
    written = wide(k * ((m - mu) - 2 * (v - var) * m)) + wide(2 * k * (v - var)) * u
    torch.testing.assert_close(_gradient(mean_var, u)[0], written, **exact)

    def mean_std(u):  # Genie: the unbiased deviation
        m, v = statistics_of(*channel_sums(u, mu), n, mu)
        return F.mse_loss(m, mu) + F.mse_loss((v * n / (n - 1)).sqrt(), sig)

    std = u.std((0, 2))
    written = 2 / c * wide((m - mu) / n) + 2 / c * wide((std - sig) / ((n - 1) * std)) * (u - wide(m))
    torch.testing.assert_close(_gradient(mean_std, u)[0], written, **exact)

    def whole_set(*batches, k=10.0):  # DGH: the sums of all batches
        s1, s2 = (sum(parts) for parts in zip(*(channel_sums(u, mu) for u in batches), strict=True))
        m, v = statistics_of(s1, s2, 2 * n, mu)
        return F.mse_loss(m, mu) + k * F.mse_loss(v.sqrt(), sig)

    both = torch.cat([u, other])
    m, std = both.mean((0, 2)), both.var((0, 2), correction=0).sqrt()
    for batch, got in zip((u, other), _gradient(whole_set, u, other), strict=True):
        inner = wide(m - mu) + wide(10 * (std - sig) / std) * (batch - wide(m))
        torch.testing.assert_close(got, 2 / (c * 2 * n) * inner, **exact)


# torch's machinery

# Not nan_inf: opcheck compares results by value, and NaN differs from itself.
OPCHECK = ["relu", "no_stats_residual", "no_affine", "sample_channels_last", "empty", "strided", "expanded", "permuted"]
OPCHECK += ["tail_channels_last", "fp16", "bf16_residual", "fp64", "silu_residual"]


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    case = CASE[name]
    args = case.args()
    torch.library.opcheck(torch.ops.zsq.bn_act, op_args(args, case.act in ("relu", "relu6")))
    torch.library.opcheck(torch.ops.zsq.bn_act_backward, backward_args(case))
    if case.stats is not None:
        torch.library.opcheck(torch.ops.zsq.channel_sums, (args["u"], args["mean"], case.stats))
        torch.library.opcheck(torch.ops.zsq.channel_sums_backward, (args["u"], args["mean"], *case.grads()[1:]))


def _graph_of(function, *args):
    """Compiles without generating code, and gives the result with the operators of the forward's graph."""
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()

    return torch.compile(function, backend=aot_autograd(fw_compiler=look), fullgraph=True)(*args), seen


@pytest.mark.parametrize(
    "name", ["relu_residual", "relu6_channels_last", "silu", "bf16_residual", "sample", "no_stats"]
)
def test_compile_keeps_reductions_and_decomposes_the_rest(name):
    case = CASE[name]
    args, (grad, *sums) = case.args(), case.grads()
    outs = {}
    for compiled in (True, False):
        u = args["u"].detach().requires_grad_()

        def run(u):
            return bn_act(**{**args, "u": u})

        with backend.backend("auto"):
            out, ops = _graph_of(run, u) if compiled else (run(u), None)
        out = out if isinstance(out, tuple) else (out,)
        outs[compiled] = *out, *torch.autograd.grad(out, u, [grad, *(g for g in sums if g is not None)])
        if compiled:
            assert any("zsq.bn_act" in op for op in ops) == (case.stats is not None)
    for a, b in zip(outs[True], outs[False], strict=True):
        if case.act == "silu":
            torch.testing.assert_close(a, b)
        else:
            assert_same(a, b)


def test_compile_keeps_a_forced_backend_opaque(fast):
    name, device = fast
    case = CASE["no_stats_residual"]
    if backend.reason_against(name, "bn_act", device, case.dtype) is not None:
        pytest.skip(f"{name} has no bn_act: the forward's test says so")
    args = case.args(device)
    u = args["u"].requires_grad_()
    with backend.backend(name):
        out, ops = _graph_of(lambda u: bn_act(**{**args, "u": u}), u)
        (got,) = torch.autograd.grad(out, u, case.grads(device)[0])
    assert any("zsq.bn_act" in op for op in ops)
    assert_same(out, reference.bn_act(*op_args(case.args(), False))[0])
    assert_same(got, reference.bn_act_backward(*backward_args(case))[0])


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("mean", "var", "gamma", "beta"):
            self.register_buffer(name, torch.rand(3))

    def forward(self, u, r):
        y, s1, s2 = bn_act(u, self.mean, self.var, self.gamma, self.beta, 1e-5, residual=r, act="relu", stats="batch")
        return y, *statistics_of(s1, s2, u.numel() // 3, self.mean), *channel_sums(y, self.mean, "sample")


def test_export_keeps_the_op():
    block = Block()
    pair = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(block, pair, dynamic_shapes=(batch, batch))
    assert "zsq.bn_act" in str(program.graph)
    assert "zsq.channel_sums" in str(program.graph)
    more = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    for a, b in zip(program.module()(*more), block(*more), strict=True):
        assert_same(a, b)


def test_meta_tensors_have_a_shape_and_no_values():
    u, c = torch.empty(2, 3, 5, device="meta"), torch.empty(3, device="meta")
    y, s1, s2 = bn_act(u, c, c, None, c, 1e-5, act="relu", stats="sample")
    assert (y.device.type, y.shape, s1.shape, s2.shape) == ("meta", u.shape, (2, 3), (2, 3))


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replays_with_new_contents(name):
    case = CASE["relu_residual"]
    args = case.args("cuda")
    with backend.backend(name):
        bn_act(**args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = bn_act(**args)
    args["u"].copy_(case.args("cuda", seed=7)["u"])
    graph.replay()
    assert_same(out[0], reference.bn_act(*op_args(args, False))[0].cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_more_than_2_31_elements(name):
    n = 2**31 + 3 * 1024
    u = torch.zeros(1, 3, n // 3, dtype=torch.float16, device="cuda")
    u[..., -5:] = torch.tensor([0.24, -0.26, 9.0, -9.0, 1.0], dtype=torch.float16)
    zero, one = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    with backend.backend(name):
        y, s1, _ = bn_act(u, zero, one, None, None, 0.0, act="relu6", stats="batch")
    assert y[..., -5:].float().tolist()[0][2] == pytest.approx([0.24, 0, 6, 0, 1], abs=1e-3)
    assert s1.tolist() == pytest.approx([0.98] * 3, abs=1e-2)
    assert not y[..., :-5].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_runs_on_the_current_stream(name):
    case = CASE["threads"]
    args = case.args("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), backend.backend(name):
        torch.cuda._sleep(20_000_000)  # were a kernel on another stream, it would read u before the next line
        args["u"].mul_(2)
        out = bn_act(**args)
    stream.synchronize()
    assert_same(out[0], reference.bn_act(*op_args(args, False))[0].cpu())
