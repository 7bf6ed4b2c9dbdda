"""bn_act and channel_sums: gradients, and the properties of the sums."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_same

from zsq_ext.ops import backend, bn_act, channel_energy, channel_sums, reference, statistics_of
from zsq_ext.ops.cases import bn_act as cases

CASE = {case.name: case for case in cases.BN_ACT}

pytestmark = pytest.mark.usefixtures("poison")


def eager(
    u, mean, var, gamma, beta, eps, residual=None, act="none", quant=None, quant_grad="ste", stats=None, extremes=False
):
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
        asked.append(tuple(args[-1]))
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
    assert sum(t.nbytes for t in saved if t.numel() > 8) - u.nbytes == bytes_
    assert act == "relu" or residual is None or saved[1] is residual


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


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("stats", ["batch", "sample"])
def test_energy_is_the_mean_square_of_what_a_batch_norm_yields(affine, stats):
    u, mean, var = _problem(3)
    gamma, beta = (torch.randn_like(mean), torch.randn_like(mean)) if affine else (None, None)
    leaves = [t.clone().requires_grad_() for t in (u, gamma, beta) if t is not None]
    axes, count = ((0, 2), 30) if stats == "batch" else (2, 5)
    found = []
    for direct in (True, False):
        u, gamma, beta = leaves if affine else (*leaves, None, None)
        y, *sums = bn_act(u, mean, var, gamma, beta, 1e-5, stats=stats)
        energy = y.square().mean(axes) if direct else channel_energy(*sums, count, var, gamma, beta, 1e-5)
        found.append([energy, *torch.autograd.grad((energy * torch.arange(3.0)).sum(), leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_energy_counts_something():
    with pytest.raises(ValueError, match=r"^channel_energy: count must be > 0, got 0$"):
        channel_energy(torch.zeros(3), torch.zeros(3), 0, torch.ones(3), None, None, 0.0)
