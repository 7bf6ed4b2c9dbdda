"""Gradients that can be taken once say so: alone, beside other terms, and where an unused input would count as 0."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from zsq_ext import ops

STEP, ZERO = torch.tensor([0.3]), torch.zeros(1, dtype=torch.int32)


def learned(x):
    return ops.fake_quant(x, STEP.clone().requires_grad_(), ZERO, -8, 7, grad="lsq")


def many(x):
    return ops.fake_quant_many([x], [STEP], [ZERO], -8, 7, grad="ste_clip")[0]


def minmax(x):
    return ops.fake_quant_minmax([x], 4, grad="ste_clip")[0]


def rounded(x):
    return ops.adaround(x, torch.zeros_like(x, dtype=torch.int16), STEP, ZERO, -8, 7)


def rounded_many(x):
    return ops.adaround_many([x], [torch.zeros_like(x, dtype=torch.int16)], [STEP], [ZERO], -8, 7)[0]


def dropped(x):
    return ops.qdrop(x, torch.zeros_like(x), 0.5, torch.tensor([1, 2]))


def normed(x):
    return ops.bn_act(x, torch.zeros(4), torch.ones(4), None, None, 1e-5)


OPS = {
    "fake_quant": learned,
    "fake_quant_many": many,
    "fake_quant_minmax": minmax,
    "adaround": rounded,
    "adaround_many": rounded_many,
    "qdrop": dropped,
    "bn_act": normed,
}


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_of_a_gradient_is_refused_rather_than_0(op):
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(OPS[op](x).square().sum(), x, create_graph=True)
    # once, it is what it is without a graph
    assert torch.equal(grad, torch.autograd.grad(OPS[op](x).square().sum(), x)[0])
    refusal = f"{op}: a gradient must be taken once, got a gradient of the gradient"
    with pytest.raises(NotImplementedError, match=refusal):
        (grad.sum() + x.square().sum()).backward()


@pytest.mark.parametrize("grad", ["ste", "ste_clip"])
def test_the_straight_through_gradients_have_a_gradient(grad):
    x = torch.tensor([0.31, -0.62], requires_grad=True)
    y = ops.fake_quant(x, STEP, ZERO, -8, 7, grad=grad)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], torch.full((2,), 2.0))


CHECKPOINTED = {
    **OPS,
    "lsq_plus": lambda x: ops.fake_quant(x, STEP.clone().requires_grad_(), torch.zeros(1), -8, 7, grad="lsq_plus"),
    "ste": lambda x: ops.fake_quant(x, STEP, ZERO, -8, 7, grad="ste"),
    "bn_act with a shortcut": lambda x: sum(
        ops.bn_act(x, torch.zeros(4), torch.ones(4), None, None, 1e-5, residual=x * 2, act="relu", stats="batch")[:1]
    ),
    "channel_sums": lambda x: ops.channel_sums(x, torch.zeros(4))[1],
    "distill_head": lambda x: ops.distill_head(x, x.detach() + 1, torch.tensor([0, 1, 2])).kd,
    "cam_map": lambda x: ops.cam_map(x.view(1, 3, 2, 2), torch.ones(1, 3)),
}


@pytest.mark.parametrize("op", CHECKPOINTED)
def test_checkpointing_recomputes_to_the_same_gradient(op):
    """Non-reentrant checkpointing lets a backward ask for its saved tensors once."""
    x = torch.randn(3, 4, requires_grad=True)
    run = CHECKPOINTED[op]
    (expected,) = torch.autograd.grad(run(x).square().sum(), x)
    again = checkpoint(run, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], expected)
