"""lp_error beside the loop over candidates that a range search is without it."""

import torch
from torch import Tensor

from zsq_ext.bench.subject import Subject
from zsq_ext.ops import lp_error, reference
from zsq_ext.ops.cases import lp_error as cases


def subjects(device: str) -> list[Subject]:
    return [_subject(case, device) for case in cases.LP_ERROR_BENCH]


def _subject(case: cases.LpErrorCase, device: str) -> Subject:
    n = torch.Size(case.shape).numel()
    return Subject(
        op="lp_error",
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_="forward",
        bytes_=n * case.dtype.itemsize,  # one read, whatever the candidates
        flops=(10 if case.p == 2 else 80) * n * case.candidates,
        inputs=lambda: case.args(device),
        ours=lp_error,
        expected=reference.lp_error,
        peers={"eager": _eager},
        tolerance=2e-6,
    )


def _eager(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, p: float, axis: int | None) -> Tensor:
    """What people write: a chain of elementwise ops and a sum for each candidate."""
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    found = []
    for s, z in zip(scale.unbind(1), zero_point.unbind(1), strict=True):
        s, z = s[:, None], z[:, None]
        x_hat = (torch.clamp(torch.round(rows / s) + z, qmin, qmax) - z) * s
        found.append((rows - x_hat).abs().pow(p).sum(1))
    return torch.stack(found, 1)
