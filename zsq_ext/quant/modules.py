"""The two quantizers that are inserted into a captured graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zsq_ext.core.steps import Diverged
from zsq_ext.ops import fake_quant
from zsq_ext.quant.ranges import affine_params, ema_update, ema_update_legacy, ema_value, lp_search, min_max


class _Grid(NamedTuple):
    """A grid, and the state of the range that it was computed from."""

    grid: tuple[Tensor, Tensor, int, int]
    buffers: tuple[Tensor, ...]
    versions: tuple[int, ...]
    dtype: torch.dtype


class WeightQuantizer(nn.Module):
    """Per-output-channel asymmetric fake-quantization of a weight, straight-through everywhere.

    Args:
        name: the site's name.
        bits: 2 to 8.
        axis: the output-channel axis.
        frozen_range: (lo, hi), each (C,); None takes the live extremes at every forward, as the ZeroQ lineage does.
    """

    lo: Tensor | None
    hi: Tensor | None

    def __init__(self, name: str, bits: int, axis: int, frozen_range: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.name, self.bits, self.axis = name, bits, axis
        lo, hi = frozen_range if frozen_range is not None else (None, None)
        self.register_buffer("lo", lo)
        self.register_buffer("hi", hi)

    def params(self, weight: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """(scale, zero_point, qmin, qmax) for this weight: fp32 (C,), int32 (C,) and two ints."""
        lo, hi = min_max(weight, self.axis) if self.lo is None or self.hi is None else (self.lo, self.hi)
        return affine_params(lo, hi, self.bits, signed=True, include_zero=False)

    @torch.no_grad()
    def set_step(self, scale: Tensor) -> None:
        """Moves a frozen range so that its step is this one, (C,), and its zero-points stay; no host synchronisation.

        The step comes out as nearly as a range in its dtype can say, within a few units in the last place. A channel
        whose zero-point is too far out to be read back from the new range keeps the range it has.
        """
        if self.lo is None or self.hi is None:
            raise ValueError("set_step: the range must be frozen, got one that follows the weight")
        _, zero_point, qmin, qmax = affine_params(self.lo, self.hi, self.bits, signed=True, include_zero=False)
        lo, hi = (((end - zero_point) * scale).to(self.lo.dtype) for end in (qmin, qmax))
        kept = affine_params(lo, hi, self.bits, signed=True, include_zero=False)[1] == zero_point
        self.lo.copy_(torch.where(kept, lo, self.lo))
        self.hi.copy_(torch.where(kept, hi, self.hi))

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quant(weight, *self.params(weight), axis=self.axis, grad="ste")

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}, axis={self.axis}"


class ActivationQuantizer(nn.Module):
    """Per-tensor asymmetric fake-quantization of an activation, straight-through everywhere.

    While ``calibrating(model)`` holds, every forward moves the range; otherwise the range stands still. The range is
    kept in buffers, so it is saved, copied and moved with the model. Zero is always a code: padding stays exact. A
    batch with NaN makes the range NaN, and with it every later output: no valid code hides it.

    Args:
        name: the site's name.
        bits: 2 to 8.
        range_kind: one of ``QConfig.a_range``.
        beta: memory of the moving average.
    """

    lo: Tensor
    hi: Tensor
    batches: Tensor

    def __init__(self, name: str, bits: int, range_kind: str = "ema", beta: float = 0.9) -> None:
        super().__init__()
        self.name, self.bits, self.range_kind, self.beta = name, bits, range_kind, beta
        self.observing = False
        self._grid: _Grid | None = None
        # lo and hi hold what the kind of range accumulates: raw averages, the released recursion, or extremes
        self.register_buffer("lo", torch.zeros(1))
        self.register_buffer("hi", torch.zeros(1))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def __getstate__(self) -> dict[str, Any]:
        # a copy belongs to no calibrating(), so nothing would ever switch it off
        return {**self.__dict__, "observing": False, "_grid": None}

    @torch.no_grad()
    def observe(self, x: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> None:
        """Moves the range by one batch; no host synchronisation.

        Args:
            x: the batch.
            ends: its extremes, (1,) or (C,) each, where something has found them already and x need not be read.
        """
        ends = min_max(x) if ends is None else (ends[0].amin(0, keepdim=True), ends[1].amax(0, keepdim=True))
        if self.range_kind == "lp":
            ends = lp_search(x, self.bits, signed=False, include_zero=True, start=ends)
        lo, hi = ends
        lo, hi = lo.to(self.lo.dtype), hi.to(self.hi.dtype)
        if self.range_kind == "minmax":
            new = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi), self.batches + 1
        elif self.range_kind == "legacy_ema":
            new = ema_update_legacy(self.lo, self.hi, self.batches, lo, hi, self.beta)
        else:
            new = ema_update(self.lo, self.hi, self.batches, lo, hi, self.beta)
        for buffer, value in zip((self.lo, self.hi, self.batches), new, strict=True):
            buffer.copy_(value)

    def range(self) -> tuple[Tensor, Tensor]:
        """The current (lo, hi), each fp32 (1,)."""
        if self.range_kind in ("ema", "lp"):
            return ema_value(self.lo, self.hi, self.batches, self.beta)
        return self.lo, self.hi

    @torch.no_grad()
    def set_range(self, lo: float, hi: float) -> None:
        """Sets the range, as if one batch with these extremes had been seen."""
        if not -math.inf < lo < hi < math.inf:
            raise ValueError(f"set_range: lo must be < hi, both finite, got {lo} and {hi}")
        weight = self._one_batch()
        self.lo.fill_(lo * weight)
        self.hi.fill_(hi * weight)
        self.batches.fill_(1)

    @torch.no_grad()
    def set_step(self, scale: Tensor) -> None:
        """Moves the range so that its step is this one, (1,), and its zero-point stays; no host synchronisation.

        The step comes out as nearly as a range in its dtype can say, within a few units in the last place.
        """
        _, zero_point, qmin, qmax = self.params(scale.dtype)
        weight = self._one_batch()
        self.lo.copy_((qmin - zero_point) * scale * weight)
        self.hi.copy_((qmax - zero_point) * scale * weight)
        self.batches.fill_(1)

    @torch.no_grad()
    def forget(self) -> None:
        """Empties the range, as before the first batch."""
        for buffer in (self.lo, self.hi, self.batches):
            buffer.zero_()

    def _one_batch(self) -> float:
        """What one batch weighs in the buffers."""
        return 1 - self.beta if self.range_kind in ("ema", "lp") else 1.0

    def params(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int, int]:
        """(scale, zero_point, qmin, qmax): (1,) in fp32 or, for double x, fp64; int32 (1,); two ints; unsigned codes.

        Args:
            dtype: of the tensor to quantize.
        """
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        buffers = self.lo, self.hi, self.batches
        # A range that stands still would cost some 20 tiny operations at every forward. A compiler folds them itself,
        # and an inference tensor neither counts its versions nor may be kept for training.
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or any(t.is_inference() for t in buffers):
            return self._computed(wide)
        versions, kept = tuple(t._version for t in buffers), self._grid
        if kept and (kept.versions, kept.dtype) == (versions, wide) and all(map(operator.is_, kept.buffers, buffers)):
            return kept.grid
        grid = self._computed(wide)
        if type(grid[0]) is Tensor:  # no stand-in of a tracer
            self._grid = _Grid(grid, buffers, versions, wide)
        return grid

    @torch.no_grad()
    def _computed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int]:
        lo, hi = (end.to(dtype) for end in self.range())
        return affine_params(lo, hi, self.bits, signed=False, include_zero=True)

    def forward(self, x: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if self.observing:
            self.observe(x, ends)
        return fake_quant(x, *self.params(x.dtype), grad="ste")

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}, range={self.range_kind}"


def activation_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """All activation quantizers of a prepared network, in execution order."""
    return [m for m in model.modules() if isinstance(m, ActivationQuantizer)]


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """While it holds, every forward of ``model`` moves the activation ranges; it can be nested."""
    quantizers = activation_quantizers(model)
    before = [quantizer.observing for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        yield
    finally:
        for quantizer, observing in zip(quantizers, before, strict=True):
            quantizer.observing = observing


class RangeTrace:
    """The activation ranges after every calibration batch, kept on the device until they are asked for.

    Args:
        model: a prepared network whose ranges have seen nothing yet.
        batches: how many calibration batches there will be.
    """

    def __init__(self, model: nn.Module, batches: int) -> None:
        self._quantizers = activation_quantizers(model)
        self.rows = self._quantizers[0].lo.new_zeros(batches, len(self._quantizers), 2)

    @torch.no_grad()
    def record(self) -> None:
        """Notes the ranges as they stand; no host synchronisation."""
        ranges = torch.stack([torch.cat(quantizer.range()) for quantizer in self._quantizers])
        self.rows.index_copy_(0, self._quantizers[0].batches.view(1) - 1, ranges[None])

    def history(self) -> list[dict[str, Any]]:
        """One {"step": n, "lo": [per site], "hi": [per site]} per batch, sites in execution order.

        Raises:
            Diverged: a range is not finite in the end, naming the site. Nothing looks at ranges again.
        """
        ends = self.rows.transpose(1, 2).tolist()
        for quantizer, lo, hi in zip(self._quantizers, *ends[-1], strict=True):
            if not (math.isfinite(lo) and math.isfinite(hi)):
                raise Diverged(
                    f"ranges: the range of '{quantizer.name}' is not finite after calibration, got [{lo}, {hi}]. "
                    "Look at the scale of the images, and at the input's mean and std."
                )
        return [{"step": n + 1, "lo": lo, "hi": hi} for n, (lo, hi) in enumerate(ends)]


def weight_range(weight: Tensor, axis: int, bits: int, kind: str) -> tuple[Tensor, Tensor] | None:
    """The frozen range a weight quantizer starts with; None where it follows the live weight."""
    if kind == "minmax":
        return None
    lo, hi = lp_search(weight, bits, axis=axis, signed=True, include_zero=False)
    finite = lo.isfinite() & hi.isfinite()
    if not bool(finite.all()):  # once, when the network is prepared
        channel = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"weight_range: weight must be finite, got NaN or infinity in channel {channel}")
    return lo, hi
