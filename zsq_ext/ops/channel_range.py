"""The smallest and the largest value of a tensor, or of each of its channels."""

from torch import Tensor

from zsq_ext.ops import backend
from zsq_ext.ops import check as checks
from zsq_ext.ops.layout import COMPUTE


def _fake(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    ends = 1 if axis is None else x.size(axis)
    lo, hi = (x.new_empty(ends, dtype=COMPUTE[x.dtype]) for _ in range(2))
    return lo, hi


_op = backend.define("channel_range(Tensor x, int? axis=None) -> (Tensor, Tensor)", _fake)


def channel_range(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The extremes of a tensor, or of each channel along axis, in one read.

    Exact, so every backend gives the same bits: NaN makes both ends of its channel NaN, and a zero is +0. No gradient.

    Args:
        x: any non-empty shape, any strides; float32, float16, bfloat16, or float64 (on the reference and cpu
            backends).
        axis: the channels' dimension; None for the whole tensor.

    Returns:
        (lo, hi), each (C,) with C = x.shape[axis], or (1,); float32, or float64 where x is.

    Raises:
        TypeError: x is not as above.
        ValueError: x is empty, or has no such axis.
        NotImplementedError: the forced backend cannot run it; says why.

    Example:
        >>> channel_range(torch.tensor([[-3.0, 0.5], [0.0, 9.0]]), axis=0)
        (tensor([-3.,  0.]), tensor([0.5000, 9.0000]))
    """
    checks.compute_dtype("channel_range", "x", x)
    if x.numel() == 0:
        raise ValueError(f"channel_range: x must not be empty, got shape {tuple(x.shape)}")
    return _op(x.detach(), checks.dimension("channel_range", "x", x, axis))
