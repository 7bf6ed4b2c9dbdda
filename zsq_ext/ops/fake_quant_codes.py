"""The two halves of fake_quant: to integer codes, and back to values."""

from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import backend, reference
from zsq_ext.ops import check as checks
from zsq_ext.ops.layout import CODE_TYPE, COMPUTE, code_dtype, empty_for


def _fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    return empty_for(x, scale, code_dtype(qmin, qmax))


def _fake_dequantize(code: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    return empty_for(code, scale, dtype)


def _kind_of_values(code: Tensor, *rest: Any) -> tuple[torch.device, torch.dtype]:
    return code.device, rest[-1]


_quantize = backend.define(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int? axis=None) -> Tensor", _fake_quantize
)
_dequantize = backend.define(
    "dequantize(Tensor code, Tensor scale, Tensor zero_point, int? axis, ScalarType dtype) -> Tensor",
    _fake_dequantize,
    _kind_of_values,
)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    """The codes that `fake_quant` rounds to, as integers.

        code = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)

    Every backend gives the same codes. Integers have no NaN: where x is NaN the code is that of 0, the zero_point
    clamped to the range. Infinities clamp. No gradient.

    Args:
        x, scale, zero_point, qmin, qmax, axis: as for `fake_quant`; zero_point is int32.

    Returns:
        Codes of x's shape and memory format (contiguous with groups): int8 if qmin and qmax fit into it, else uint8 if
        they do, else int32.

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device, range or axis is not as above.
        NotImplementedError: the forced backend cannot run it; says why.

    Example:
        >>> x = torch.tensor([-3.0, 0.26, 9.0])
        >>> quantize(x, torch.tensor([0.5]), torch.tensor([1], dtype=torch.int32), -8, 7)
        tensor([-5,  2,  7], dtype=torch.int8)
    """
    checks.compute_dtype("quantize", "x", x)
    checks.code_range("quantize", qmin, qmax)
    axis = checks.dimension("quantize", "x", x, axis)
    scale, zero_point = checks.grid("quantize", x, scale, zero_point, axis, x.dtype)
    run = reference.quantize if backend.decomposes() else _quantize
    return run(x.detach(), scale.detach(), zero_point, qmin, qmax, axis)


def dequantize(
    code: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values that codes stand for.

        x_hat = (code - zero_point) * scale

    Computed in scale's dtype, each operation rounded once, the result rounded once to dtype. Of `quantize`'s codes it
    makes what `fake_quant` gives, bit for bit, but for NaN. No gradient.

    Args:
        code: int8, uint8 or int32, any shape and strides.
        scale, zero_point, axis: as for `fake_quant`, with code in the place of x; zero_point is int32.
        dtype: of the values: float32, float16, bfloat16, or, with a float64 scale, float64.

    Returns:
        Values of code's shape and memory format (contiguous with groups).

    Raises:
        TypeError: a type or dtype is not as above.
        ValueError: a shape, device or axis is not as above.
        NotImplementedError: the forced backend cannot run it; says why.

    Example:
        >>> code = torch.tensor([-5, 2, 7], dtype=torch.int8)
        >>> dequantize(code, torch.tensor([0.5]), torch.tensor([1], dtype=torch.int32))
        tensor([-3.0000,  0.5000,  3.0000])
    """
    if not isinstance(code, Tensor) or code.dtype not in CODE_TYPE:
        got = code.dtype if isinstance(code, Tensor) else type(code).__name__
        raise TypeError(f"dequantize: code must be an int8, uint8 or int32 tensor, got {got}")
    if not isinstance(dtype, torch.dtype) or dtype not in COMPUTE:
        rule = "torch.float32, torch.float16, torch.bfloat16 or torch.float64"
        raise TypeError(f"dequantize: dtype must be {rule}, got {checks.shown(dtype)}")
    axis = checks.dimension("dequantize", "code", code, axis)
    called = "values", "scale", "zero_point"
    scale, zero_point = checks.grid("dequantize", code, scale, zero_point, axis, dtype, called=called)
    run = reference.dequantize if backend.decomposes() else _dequantize
    return run(code, scale.detach(), zero_point, axis, dtype)
