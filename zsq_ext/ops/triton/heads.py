"""distill_head, cam_map, count_active and their gradients on Triton."""

import torch
from torch import Tensor

from zsq_ext.ops.heads_spec import Grads, Kept, Needs, Terms, Trust
from zsq_ext.ops.layout import COMPUTE, arranged, channels_last, empty_arranged, places_of
from zsq_ext.ops.native.heads import code_of, weights
from zsq_ext.ops.reference.heads import ROW
from zsq_ext.ops.triton.launch import kernels, on_device_of


def _form(kd: str) -> str:
    return "kl" if kd.startswith("kl_") else kd


def distill_head(
    student: Tensor, teacher: Tensor, trust: Trust, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute, (samples, classes) = COMPUTE[student.dtype], student.shape
    rows = student.new_empty((samples, ROW), dtype=compute)
    out = student.new_empty(samples, dtype=torch.bool)
    total_kd, total_ce = (student.new_empty((), dtype=compute) for _ in range(2))
    counts = student.new_empty(3, dtype=torch.int64)
    labels = None if trust.labels is None else trust.labels.contiguous()
    given = None if trust.easy is None else trust.easy.contiguous().view(torch.uint8)
    with on_device_of(student):
        kernels("heads_distill").distill_head(
            *(student.contiguous(), teacher.contiguous(), labels, given),
            *(rows, out.view(torch.uint8), total_kd, total_ce, counts, samples, classes, terms.temperature),
            *(0.0 if trust.tau is None else trust.tau, weights(student, terms)),
            *(_form(terms.kd), code_of(trust)),
        )
    return total_kd, total_ce, out, counts, rows


def distill_head_backward(
    student: Tensor, teacher: Tensor, kept: Kept, grads: Grads, terms: Terms, needs: Needs
) -> tuple[Tensor, Tensor]:
    ds, dt = (student.new_empty(student.shape if need else (0,)) for need in needs)
    labels = None if kept.labels is None else kept.labels.contiguous()
    with on_device_of(student):
        kernels("heads_distill").distill_head_backward(
            *(student.contiguous(), teacher.contiguous(), labels, kept.easy.contiguous().view(torch.uint8)),
            *(kept.rows.contiguous(), *grads, ds if needs.student else None, dt if needs.teacher else None),
            *(*student.shape, terms.temperature, weights(student, terms), _form(terms.kd)),
        )
    return ds, dt


def cam_map(activation: Tensor, alpha: Tensor, floor: float | None) -> Tensor:
    maps = alpha.new_empty((activation.size(0), *activation.shape[2:]))
    seen = arranged(activation, channels_last(activation))
    with on_device_of(activation):
        kernels("heads_cam").cam_map(seen, alpha.contiguous(), maps, *places_of(activation), floor)
    return maps


def cam_map_backward(activation: Tensor, alpha: Tensor, maps: Tensor, grad: Tensor, floor: float | None) -> Tensor:
    out = empty_arranged(activation, channels_last(activation))
    read = (t.contiguous() for t in (alpha, maps, grad))
    with on_device_of(activation):
        kernels("heads_cam").cam_map_backward(*read, out, *places_of(activation), floor)
    return out


def count_active(x: Tensor, upper: float | None) -> Tensor:
    count = x.new_empty(x.shape[:2], dtype=torch.int32)
    with on_device_of(x):
        kernels("heads_cam").count_active(arranged(x, channels_last(x)), count, *places_of(x), upper)
    return count
