"""How `cpu` and `cuda` call the native module's distill_head, cam_map and count_active."""

import math
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.heads_spec import Grads, Kept, Needs, Terms, Trust
from zsq_ext.ops.layout import COMPUTE, DTYPE_CODE, arranged, channels_last, empty_arranged, places_of
from zsq_ext.ops.native.call import Call, address
from zsq_ext.ops.reference.heads import ROW, kd_weight

# kernels/heads.h holds the same codes.
KD_CODE = {"kl_mean": 0, "kl_batchmean": 0, "mse": 1, "entropy": 2}
TRUST_CODE = {"all": 0, "below": 1, "up_to": 2, "given": 3}


def code_of(trust: Trust) -> str:
    """How a sample becomes easy."""
    if trust.easy is not None:
        return "given"
    return "all" if trust.tau is None else "below" if trust.strict else "up_to"


def weights(student: Tensor, terms: Terms) -> tuple[float, float]:
    """What the sums over samples are multiplied by."""
    samples, classes = student.shape
    weight = kd_weight(terms.kd, terms.alpha, terms.temperature, samples, classes)
    return weight, terms.ce / samples if samples else math.nan


def distill_head(
    call: Call, student: Tensor, teacher: Tensor, trust: Trust, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute, samples = COMPUTE[student.dtype], student.size(0)
    rows = student.new_empty((samples, ROW), dtype=compute)
    out = student.new_empty(samples, dtype=torch.bool)
    total_kd, total_ce = (student.new_empty((), dtype=compute) for _ in range(2))
    counts = student.new_empty(3, dtype=torch.int64)
    # by these names: a copy must live until the call is over
    student, teacher = student.contiguous(), teacher.contiguous()
    labels, easy = (None if t is None else t.contiguous() for t in (trust.labels, trust.easy))
    call(
        "distill_head",
        *(address(t) for t in (student, teacher, labels, easy, rows, out, total_kd, total_ce, counts)),
        *(terms.temperature, 0.0 if trust.tau is None else trust.tau),
        *weights(student, terms),
        *student.shape,
        *(KD_CODE[terms.kd], TRUST_CODE[code_of(trust)], DTYPE_CODE[student.dtype]),
    )
    return total_kd, total_ce, out, counts, rows


def distill_head_backward(
    call: Call, student: Tensor, teacher: Tensor, kept: Kept, grads: Grads, terms: Terms, needs: Needs
) -> tuple[Tensor, Tensor]:
    shape = student.shape
    ds, dt = (student.new_empty(shape if need else (0,)) for need in needs)
    # by these names: a copy must live until the call is over
    student, teacher = student.contiguous(), teacher.contiguous()
    labels, easy, rows = (None if t is None else t.contiguous() for t in kept)
    call(
        "distill_head_backward",
        *(address(t) for t in (student, teacher, labels, easy, rows, *grads)),
        *(ds.data_ptr() if needs.student else 0, dt.data_ptr() if needs.teacher else 0),
        terms.temperature,
        *weights(student, terms),
        *shape,
        *(KD_CODE[terms.kd], DTYPE_CODE[student.dtype]),
    )
    return ds, dt


def _seen(x: Tensor) -> tuple[Any, ...]:
    return *places_of(x), DTYPE_CODE[x.dtype]


def cam_map(call: Call, activation: Tensor, alpha: Tensor, floor: float | None) -> Tensor:
    maps = alpha.new_empty((activation.size(0), *activation.shape[2:]))
    fields = _seen(activation)
    activation, alpha = arranged(activation, channels_last(activation)), alpha.contiguous()
    call("cam_map", *(address(t) for t in (activation, alpha, maps)), -math.inf if floor is None else floor, *fields)
    return maps


def cam_map_backward(
    call: Call, activation: Tensor, alpha: Tensor, maps: Tensor, grad: Tensor, floor: float | None
) -> Tensor:
    out = empty_arranged(activation, channels_last(activation))
    alpha, maps, grad = alpha.contiguous(), maps.contiguous(), grad.contiguous()
    call(
        "cam_map_backward",
        *(address(t) for t in (alpha, maps, grad, out)),
        -math.inf if floor is None else floor,
        *_seen(activation),
    )
    return out


def count_active(call: Call, x: Tensor, upper: float | None) -> Tensor:
    count = x.new_empty(x.shape[:2], dtype=torch.int32)
    fields = _seen(x)
    x = arranged(x, channels_last(x))
    call("count_active", x.data_ptr(), count.data_ptr(), math.nan if upper is None else upper, *fields)
    return count
