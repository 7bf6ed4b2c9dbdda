"""distill_head, cam_map and count_active beside the eager chains that they replace."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.bench.subject import Subject
from zsq_ext.bench.timing import Forced
from zsq_ext.ops import cam_map, count_active, distill_head
from zsq_ext.ops.cases import heads as cases

_BOTH = "forward+backward"


def subjects(device: str) -> list[Subject]:
    return [
        *(_distill(case, device) for case in cases.DISTILL_BENCH),
        *(_map(case, device) for case in cases.CAM_BENCH),
        *(_count(case, device) for case in cases.CAM_BENCH),
    ]


def _distill(case: cases.DistillCase, device: str) -> Subject:
    """Both terms and the student's gradient: both logits in, twice, and the gradient out."""

    def gradient(terms: Callable[..., Any]) -> Callable[..., Tensor]:
        def run(student: Tensor, *rest: Any) -> Tensor:
            student = student.detach().requires_grad_()
            kd, ce = terms(student, *rest)
            return torch.autograd.grad(kd + ce, student)[0]

        return run

    def head(student: Tensor, teacher: Tensor, labels: Tensor, easy: Any, kd: str, *rest: Any) -> Any:
        numbers = dict(zip(("alpha", "temperature", "ce", "tau", "strict"), rest, strict=True))
        return distill_head(student, teacher, labels, easy=easy, kd=kd, **numbers)[:2]

    n = case.shape[0] * case.shape[1]
    return Subject(
        op="distill_head",
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_=_BOTH,
        bytes_=5 * n * case.dtype.itemsize,
        flops=150 * n,  # of which 9 exponentials
        inputs=lambda: case.args(device),
        ours=gradient(head),
        expected=Forced("reference", gradient(head)),
        peers={"eager": gradient(_eager)},
        # of the gradient's norm: the last bit of a 16-bit type, and 40 roundings of float32
        tolerance=torch.finfo(case.dtype).eps if case.dtype.itemsize == 2 else 40 * 2**-24,
    )


def _eager(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    easy: Tensor | None,
    kd: str,
    alpha: float,
    temperature: float,
    ce: float,
    tau: float,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    """What fine-tuning loops write: KL as batchmean, and the labels that the teacher trusts."""
    student, teacher = student.float(), teacher.float()
    log_q, log_p = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    divergence = alpha * temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    trusted = 1 - teacher.softmax(1).gather(1, labels[:, None])[:, 0] < tau
    each = F.cross_entropy(student, labels, reduction="none")
    return divergence, ce * torch.where(trusted, each, 0).mean()


def _map(case: cases.CamCase, device: str) -> Subject:
    """The map and the activation's gradient: one read and one write of its size."""

    def gradient(maps: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, alpha: Tensor, grad: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(maps(x, alpha), x, grad)[0]

        return run

    def product(x: Tensor, alpha: Tensor) -> Tensor:
        return (alpha[:, :, None, None] * x.float()).sum(1).relu()

    def bmm(x: Tensor, alpha: Tensor) -> Tensor:
        return torch.bmm(alpha[:, None], x.float().flatten(2)).view(x.size(0), *x.shape[2:]).relu()

    n = torch.Size(case.shape).numel()
    return Subject(
        op="cam_map",
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_=_BOTH,
        bytes_=2 * n * case.dtype.itemsize,
        flops=3 * n,
        inputs=lambda: (*case.args(device)[:2], case.grad(device)),
        ours=gradient(cam_map),
        expected=Forced("reference", gradient(cam_map)),
        peers={"eager": gradient(product), "bmm": gradient(bmm)},
        # a sum near zero may pass the ReLU in one rounding and not in another: a few of many positions
        tolerance=0.05,
    )


def _count(case: cases.CamCase, device: str) -> Subject:
    def eager(x: Tensor) -> Tensor:
        active = x > 0
        if case.upper is not None:
            active &= x < case.upper
        return active.sum((2, 3))

    def ours(x: Tensor) -> Tensor:
        return count_active(x, case.upper)

    n = torch.Size(case.shape).numel()
    return Subject(
        op="count_active",
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_="forward",
        bytes_=n * case.dtype.itemsize,
        flops=2 * n,
        inputs=lambda: (case.activation(device),),
        ours=ours,
        expected=Forced("reference", ours),
        peers={"eager": eager},
    )
