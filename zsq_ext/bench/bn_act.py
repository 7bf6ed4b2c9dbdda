"""bn_act beside what networks and hooks do in eager PyTorch: batch norm, shortcut, activation, and the statistics."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.bench.subject import Subject
from zsq_ext.ops import bn_act, reference
from zsq_ext.ops.cases import bn_act as cases
from zsq_ext.ops.layout import in_layout_of

_ACTS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


def subjects(device: str) -> list[Subject]:
    return [_subject(case, device, pass_) for case in cases.BN_ACT_BENCH for pass_ in _tensors(case)]


def _tensors(case: cases.BnActCase) -> dict[str, int]:
    """pass -> tensors of u's size that move: u and residual in, y out; then grad and u in, and their gradients out."""
    return {"forward": 2 + case.residual, "forward+backward": 5 + 2 * case.residual}


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
        inputs=lambda: _inputs(case, device),
        ours=_pass(bn_act, pass_),
        expected=lambda grads, args: _expected(case, grads, args, pass_),
        peers={"eager": _pass(_eager, pass_), "clone": lambda grads, args: args["u"].clone()},
    )


def _inputs(case: cases.BnActCase, device: str) -> tuple[Any, dict[str, Any]]:
    """The gradients, y's in the memory format that u is in, and the arguments."""
    args, (grad_y, *grad_sums) = case.args(device), case.grads(device)
    return (in_layout_of(args["u"], grad_y), *grad_sums), args


def _pass(function: Callable[..., Any], pass_: str) -> Callable[..., Tensor]:
    """y, or the gradient of u, as a function of (grads, args): a frozen network's, so nothing is trained."""

    def forward(grads: Any, args: dict[str, Any]) -> Tensor:
        out = function(**args)
        return out[0] if isinstance(out, tuple) else out

    def both(grads: Any, args: dict[str, Any]) -> Tensor:
        leaves = {k: args[k].detach().requires_grad_() for k in ("u", "residual") if args[k] is not None}
        out = function(**{**args, **leaves})
        wanted = [g for g in grads if g is not None]
        return torch.autograd.grad(out, list(leaves.values()), wanted)[0]

    return forward if pass_ == "forward" else both


def _expected(case: cases.BnActCase, grads: Any, args: dict[str, Any], pass_: str) -> Tensor:
    saves = case.residual and case.act in ("relu", "relu6")
    y, _, _, mask = reference.bn_act(**args, save_mask=saves)
    if pass_ == "forward":
        return y
    rest: dict[str, Any] = {k: v for k, v in args.items() if k != "stats"}
    rest |= zip(("grad_y", "grad_s1", "grad_s2"), grads, strict=True)
    rest |= {"residual": None} if saves else {"mask": None}
    rest |= {"need_u": True, "need_residual": False, "need_affine": False}
    return reference.bn_act_backward(**{"mask": mask, **rest})[0]


def _eager(
    u: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None,
    act: str,
    stats: str | None,
) -> Any:
    """What modules compute, and hooks beside them: the sums of the shifted input."""
    if u.dtype in (torch.float16, torch.bfloat16):
        mean, var = mean.to(u.dtype), var.to(u.dtype)
        gamma, beta = (None if t is None else t.to(u.dtype) for t in (gamma, beta))
    v = F.batch_norm(u, mean, var, gamma, beta, False, 0.0, eps)
    y = _ACTS.get(act, lambda v: v)(v if residual is None else v + residual)
    if stats is None:
        return y
    axes = list(range(2, u.dim())) if stats == "sample" else [0, *range(2, u.dim())]
    d = u.float() - mean.float().view(1, -1, *[1] * (u.dim() - 2))
    return y, d.sum(axes), d.square().sum(axes)
