"""How `cpu` and `cuda` call the native module's adaround and its gradient."""

from torch import Tensor

from zsq_ext.ops.adaround_spec import Rounding
from zsq_ext.ops.layout import DTYPE_CODE, empty_rows, in_layout_of
from zsq_ext.ops.native.call import Call, address


def _run(
    call: Call,
    grad: list[Tensor] | None,
    v: list[Tensor],
    rounding: Rounding,
    sums: tuple[Tensor | None, Tensor | None, Tensor | None],
    hard: bool,
    dscale: list[Tensor],
) -> list[Tensor]:
    """One call for all weights. `sums` are beta, the regulariser and its upstream gradient, those that there are."""
    base, scale, zero_point, qmin, qmax, axis = rounding
    found = [empty_rows(t, s.numel(), axis) for t, s in zip(v, scale, strict=True)]
    # By these names: a copy must live until the call is over.
    v, base = ([in_layout_of(out, t) for out, t in zip(found, ts, strict=True)] for ts in (v, base))
    grad = None if grad is None else [in_layout_of(out, t) for out, t in zip(found, grad, strict=True)]
    weights = tuple(
        (
            *(address(None if grad is None else grad[k]), v[k].data_ptr(), base[k].data_ptr(), found[k].data_ptr()),
            *(scale[k].data_ptr(), zero_point[k].data_ptr(), address(dscale[k] if dscale else None)),
            *(scale[k].numel(), v[k].numel() // max(scale[k].numel(), 1), qmin[k], qmax[k]),
        )
        for k in range(len(v))
    )
    call.with_workspace("adaround", weights, *(address(t) for t in sums), hard, DTYPE_CODE[v[0].dtype])
    return found


def adaround(
    call: Call, v: list[Tensor], rounding: Rounding, beta: Tensor | None, hard: bool
) -> tuple[list[Tensor], Tensor]:
    first = rounding.scale[0]
    reg = None if beta is None else first.new_empty(())
    found = _run(call, None, v, rounding, (beta, reg, None), hard, [])
    return found, first.new_empty(0) if reg is None else reg


def adaround_backward(
    call: Call,
    grad: list[Tensor],
    v: list[Tensor],
    rounding: Rounding,
    beta: Tensor | None,
    grad_reg: Tensor | None,
    need_scale: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    dscale = [s.new_empty(s.shape) for s in rounding.scale] if need_scale else []
    return _run(call, grad, v, rounding, (beta, None, grad_reg), False, dscale), dscale
