"""distill_head, cam_map and count_active beside the eager chains that they replace."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_ext.bench import timing
from zsq_ext.core.progress import Progress
from zsq_ext.ops import backend, cam_map, count_active, distill_head, reference
from zsq_ext.ops.cases import heads as cases

_BOTH = "forward+backward"


def rows(progress: Progress) -> list[dict[str, Any]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    jobs: list[tuple[Callable[..., Any], Any, str]] = [
        (run, case, device)
        for device in devices
        for run, table in ((_distill_row, cases.DISTILL_BENCH), (_map_row, cases.CAM_BENCH), (_count, cases.CAM_BENCH))
        for case in table
    ]
    found = []
    with progress.stage("heads", len(jobs)) as stage:
        for run, case, device in jobs:
            found += run(case, device)
            stage.advance(note=case.name)
    return found


def _rows(
    op: str,
    case: Any,
    device: str,
    pass_: str,
    ours: Callable[..., Tensor],
    peers: dict[str, Callable[..., Tensor]],
    make: Callable[[int], Any],
    expected: Callable[[Any], Tensor],
    bytes_: int,
    flops: int,
    tolerance: float,
) -> list[dict[str, Any]]:
    inputs = timing.copies(make, bytes_, device)
    contenders: dict[str, Callable[..., Any]] = {}
    for name in backend.NAMES:
        interpreted = name == "triton" and device == "cpu"
        if name == "reference" or interpreted or backend.reason_against(name, op, device, case.dtype):
            continue
        contenders[name] = timing.forced(name, ours)
        what = f"{op} on {name}, {case.name}, {pass_}"
        timing.assert_equal(what, contenders[name](*inputs[0]), expected(inputs[0]), tolerance)
    times = timing.compare({**contenders, **peers}, inputs, device)
    return [
        timing.row(
            op=op,
            case=case.name,
            dtype=case.dtype,
            device=device,
            backend=name,
            pass_=pass_,
            timing=times[name],
            bytes_=bytes_,
            flops=flops,
            peers={peer: times[peer] for peer in peers},
            peak=timing.peak_mb(lambda function=function: function(*inputs[0]), device),  # type: ignore[misc]
        )
        for name, function in contenders.items()
    ]


def _distill_row(case: cases.DistillCase, device: str) -> list[dict[str, Any]]:
    """Both terms and the student's gradient: both logits in, twice, and the gradient out."""

    def gradient(terms: Callable[..., Any]) -> Callable[..., Tensor]:
        def run(student: Tensor, *rest: Any) -> Tensor:
            student = student.detach().requires_grad_()
            kd, ce = terms(student, *rest)
            return torch.autograd.grad(kd + ce, student)[0]

        return run

    def ours(student: Tensor, *rest: Any) -> Any:
        names = ("labels", "easy", "kd", "alpha", "temperature", "ce", "tau", "strict")
        return distill_head(student, rest[0], **dict(zip(names, rest[1:], strict=True)))[:2]

    def expected(args: Any) -> Tensor:
        with backend.backend("reference"):
            return gradient(ours)(*args)

    n = case.shape[0] * case.shape[1]
    bytes_ = 5 * n * case.dtype.itemsize
    # of the gradient's norm: the last bit of a 16-bit type, and 40 roundings of float32
    tolerance = torch.finfo(case.dtype).eps if case.dtype.itemsize == 2 else 40 * 2**-24
    peers = {"eager": gradient(_eager)}
    make = lambda seed: case.args(device, seed)  # noqa: E731
    return _rows("distill_head", case, device, _BOTH, gradient(ours), peers, make, expected, bytes_, 150 * n, tolerance)


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


def _map_row(case: cases.CamCase, device: str) -> list[dict[str, Any]]:
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

    def make(seed: int) -> Any:
        x, alpha, _ = case.args(device, seed)
        return x, alpha, case.grad(device)

    def expected(args: Any) -> Tensor:
        with backend.backend("reference"):
            return gradient(cam_map)(*args)

    x = make(0)[0]
    peers = {"eager": gradient(product), "bmm": gradient(bmm)}
    # a sum near zero may pass the ReLU in one rounding and not in another: a few of many positions
    return _rows(
        "cam_map", case, device, _BOTH, gradient(cam_map), peers, make, expected, 2 * x.nbytes, 3 * x.numel(), 0.05
    )


def _count(case: cases.CamCase, device: str) -> list[dict[str, Any]]:
    def eager(x: Tensor) -> Tensor:
        active = x > 0
        if case.upper is not None:
            active &= x < case.upper
        return active.sum((2, 3))

    def ours(x: Tensor) -> Tensor:
        return count_active(x, case.upper)

    def make(seed: int) -> Any:
        return (case.activation(device, seed),)

    def expected(args: Any) -> Tensor:
        return reference.count_active(args[0], case.upper)

    x = make(0)[0]
    return _rows(
        "count_active", case, device, "forward", ours, {"eager": eager}, make, expected, x.nbytes, 2 * x.numel(), 0.0
    )
