"""bn_act beside what networks, hooks and observers do in eager PyTorch: norm, shortcut, activation, sums and range."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.bench.subject import Subject
from zsq_ext.ops import bn_act, reference
from zsq_ext.ops.bn_act_spec import Needs
from zsq_ext.ops.cases import LAYOUTS
from zsq_ext.ops.cases import bn_act as cases

_ACTS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


def subjects(device: str) -> list[Subject]:
    return [_subject(case, device, pass_) for case in cases.BN_ACT_BENCH for pass_ in _tensors(case)]


def _tensors(case: cases.BnActCase) -> dict[str, int]:
    """pass -> tensors of u's size that move: u and residual in, y out; then grad and u in, and their gradients out.

    Extremes move nothing of their own. Who calibrates takes no gradient.
    """
    forward = {"forward": 2 + case.residual}
    return forward if case.extremes else {**forward, "forward+backward": 5 + 2 * case.residual}


def _subject(case: cases.BnActCase, device: str, pass_: str) -> Subject:
    n = torch.Size(case.shape).numel()
    return Subject(
        op="bn_act",
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_=pass_,
        bytes_=_tensors(case)[pass_] * n * case.dtype.itemsize,
        flops=(7 if pass_ == "forward" else 15) * n,
        inputs=lambda: (_grads(case, device), case.args(device)),
        ours=_pass(bn_act, pass_),
        expected=lambda *first: _expected(case, pass_, device),
        peers={"eager": _pass(_eager, pass_), "clone": lambda grads, args: args["u"].clone()},
    )


def _grads(case: cases.BnActCase, device: str) -> tuple[Tensor | None, ...]:
    """y's gradient lies in memory as y does, which is how a convolution sends it."""
    grad, *sums = case.grads(device)
    return LAYOUTS[case.layout](grad), *sums


def _pass(function: Callable[..., Any], pass_: str) -> Callable[..., Any]:
    """y and the extremes, or the gradient of u, as a function of (grads, args): a frozen network trains nothing."""

    def forward(grads: Any, args: dict[str, Any]) -> Any:
        out = function(**args)
        if args["extremes"]:
            return out[0], *out[-2:]
        return out[0] if isinstance(out, tuple) else out

    def both(grads: Any, args: dict[str, Any]) -> Tensor:
        leaves = {k: args[k].detach().requires_grad_() for k in ("u", "residual") if args[k] is not None}
        out = function(**{**args, **leaves})
        wanted = [g for g in grads if g is not None]
        return torch.autograd.grad(out, list(leaves.values()), wanted)[0]

    return forward if pass_ == "forward" else both


def _expected(case: cases.BnActCase, pass_: str, device: str) -> Any:
    y, _, _, mask, ends = reference.bn_act(*case.told(device, mask=case.saves_mask))
    if pass_ == "forward":
        return (y, *ends) if case.extremes else y
    u, residual, mask, grads, layer, _ = case.told_backward(mask, device)
    return reference.bn_act_backward(u, residual, mask, grads, layer, Needs())[0]


def _eager(
    u: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None,
    act: str,
    quant: tuple[Tensor, Tensor, int, int] | None,
    quant_grad: str,
    stats: str | None,
    extremes: bool,
) -> Any:
    """What modules compute, and beside them hooks, the sums of the shifted input, and observers, the output's range."""
    if u.dtype in (torch.float16, torch.bfloat16):
        mean, var = mean.to(u.dtype), var.to(u.dtype)
        gamma, beta = (None if t is None else t.to(u.dtype) for t in (gamma, beta))
    v = F.batch_norm(u, mean, var, gamma, beta, False, 0.0, eps)
    y = _ACTS.get(act, lambda v: v)(v if residual is None else v + residual)
    ends = torch.aminmax(y) if extremes else ()
    if quant is not None:
        y = torch.fake_quantize_per_tensor_affine(y, *quant)
    if stats is None:
        return (y, *ends) if extremes else y
    axes = list(range(2, u.dim())) if stats == "sample" else [0, *range(2, u.dim())]
    d = u.float() - mean.float().view(1, -1, *[1] * (u.dim() - 2))
    return y, d.sum(axes), d.square().sum(axes), *ends
