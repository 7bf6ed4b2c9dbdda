"""bn_act and channel_sums: errors, and how they behave under torch's machinery."""

import pytest
import torch
from parity import assert_exports, assert_raises, assert_same, compiled, every, ours, skip_refused

from zsq_ext.ops import backend, bn_act, channel_sums, reference, statistics_of
from zsq_ext.ops.cases import bn_act as cases
from zsq_ext.ops.cases.bn_act_errors import BN_ACT_ERRORS, CHANNEL_SUMS_ERRORS

CASE = {case.name: case for case in cases.BN_ACT}

pytestmark = pytest.mark.usefixtures("poison")


def op_args(case, mask=False):
    u, residual, layer, wanted = case.told(mask=mask)
    return u, residual, *wanted, *layer.flat


def op_backward_args(case):
    mask = reference.bn_act(*case.told(mask=True))[3] if case.saves_mask else None
    u, residual, mask, grads, layer, needs = case.told_backward(mask)
    return u, residual, mask, *grads, *needs, *layer.flat


# errors


@every(BN_ACT_ERRORS)
def test_errors_name_the_argument(case):
    good = dict.fromkeys(("mean", "var", "gamma", "beta"), torch.ones(4))
    good |= {"u": torch.zeros(2, 4, 3), "eps": 1e-5, "residual": torch.zeros(2, 4, 3), "act": "relu", "stats": "batch"}
    assert_raises(case, bn_act, good)


@every(CHANNEL_SUMS_ERRORS)
def test_errors_of_sums_name_the_argument(case):
    assert_raises(case, channel_sums, {"u": torch.zeros(2, 4, 3), "mean": torch.zeros(4), "stats": "sample"})


def test_a_count_is_positive():
    with pytest.raises(ValueError, match=r"^statistics_of: count must be > 0, got 0$"):
        statistics_of(torch.zeros(3), torch.zeros(3), 0, torch.zeros(3))


# torch's machinery

# Not nan_inf: opcheck compares results by value, and NaN differs from itself.
OPCHECK = ["relu", "no_stats_residual", "no_affine", "sample_channels_last", "empty", "strided", "expanded", "permuted"]
OPCHECK += ["tail_channels_last", "fp16", "bf16_residual", "fp64", "silu_residual", "quant_relu", "quant_channels_last"]


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    case = CASE[name]
    args = case.args()
    torch.library.opcheck(torch.ops.zsq.bn_act, op_args(case, mask=case.saves_mask))
    torch.library.opcheck(torch.ops.zsq.bn_act_backward, op_backward_args(case))
    if case.stats is not None:
        torch.library.opcheck(torch.ops.zsq.channel_sums, (args["u"], args["mean"], case.stats))
        torch.library.opcheck(torch.ops.zsq.channel_sums_backward, (args["u"], args["mean"], *case.grads()[1:]))


@pytest.mark.parametrize(
    "name",
    ["relu_residual", "relu6_channels_last", "silu", "bf16_residual", "sample", "no_stats", "quant_ste", "quant_relu"],
)
def test_compile_keeps_reductions_and_decomposes_the_rest(name):
    case = CASE[name]
    args, (grad, *sums) = case.args(), case.grads()
    outs = {}
    for whole in (True, False):
        u = args["u"].detach().requires_grad_()

        def run(u):
            return bn_act(**{**args, "u": u})

        with backend.backend("auto"):
            out, graphs = compiled(run, u) if whole else (run(u), None)
        out = out if isinstance(out, tuple) else (out,)
        outs[whole] = *out, *torch.autograd.grad(out, u, [grad, *(g for g in sums if g is not None)])
        if whole:
            assert ours(graphs[0]) == ["zsq.bn_act.default"] * (case.stats is not None)
    for a, b in zip(outs[True], outs[False], strict=True):
        if case.act == "silu":
            torch.testing.assert_close(a, b)
        else:
            assert_same(a, b)


def test_compile_keeps_a_forced_backend_opaque(fast):
    name, device = fast
    case = CASE["no_stats_residual"]
    skip_refused(fast, "bn_act", case.dtype)
    args = case.args(device)
    u = args["u"].requires_grad_()
    with backend.backend(name):
        out, graphs = compiled(lambda u: bn_act(**{**args, "u": u}), u)
        (got,) = torch.autograd.grad(out, u, case.grads(device)[0])
    assert ours(graphs[0]) == ["zsq.bn_act.default"]
    assert_same(out, reference.bn_act(*case.told())[0])
    assert_same(got, torch.ops.zsq.bn_act_backward(*op_backward_args(case))[0])


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("mean", "var", "gamma", "beta"):
            self.register_buffer(name, torch.rand(3))

    def forward(self, u, r):
        y, s1, s2 = bn_act(u, self.mean, self.var, self.gamma, self.beta, 1e-5, residual=r, act="relu", stats="batch")
        return y, *statistics_of(s1, s2, u.numel() // 3, self.mean), *channel_sums(y, self.mean, "sample")


def test_export_keeps_the_op():
    few, more = ((torch.randn(n, 3, 4), torch.randn(n, 3, 4)) for n in (2, 5))
    assert_exports(Block(), few, more, "bn_act", "channel_sums")


def test_meta_tensors_have_a_shape_and_no_values():
    u, c = torch.empty(2, 3, 5, device="meta"), torch.empty(3, device="meta")
    y, s1, s2 = bn_act(u, c, c, None, c, 1e-5, act="relu", stats="sample")
    assert (y.device.type, y.shape, s1.shape, s2.shape) == ("meta", u.shape, (2, 3), (2, 3))
