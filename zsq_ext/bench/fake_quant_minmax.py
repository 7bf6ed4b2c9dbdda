"""fake_quant_minmax beside what a training step does without it: one weight after the other, in eager PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

from zsq_ext.bench.subject import Subject
from zsq_ext.ops import channel_range, fake_quant, fake_quant_minmax, reference
from zsq_ext.ops.cases import fake_quant_minmax as cases
from zsq_ext.quant.ranges import affine_params


def subjects(device: str) -> list[Subject]:
    return [_subject(case, device, pass_) for case in cases.FAKE_QUANT_MINMAX_BENCH for pass_ in ("fresh", "out")]


def _subject(case: cases.MinMaxCase, device: str, pass_: str) -> Subject:
    tensors, bits, axes, _ = case.args(device)
    n = sum(t.numel() for t in tensors)

    def each(function: Callable[[Tensor, int, int], Tensor]) -> Callable[[list[Tensor], list[Tensor]], list[Tensor]]:
        return lambda tensors, outs: [function(*one) for one in zip(tensors, bits, axes, strict=True)]

    return Subject(
        op="fake_quant_minmax",
        case=case.name,
        dtype=case.dtype,
        device=device,
        pass_=pass_,
        bytes_=2 * n * tensors[0].element_size(),  # in and out; the second read is a cache's
        flops=8 * n,
        inputs=lambda: (case.args(device)[0], [torch.empty_like(t) for t in tensors]),
        ours=lambda tensors, outs: fake_quant_minmax(tensors, bits, axes, out=outs if pass_ == "out" else None),
        expected=lambda tensors, outs: reference.fake_quant_minmax(tensors, bits, axes, False)[0],
        peers={"eager": each(_eager), "one by one": each(_one), "clone": each(lambda t, b, axis: t.clone())},
    )


def _eager(t: Tensor, bits: int, axis: int) -> Tensor:
    """What people write, for one weight."""
    shape = [1] * t.dim()
    shape[axis] = -1
    rows = t.movedim(axis, 0).flatten(1)
    lo, hi = rows.amin(1), rows.amax(1)
    scale, zero_point, qmin, qmax = affine_params(lo, hi, bits, signed=True, include_zero=False)
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    return ((torch.round(t / scale) + zero_point).clamp(qmin, qmax) - zero_point) * scale


def _one(t: Tensor, bits: int, axis: int) -> Tensor:
    """What a weight quantizer does, by the ops that know one tensor."""
    grid = affine_params(*channel_range(t, axis), bits, signed=True, include_zero=False)
    return fake_quant(t, *grid, axis=axis)
