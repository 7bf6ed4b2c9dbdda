"""How bn_act's kernels in Triton cut [samples, channels, places] into tiles of rows and columns: one per program."""

import triton
import triton.language as tl

# 2048 elements are 16 per thread at 4 warps. The interpreter pays per program, not per element; there the rows that are
# summed stay few, because numpy adds them one after the other.
_TILE = 2048
_TILE_INTERPRETED = 1 << 16
_ROWS = 512
_WARPS = 4


@triton.jit
def place(
    samples,
    channels,
    places,
    count,
    chunks,
    columns,
    LAST: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
):
    """Where the tile lies: rows [R, 1], columns [1, L], the row's length, who is valid, channels, groups, chunk.

    `count` rows belong to a group and `chunks` chunks to its sums; `columns` tiles lie side by side in a row.
    """
    # 64 bits before the first multiplication: tensors may exceed 2^31 elements. One axis of programs: the others end
    # at 65535, which a row of 2^26 places passes.
    first, second = tl.program_id(0).to(tl.int64) // columns, tl.program_id(0).to(tl.int64) % columns
    col = (second * L + tl.arange(0, L))[None, :]
    if LAST:
        group, offset = first // chunks, (first % chunks) * R + tl.arange(0, R)[:, None]
        row, length, channel, chunk = group * count + offset, channels, col, first
        valid = (offset < count) & (col < channels)
    else:
        row, length = (first * R + tl.arange(0, R))[:, None], places
        channel, sample = row % channels, row // channels
        chunk = sample * columns + second
        # Rows past the last sample read its gradients, and write nothing.
        group = tl.minimum(sample, samples - 1) if PER_SAMPLE else sample * 0
        valid = (sample < samples) & (col < places)
    return row, col, length, valid, channel, group, chunk


class Cut:
    """How [samples, channels, places] is cut into tiles of R rows and L columns."""

    def __init__(self, samples, channels, places, last, per_sample):
        interpreted = triton.knobs.runtime.interpret
        tile = _TILE_INTERPRETED if interpreted else _TILE
        self.seen = samples, channels, places
        self.last, self.per_sample = last, per_sample
        length = channels if last else places
        self.L = max(8, min(triton.next_power_of_2(max(length, 1)), 32 if last and not interpreted else 1024))
        self.R = min(tile // self.L, _ROWS)
        self.columns = triton.cdiv(length, self.L)
        if last:
            self.groups = samples if per_sample else 1
            self.count = places if per_sample else samples * places
            self.chunks = triton.cdiv(self.count, self.R)
            self.all_chunks = self.groups * self.chunks
            self.grid = (self.all_chunks * self.columns,)
        else:
            self.groups, self.count, self.chunks = samples if per_sample else 1, 0, 1
            self.all_chunks = samples * self.columns
            self.grid = (triton.cdiv(samples * channels, self.R) * self.columns,)

    def launch(self, kernel, layer, tensors, **constants):
        """Runs a kernel on its own tensors, the layer's and the sizes, in this order. Nothing without elements."""
        if 0 in self.grid:
            return
        norm, act, quant = layer
        scale, zero_point, qmin, qmax, clip = (None, None, 0, 0, False) if quant is None else quant
        pointers = *tensors, *norm[:4], scale, zero_point
        stride = 0 if scale is None or scale.numel() == 1 else 1
        samples, channels, places = self.seen
        kernel[self.grid](
            *(tensors[0] if t is None else t for t in pointers),
            *(float(norm.eps), stride, float(qmin), float(qmax)),
            *(self.all_chunks * channels, samples, channels, places, self.count, self.chunks, self.columns),
            ACT=act,
            LAST=self.last,
            PER_SAMPLE=self.per_sample,
            HAS_RESIDUAL=tensors[1] is not None,
            HAS_GAMMA=norm.gamma is not None,
            HAS_BETA=norm.beta is not None,
            HAS_QUANT=quant is not None,
            CLIP=clip,
            R=self.R,
            L=self.L,
            num_warps=_WARPS,
            enable_fp_fusion=False,
            **constants,
        )
