"""Every op on more than 2^31 elements: indices have 64 bits. Slow: each takes up to 8 GiB, and on a CPU many seconds.

All is zero but for the last elements, which 32 bits do not reach; what they become is known from them alone.
"""

import os

import pytest
import torch
from parity import assert_same

from zsq_ext.ops import (
    adaround,
    backend,
    bn_act,
    cam_map,
    channel_range,
    count_active,
    dequantize,
    fake_quant,
    fake_quant_minmax,
    quantize,
    reference,
    resize_crops,
    view_images,
)
from zsq_ext.ops.reference.qdrop import philox

pytestmark = pytest.mark.slow

MEMORY = 9 << 30
ROW = (2**31 // 3 // 4 + 257) * 4  # three of them, none a whole number of blocks, and read as int64 below
LAST = torch.tensor([0.24, 0.26, 9.0, -9.0, 0.5], dtype=torch.float16)


def free_memory(device):
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(params=["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton"))])
def device(request):
    """The device of each backend, which is in force."""
    device = "cpu" if request.param == "cpu" else "cuda"
    if reason := backend.missing(request.param):
        pytest.skip(reason)
    if free_memory(device) < MEMORY:
        pytest.skip(f"less than {MEMORY >> 30} GiB are free on {device}")
    with backend.backend(request.param):
        yield device


def rows(device, last=LAST):
    x = torch.zeros(3, ROW, dtype=last.dtype, device=device)
    x[:, -len(last) :] = last
    return x


def ends(t, count=5):
    """The last columns of a tensor of rows, on the CPU. Everything before them must be zero; the tensor is spent."""
    found = t[:, -count:].cpu().clone()
    t[:, -count:] = 0
    assert not t.view(torch.int64).any()
    return found


def grid(device, zero_point=torch.int32):
    return torch.tensor([0.5, 0.25, 1.0], device=device), torch.zeros(3, dtype=zero_point, device=device)


def three(t):
    return t.expand(3, -1)


def test_fake_quant(device):
    last = torch.cat([LAST, LAST[:1] * torch.nan])
    x, (scale, zero_point) = rows(device, last), grid(device)
    per_tensor = fake_quant(x, scale[:1], zero_point[:1], -8, 7)
    assert_same(ends(per_tensor, 6), reference.fake_quant(three(last), *(t[:1] for t in grid("cpu")), -8, 7))
    del per_tensor
    out = fake_quant(x, scale, zero_point, -8, 7, axis=0)
    assert_same(ends(out, 6), reference.fake_quant(three(last), *grid("cpu"), -8, 7, 0))


def test_fake_quant_backward(device):
    x = rows(device)  # and the gradient too
    dx = torch.ops.zsq.fake_quant_backward(x, x, *grid(device), -8, 7, 0)
    assert_same(ends(dx), reference.fake_quant_backward(three(LAST), three(LAST), *grid("cpu"), -8, 7, 0))


def test_lsq(device):
    x = rows(device)
    dx, *sums = torch.ops.zsq.fake_quant_lsq_backward(x, x, *grid(device, torch.float32), -8, 7, 0)
    last = three(LAST)
    expected = reference.fake_quant_lsq_backward(last, last, *grid("cpu", torch.float32), -8, 7, 0)
    assert_same(ends(dx), expected[0])
    for got, want in zip(sums, expected[1:], strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=2.0**-20, atol=0)  # five terms


def test_lsq_channels_last(device):
    last = torch.cat([LAST, LAST[:1] * 0]).view(6, 1).expand(6, 3)
    x = torch.zeros(ROW, 3, dtype=torch.float16, device=device)
    x[-6:] = last.to(device)
    dx, *sums = torch.ops.zsq.fake_quant_lsq_backward(x, x, *grid(device), -8, 7, 1)
    expected = reference.fake_quant_lsq_backward(last, last, *grid("cpu"), -8, 7, 1)
    assert_same(dx[-6:].cpu(), expected[0])
    for got, want in zip(sums, expected[1:], strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=2.0**-20, atol=0)


def test_fake_quant_many(device):
    x, (scale, zero_point) = rows(device), grid(device)
    lists = [x], [scale], [zero_point], [-8], [7], [0]
    (out,) = torch.ops.zsq.fake_quant_many(*lists)
    assert_same(ends(out), reference.fake_quant(three(LAST), *grid("cpu"), -8, 7, 0))
    del out
    (dx,), *sums = torch.ops.zsq.fake_quant_many_backward([x], *lists, [True], [True])
    last = three(LAST)
    expected = reference.fake_quant_lsq_backward(last, last, *grid("cpu"), -8, 7, 0)
    assert_same(ends(dx), expected[0])
    for got, want in zip(sums, expected[1:], strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=2.0**-20, atol=0)  # five terms


def test_lp_error(device):
    scale, zero_point = (t[:, None] for t in grid(device))
    got = torch.ops.zsq.lp_error(rows(device), scale, zero_point, -8, 7, 2.0, 0)
    expected = reference.lp_error(three(LAST), *(t[:, None] for t in grid("cpu")), -8, 7, 2.0, 0)
    torch.testing.assert_close(got.cpu(), expected, rtol=2.0**-20, atol=0)  # a zero lies on every grid


def test_quantize_and_dequantize(device):
    code = quantize(rows(device), *grid(device), -8, 7, axis=0)
    expected = reference.quantize(three(LAST), *grid("cpu"), -8, 7, 0)
    assert_same(code[:, -5:].cpu(), expected)
    values = dequantize(code, *grid(device), 0, torch.float16)
    assert_same(ends(values), reference.dequantize(expected, *grid("cpu"), 0, torch.float16))
    code[:, -5:] = 0
    assert not code.view(torch.int32).any()


def test_fake_quant_minmax(device):
    (out,), (scale,), _ = fake_quant_minmax([rows(device)], 4, [0], return_grid=True)
    with backend.backend("reference"):
        (expected,), (wanted,), _ = fake_quant_minmax([three(LAST)], 4, [0], return_grid=True)
    assert_same(scale, wanted)
    assert_same(ends(out), expected)


def test_channel_range(device):
    lo, hi = channel_range(rows(device), 0)
    assert (lo.tolist(), hi.tolist()) == ([-9.0] * 3, [9.0] * 3)
    lo, hi = channel_range(rows(device))
    assert (lo.tolist(), hi.tolist()) == ([-9.0], [9.0])


def test_adaround(device):
    v = rows(device, torch.tensor([9.0, 0.25, 1.0, -1.0], dtype=torch.float16))
    v[:, :-4] = -9.0
    # The bits of v are as good a base as any: those of -9 and its like are below qmin, and come out as it.
    args = torch.tensor([0.5, 0.25, 1.0]), torch.zeros(3, dtype=torch.int32), 0, 32766, 0
    few = v[:, -4:].clone()
    expected = adaround(few, few.view(torch.int16), *(t.to(device) if torch.is_tensor(t) else t for t in args))
    out = adaround(v, v.view(torch.int16), *(t.to(device) if torch.is_tensor(t) else t for t in args))
    assert expected.any()
    assert_same(ends(out, 4), expected)


def test_bn_act(device):
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    y, s1, _, lo, hi = bn_act(rows(device)[None], zero, one, None, None, 0.0, act="relu6", stats="batch", extremes=True)
    assert (lo.tolist(), hi.tolist()) == ([0] * 3, [6] * 3)
    assert s1.tolist() == pytest.approx([1.0] * 3, abs=1e-3)  # 0.24 + 0.26 + 0.5, each rounded to float16
    assert_same(ends(y[0]), three(LAST).clamp(0, 6))


def test_qdrop(device):
    x = torch.ones(2**31 + 40, dtype=torch.float16, device=device)
    key = torch.tensor([42, 7], device=device)
    out, _ = torch.ops.zsq.qdrop_backward(x, 2**23, key, True, False)  # draws as the forward does, and reads less
    # Block 2^29 and on: the words of a few elements beyond 2^31, by the reference's generator
    first = x.numel() - 64
    block = torch.arange(first // 4, x.numel() // 4)
    words = philox(
        [block & (2**32 - 1), block >> 32, torch.tensor(7), torch.tensor(0)], [torch.tensor(42), torch.tensor(0)]
    )
    assert torch.equal(out[first:].cpu() == 1, (torch.stack(words, -1) >> 8 < 2**23).flatten())


def test_images(device):
    side, batch = 4096, 2**31 // 4096**2 + 1
    x = torch.zeros(batch, 1, side, side, dtype=torch.float16, device=device)
    x[-1, 0, -1, -1] = 1
    zero = torch.zeros(batch, dtype=torch.int64, device=device)
    full, flip = zero + side, zero.bool()
    ops = torch.ops.zsq
    for call in (
        lambda: view_images(x, zero, zero, flip, (side, side), sigma=None),
        lambda: ops.view_images_backward(x, zero, zero, flip, (side, side), 0.0),
        lambda: resize_crops(x, zero, zero, full, full, flip, (side, side)),
        lambda: ops.resize_crops_backward(x, zero, zero, full, full, flip, (side, side)),
    ):
        y = call()
        assert y[-1, 0, -1, -1] == 1
        y[-1, 0, -1, -1] = 0
        assert not y.view(torch.int64).any()
        del y


def test_distill_head(device):
    samples, classes = 2**31 // 1000 + 1, 1000
    x = torch.zeros(samples, classes, dtype=torch.float16, device=device)
    x[-1, -1] = 9.0
    labels = torch.full((samples,), classes - 1, device=device)
    easy = torch.zeros(samples, dtype=torch.bool, device=device)
    easy[-1] = True
    how = "mse", 1.0, 1.0, float(samples), None, False
    kd, ce, _, counts, saved = torch.ops.zsq.distill_head(x, x, labels, easy, *how)
    alone = torch.nn.functional.cross_entropy(x[-1:].float(), labels[-1:])
    assert kd == 0
    torch.testing.assert_close(ce, alone, rtol=1e-4, atol=0)
    assert counts.tolist() == [1, samples, 1]  # all others predict class 0
    one = torch.ones((), device=device)
    ds, _ = torch.ops.zsq.distill_head_backward(x, x, labels, easy, saved, one, one, *how[:4], True, False)
    assert -1 < ds[-1, -1] < 0
    ds[-1] = 0
    assert not ds.view(torch.int64).any()


def test_cam_map_and_count_active(device):
    n = 2**31 // (64 * 1024) + 1
    x = torch.zeros(n, 64, 32, 32, dtype=torch.float16, device=device)
    x[-1, -1, -1, -1] = 2.0
    alpha = torch.full((n, 64), 0.5, device=device)
    maps = cam_map(x, alpha)
    assert (maps[-1, -1, -1].item(), maps.count_nonzero().item()) == (1, 1)
    count = count_active(x)
    assert (count[-1, -1].item(), count.sum().item()) == (1, 1)
    dx = torch.ops.zsq.cam_map_backward(x, alpha, maps, torch.ones_like(maps), None)
    assert dx[-1, :, -1, -1].tolist() == [0.5] * 64
    dx[-1, :, -1, -1] = 0
    assert not dx.view(torch.int64).any()
