"""bn_act's extremes: bit for bit what channel_range finds in what bn_act yields, and asking changes nothing else.

Broken on purpose, each seen red, on the CPU

    NaN dropped by vector code, by scalar code            a_nan_anywhere; nan_inf
    NaN dropped, or half lost, where lanes are united     a_nan_anywhere, place 8 of a row; most cases
    the tail of a row lost, one of two chains lost        tail, expanded; relu
    a tile of rows that forgets the one before            blocks_channels_last
    the last chunk lost                                   pieces, and whatever has several samples
    the smallest of a chunk taken for its largest         most cases
    ends not rounded to what is stored                    bf16, ends_are_rounded
    a zero with a sign                                    a_zero_has_no_sign
    ends behind the quantizer                             quant_*
    ends before the activation, without the residual      relu; *_residual

and in Triton: NaN dropped (a_nan_anywhere), what lies outside a tensor counted (offset), ends not rounded (fp16), a
zero with a sign (a_zero_has_no_sign). A quantizer that takes the first channel's range for all: tests/test_fuse.py.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    assert_exports,
    assert_same,
    compiled,
    every,
    on_every_path,
    other_stream,
    ours,
    refused,
    replayed,
    skip_refused,
    unchanged,
)

from zsq_ext.ops import backend, bn_act, channel_range, cpu, fake_quant, reference
from zsq_ext.ops.cases import bn_act as cases


def asked(case):
    return replace(case, extremes=True)


CASES = [asked(case) for case in cases.BN_ACT if 0 not in case.shape]
CASE = {case.name: case for case in CASES}

pytestmark = pytest.mark.usefixtures("poison")


def op(case, device="cpu", **change):
    u, residual, layer, wanted = replace(case, **change).told(device, mask=case.saves_mask)
    return torch.ops.zsq.bn_act(u, residual, *wanted, *layer.flat)


# meaning


@every(CASES)
def test_reference_is_the_range_of_what_enters_the_quantizer(case):
    ends = reference.bn_act(*case.told())[4]
    v = reference.bn_act(*replace(case, quant=None).told())[0].to(case.compute)
    for i, row in enumerate(v.unbind(1)):
        assert_same(ends[:, i], torch.stack((row.min(), row.max())) + 0.0)


def test_what_is_returned():
    u = torch.tensor([[1.0, -1.0], [3.0, 5.0]])
    norm = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 1.0]), None, None, 0.0
    y, lo, hi = bn_act(u, *norm, extremes=True)
    assert (y.tolist(), lo.tolist(), hi.tolist()) == ([[0, -4], [1, 2]], [0, -4], [1, 2])
    _, s1, _, lo, hi = bn_act(u, *norm, act="relu", stats="batch", extremes=True)
    assert (s1.tolist(), lo.tolist(), hi.tolist()) == ([2, -2], [0, 0], [1, 2])


# parity


@every(CASES)
def test_every_backend_agrees_with_the_range_of_its_own_values(case, fast):
    """As channel_range finds it in y; y, sums and mask are those of a call that asks for no extremes."""
    name, device = fast
    if refused(fast, "bn_act", case.dtype, lambda: op(case, device)):
        return
    args = case.args(device)
    with backend.backend(name), unchanged(args):
        y, *_, lo, hi = bn_act(**args)
        whole, plain = op(case, device), op(case, device, extremes=False)
        v = bn_act(**{**args, "quant": None, "stats": None, "extremes": False})
        assert_same(plain[4], lo.new_empty(0))
    assert_same((lo, hi), [t.to(device) for t in reference.channel_range(v.cpu(), 1)])
    assert_same(whole[:4], plain[:4])
    assert_same((whole[0], *whole[4]), (y, lo, hi))
    if case.act != "silu":  # whose exponential is each backend's own
        assert_same(whole[4].cpu(), reference.bn_act(*case.told())[4])


@every([*CASES, *map(asked, cases.BN_ACT_LARGE)])
def test_the_scalar_path_and_any_number_of_threads(case):
    def ends():
        found, v = cpu.bn_act(*case.told())[4], cpu.bn_act(*replace(case, quant=None).told())[0]
        assert_same(tuple(found), reference.channel_range(v, 1))
        return () if case.act == "silu" else found  # whose exponential is each path's own

    on_every_path(ends)


@pytest.mark.parametrize("place", [0, 5, 7, 8, 15, 16, 31, 40])
@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_nan_anywhere_is_seen_and_stays(place, layout, quantized, fast):
    name, device = fast
    channels = 3 if layout == "row" else 21
    u = torch.arange(41.0).expand(channels, 41).clone()
    u[1:, place] = torch.nan
    u = (u[None] if layout == "row" else u.T.contiguous()).to(device)
    zero, one = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    grid = (one[:1], torch.zeros(1, dtype=torch.int32, device=device), 0, 15) if quantized else None
    with backend.backend(name):
        _, lo, hi = bn_act(u, zero, one, None, None, 0.0, act="relu6", quant=grid, extremes=True)
    assert lo.isnan().tolist() == hi.isnan().tolist() == [False] + [True] * (channels - 1)
    assert (lo[0].item(), hi[0].item()) == (0, 6)


def test_a_zero_has_no_sign(fast):
    name, device = fast
    for places in ((1, 20), (20, 1)):
        for act in ("none", "relu"):
            for first in (0.0, -0.0):
                u = torch.full(places, first, device=device)
                u.view(-1)[1::2] *= -1
                one = torch.ones(places[1], device=device)
                with backend.backend(name):
                    ends = bn_act(u, 0 * one, one, None, -0.0 * one, 0.0, act=act, extremes=True)[1:]
                assert not any(end.signbit().any() for end in ends)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["row", "column"])
def test_ends_are_rounded_as_values_are(dtype, layout, fast):
    """1/3 and its double are in neither type; 2^17 is beyond float16."""
    name, device = fast
    skip_refused(fast, "bn_act", dtype)
    u = (
        torch.tensor([1.0, 2.0, 0.0]).expand(2, 3)
        if layout == "row"
        else torch.tensor([[1.0], [2.0], [0.0]]).expand(3, 2)
    )
    u = (u[None] if layout == "row" else u).to(device, dtype)
    gamma, zero, one = torch.tensor([1 / 3, -65536.0]).to(device), torch.zeros(2).to(device), torch.ones(2).to(device)
    with backend.backend(name):
        _, lo, hi = bn_act(u, zero, one, gamma, None, 0.0, extremes=True)
    assert_same(torch.stack((lo, hi)).cpu(), torch.tensor([[0.0, -131072.0], [2 / 3, 0.0]]).to(dtype).float())


# gradients


@every([CASE[name] for name in ("relu", "relu6_residual", "silu_residual", "quant_relu_residual", "no_stats", "fp64")])
def test_gradients_are_those_of_a_call_without(case):
    args, grads, found = case.args(), [g for g in case.grads() if g is not None], []
    for extremes in (True, False):
        leaves = {
            k: args[k].detach().requires_grad_() for k in ("u", "gamma", "beta", "residual") if args[k] is not None
        }
        outs = bn_act(**{**args, **leaves, "extremes": extremes})
        outs = outs if isinstance(outs, tuple) else (outs,)
        assert [t.requires_grad for t in outs] == [True] * len(grads) + [False, False] * extremes
        found.append(torch.autograd.grad(outs[: len(grads)], list(leaves.values()), grads))
    assert_same(*found)


def test_no_gradient_where_none_is_wanted():
    args = CASE["relu_residual"].args()
    args["u"].requires_grad_()
    with torch.no_grad():
        assert not any(t.requires_grad for t in bn_act(**args))
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in bn_act(**args)} == {torch.float32}


# torch's machinery


@pytest.mark.parametrize(
    "name", ["relu", "no_stats_residual", "sample_channels_last", "strided", "fp16", "bf16_residual", "quant_relu"]
)
def test_opcheck(name):
    u, residual, layer, wanted = CASE[name].told(mask=CASE[name].saves_mask)
    torch.library.opcheck(torch.ops.zsq.bn_act, (u, residual, *wanted, *layer.flat))


@every([CASE[name] for name in ("no_stats", "relu6_channels_last", "quant_ste")])
def test_compile_keeps_the_reduction(case):
    args, grads = case.args(), [g for g in case.grads() if g is not None]

    def run(u):
        return bn_act(**{**args, "u": u})

    found = []
    for call in (lambda u: compiled(run, u), lambda u: (run(u), None)):
        u = args["u"].detach().requires_grad_()
        outs, graphs = call(u)
        found.append([*outs, *torch.autograd.grad(outs[: len(grads)], u, grads)])
        assert graphs is None or ours(graphs[0]) == ["zsq.bn_act.default"]
    assert_same(*found)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("mean", "var", "gamma", "beta"):
            self.register_buffer(name, torch.rand(3))

    def forward(self, u):
        y, lo, hi = bn_act(u, self.mean, self.var, self.gamma, self.beta, 1e-5, act="relu", extremes=True)
        return y, hi - lo


def test_export_keeps_the_op():
    assert_exports(Block(), (torch.randn(2, 3, 4),), (torch.randn(5, 3, 4),), "bn_act")


def test_meta_tensors_have_a_shape_and_no_values():
    u, c = torch.empty(2, 3, 5, dtype=torch.float16, device="meta"), torch.empty(3, device="meta")
    _, lo, hi = bn_act(u, c, c, None, c, 1e-5, extremes=True)
    assert (lo.device.type, lo.shape, hi.shape, lo.dtype) == ("meta", (3,), (3,), torch.float32)


# properties


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)),
    last=st.booleans(),
    act=st.sampled_from(["none", "relu", "relu6", "hardswish"]),  # silu's last bits depend on where an element lies
    cut=st.integers(1, 5),
)
def test_properties(seed, shape, last, act, cut):
    """What batches find unites, order does not show, and a quantizer clips nothing on the range that was found."""
    args = cases.BnActCase("", shape, act=act, stats=None, extremes=True).args(seed=seed)
    if last:
        args["u"] = args["u"].contiguous(memory_format=torch.channels_last)
    y, lo, hi = bn_act(**args)
    assert_same((lo, hi), channel_range(y, 1))
    assert_same(bn_act(**{**args, "u": args["u"].flip(0, 2, 3)})[1:], (lo, hi))
    parts = [bn_act(**{**args, "u": part})[1:] for part in (args["u"][:cut], args["u"][cut:]) if len(part)]
    los, his = map(torch.stack, zip(*parts, strict=True))
    assert_same((los.amin(0), his.amax(0)), (lo, hi))
    scale = ((hi.amax() - lo.amin()).clamp_min(1e-3) / 14)[None]
    zero_point = -(lo.amin() / scale).round().to(torch.int32)
    assert ((fake_quant(y, scale, zero_point, -1, 16) - y).abs() <= scale).all()


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replays_with_new_contents(name):
    case = CASE["relu_residual"]
    args, other = case.args("cuda"), case.args("cuda", seed=7)
    with backend.backend(name):
        found = replayed(lambda: bn_act(**args), lambda: args["u"].copy_(other["u"]))
    assert_same([t.cpu() for t in found[3:]], [t.cpu() for t in channel_range(found[0], 1)])
    assert_same(found[0].cpu(), reference.bn_act(args["u"], args["residual"], *case.told("cuda")[2:])[0].cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_runs_on_the_current_stream(name):
    args = CASE["threads"].args("cuda")
    with other_stream(), backend.backend(name):
        args["u"].mul_(2)
        y, *_, lo, hi = bn_act(**args)
        expected = reference.channel_range(y, 1)
    assert_same((lo, hi), expected)
