"""bn_act and channel_sums: what they mean, and that every backend agrees.

Broken on purpose on the CPU, each seen red: NaN through relu or relu6 turned into a bound, a gradient let through at
exactly 0 or at exactly 6, the residual's mask ignored, the mean not subtracted, the last partial sum of a channel lost,
one lane of eight lost, the residual added before b, half of the second sum's gradient, one sample's gradients of the
sums used for all. Of the quantizer inside: what enters it not rounded to 16 bits
(fp16_ties, bf16_ties), its clip left out of the mask (37 cases) or of the backward without one (24), one channel's grid
for eight (9).
"""

import numpy as np
import pytest
import torch
from parity import (
    assert_same,
    assert_within,
    every,
    other_stream,
    path,
    refused,
    replayed,
    skip_refused,
    strides_like,
    unchanged,
)

from zsq_ext.ops import backend, bn_act, channel_sums, cpu, fake_quant, reference, statistics_of
from zsq_ext.ops.bn_act_spec import Layer, Norm, Outputs
from zsq_ext.ops.cases import bn_act as cases
from zsq_ext.ops.reference.bn_act import _normalised, _per_channel

ALL = every(cases.BN_ACT)
CASE = {case.name: case for case in cases.BN_ACT}

pytestmark = pytest.mark.usefixtures("poison")


def near(got, expected, slack):
    assert got.dtype == expected.dtype
    assert_within(got, expected, slack)


# How many numbers are added one after the other before a sum is widened to float64: 512 rows, or 4096 neighbours in 8
# lanes, and the lanes themselves. Each addition is off by half a unit in the last place of at most the sum of sizes.
CHAIN = 512 + 8


def slack_of_sum(terms, case, stats):
    """What a sum of these terms [N, C, ...] may be off by."""
    axes = list(range(2, terms.dim())) if stats == "sample" else [0, *range(2, terms.dim())]
    sizes = terms.double().abs()
    return CHAIN * torch.finfo(case.compute).eps / 2 * (sizes.sum(axes) if axes else sizes)


def before_activation(case):
    u, residual, layer, _ = case.told()
    v, a, _ = _normalised(u, residual, layer.norm)
    return v, _per_channel(a, u)


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


def op(u, residual, layer, wanted):
    return torch.ops.zsq.bn_act(u, residual, *wanted, *layer.flat)


def op_backward(u, residual, mask, grads, layer, needs):
    return torch.ops.zsq.bn_act_backward(u, residual, mask, *grads, *needs, *layer.flat)


def backward_args(case, device="cpu"):
    """What bn_act_backward gets after a forward of the reference, all gradients wanted."""
    mask = reference.bn_act(*case.told(mask=True))[3].to(device) if case.saves_mask else None
    return case.told_backward(mask, device)


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
    got, s1, s2, mask, _ = reference.bn_act(*case.told())
    y = torch.from_numpy(y).to(case.dtype)
    if case.quant is not None:
        scale, zero_point, qmin, qmax = args["quant"]
        scale, zero_point = (
            t.to(case.compute).numpy().reshape(-1 if len(t) == 1 else shape) for t in (scale, zero_point)
        )
        with np.errstate(all="ignore"):
            code = np.clip(np.rint(y.to(case.compute).numpy() / scale) + zero_point, qmin, qmax)
        y = torch.from_numpy((code - zero_point) * scale).to(case.dtype)
    if case.act == "silu" and case.quant is None:
        near(got, y, slack_of_silu(torch.from_numpy(v), y, case.dtype))
    else:
        assert_same(got, y)
    assert mask.numel() == 0
    if case.stats is not None:
        axes = tuple(range(2, d.ndim)) if case.stats == "sample" else (0, *range(2, d.ndim))
        d = torch.from_numpy(d)
        with np.errstate(all="ignore"):
            near(s1, torch.from_numpy(d.numpy().sum(axes)).to(case.compute), slack_of_sum(d, case, case.stats))
            squares = torch.from_numpy((d.numpy() ** 2).sum(axes)).to(case.compute)
            near(s2, squares, slack_of_sum(d.square(), case, case.stats))


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


@every([case for case in cases.BN_ACT if case.quant])
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_a_quantizer_inside_is_fake_quant_behind(case, name):
    """The same bits of the value, of u's gradient and of the residual's."""
    if backend.reason_against(name, "bn_act", "cpu", case.dtype) is not None:
        pytest.skip(f"{name} does not run it here: the parity test says so")
    args, grads, found = case.args(), [g for g in case.grads() if g is not None], []
    for inside in (True, False):
        leaves = {k: args[k].detach().requires_grad_() for k in ("u", "residual") if args[k] is not None}
        with backend.backend(name):
            if inside:
                out = bn_act(**{**args, **leaves})
                y, *sums = out if isinstance(out, tuple) else (out,)
            else:
                out = bn_act(**{**args, **leaves, "quant": None})
                y, *sums = out if isinstance(out, tuple) else (out,)
                y = fake_quant(y, *args["quant"], axis=1, grad=case.quant_grad)
            found.append([y, *torch.autograd.grad((y, *sums), list(leaves.values()), grads)])
    assert_same(*found)


# parity


@ALL
def test_forward_agrees_with_the_reference(case, fast):
    name, device = fast
    told = case.told(device, mask=has_bits(case))
    if refused(fast, "bn_act", case.dtype, lambda: op(*told)):
        return
    with backend.backend(name), unchanged(told):
        got = op(*told)
    assert_forward(case, got, reference.bn_act(*case.told(mask=has_bits(case))))
    assert got[0].stride() == strides_like(told[0])


def has_bits(case):
    return case.told()[2].clips or case.act in ("relu", "relu6")


def assert_forward(case, got, expected):
    args = case.args()
    y, s1, s2, mask, _ = got
    if case.act == "silu" and case.quant is None:
        near(y, expected[0], slack_of_silu(before_activation(case)[0], expected[0], case.dtype))
    else:
        assert_same(y, expected[0])
    assert_same(mask, expected[3])
    if case.stats is not None:
        d = args["u"].to(case.compute) - _per_channel(args["mean"], args["u"])
        near(s1, expected[1], slack_of_sum(d, case, case.stats))
        near(s2, expected[2], slack_of_sum(d.double().square(), case, case.stats))


@ALL
def test_backward_agrees_with_the_reference(case, fast):
    name, device = fast
    skip_refused(fast, "bn_act_backward", case.dtype)
    with backend.backend(name):
        got = op_backward(*backward_args(case, device))
    assert_backward(case, got)
    assert got[0].stride() == strides_like(case.args(device)["u"])


def assert_backward(case, got):
    expected = reference.bn_act_backward(*backward_args(case))
    args, (grad, _, _) = case.args(), case.grads()
    v, a = before_activation(case)
    size = 1 + v.double().abs()
    slack_g = slack_of_silu(v, grad.double() * size, case.dtype) if case.act == "silu" else None
    if slack_g is None:
        assert_same(got[0], expected[0])
        assert_same(got[1], expected[1])
    else:
        slack_u = slack_of_silu(v, a * grad.double() * size, case.dtype)
        # the sum with the statistics' term rounds once more
        near(got[0], expected[0], slack_u + expected[0].double().abs() * torch.finfo(case.dtype).eps)
        near(got[1], expected[1], slack_g if case.residual else 0)
    # Sums of g and of g * (u - mean), for which silu's slope has its slack too; the product with inv rounds once more.
    d = (args["u"].to(case.compute) - _per_channel(args["mean"], args["u"])).double()
    inv = (args["var"] + args["eps"]).rsqrt().double()
    g = grad.double() * (size if case.act in ("silu", "hardswish") else 1)
    own = torch.zeros_like(g) if slack_g is None else slack_g
    for sums, factor, scale in ((3, torch.ones_like(d), 1), (2, d, inv)):
        more = (own * factor.abs()).sum([0, *range(2, d.dim())])
        near(got[sums], expected[sums], (slack_of_sum(g * factor, case, "batch") + more) * scale)


@ALL
def test_scalar_path_agrees_with_the_reference(case, scalar):
    told = case.told(mask=has_bits(case))
    assert_forward(case, cpu.bn_act(*told), reference.bn_act(*told))
    assert_backward(case, cpu.bn_act_backward(*backward_args(case)))


@every(cases.BN_ACT_LARGE)
def test_large_results_agree_with_the_reference(case):
    pytest.importorskip("zsq_ext._C")
    told = case.told(mask=case.saves_mask)
    assert_forward(case, cpu.bn_act(*told), reference.bn_act(*told))
    assert_backward(case, cpu.bn_act_backward(*backward_args(case)))


@pytest.mark.parametrize("simd", [True, False])
def test_silu_over_the_whole_range(simd):
    """Every exponent and sign: the vector code's own exponential, and where it overflows."""
    bits_ = torch.arange(0, 2**31 - 2**23, 65521, dtype=torch.int64).to(torch.int32)  # up to the infinities
    v = torch.cat([torch.linspace(-130, 130, 52001), bits_.view(torch.float32)])
    u = torch.cat([v, -v])[None, :, None].expand(1, -1, 8).movedim(1, 2).contiguous()
    zero, one = torch.zeros(8), torch.ones(8)
    layer = Layer(Norm(zero, one), "silu")
    with path(simd):
        got = cpu.bn_act(u, None, layer, Outputs())[0]
    wide = Layer(Norm(zero.double(), one.double()), "silu")
    exact = reference.bn_act(u.double(), None, wide, Outputs())[0]
    near(got, exact.float(), slack_of_silu(u, exact, torch.float32))


@ALL
def test_sums_alone_are_the_same(case, fast):
    name, device = fast
    args = case.args(device)
    if case.stats is None:
        pytest.skip("no statistics")
    skip_refused(fast, "channel_sums", case.dtype)
    grads = case.grads(device)[1:]
    with backend.backend(name):
        u = args["u"].requires_grad_()
        s1, s2 = channel_sums(u, args["mean"], case.stats)
        (du,) = torch.autograd.grad((s1, s2), u, grads)
        with_y = op(*case.told(device))
    assert_same(s1, with_y[1])
    assert_same(s2, with_y[2])
    assert_same(du, reference.channel_sums_backward(case.args()["u"], case.args()["mean"], *case.grads()[1:]))
    assert du.stride() == strides_like(args["u"])


def test_a_backend_repeats_its_bits(fast):
    name, device = fast
    for case in (CASE["pieces"], CASE["pieces_channels_last"]):
        skip_refused(fast, "bn_act", case.dtype)
        with backend.backend(name):
            assert_same(op(*case.told(device, mask=True)), op(*case.told(device, mask=True)))


@pytest.mark.parametrize("name", ["threads", "threads_channels_last", "tail", "pieces_sample", "quant_threads"])
def test_any_number_of_threads_gives_the_same_bits(name):
    case, found = CASE[name], []
    for threads in (1, 2, 5):
        with path(threads=threads), backend.backend("auto"):
            found.append([*op(*case.told(mask=True)), *op_backward(*backward_args(case))])
    for other in found[1:]:
        assert_same(other, found[0])


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replays_with_new_contents(name):
    case = CASE["relu_residual"]
    args, other = case.args("cuda"), case.args("cuda", seed=7)
    with backend.backend(name):
        out = replayed(lambda: bn_act(**args), lambda: args["u"].copy_(other["u"]))
    assert_same(out[0], reference.bn_act(args["u"], args["residual"], case.told("cuda")[2], Outputs("batch"))[0].cpu())


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
    with other_stream(), backend.backend(name):
        args["u"].mul_(2)
        out = bn_act(**args)
    assert_same(out[0], reference.bn_act(args["u"], args["residual"], case.told("cuda")[2], Outputs("batch"))[0].cpu())
