"""view_images and resize_crops: what they mean, that every backend agrees, and that adjoints are exact.

Broken on purpose on the CPU, each seen red; what caught it first (p: parity with the reference):

    mirrored after the crop                     a view is what a convolution makes of it [plain]
    a*b + c contracted                          flip comes first [tail]
    neighbours weighted before they are added   flip comes first [tail]
    the border repeated instead of +0           a view is what a convolution makes of it [plain]
    NaN clipped to a bound                      NaN reaches what reads it
    mirrored lanes left in their order          float32 keeps to the exact values
    a line held under a wrong number            a view is what a convolution makes of it [plain]
    the first channel's bounds for all          a view is what a convolution makes of it [plain]
    the adjoint shifted the other way           p, backward [plain]
    a tap of weight 0 beyond the crop           p, forward [nan_inf]
    reciprocal instead of division              p, forward [plain]
    one output too few in a sum                 p, backward [plain]
    summed in the other direction               p, backward [plain]
    pixels outside the crop not written         p, backward [plain], on poisoned memory
    contiguous memory assumed                   a crop is what interpolate makes of it [channels_last]
    mirroring ignored in the adjoint            p, backward [plain]
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    assert_same,
    path,
    refused,
    skip_refused,
    strides_like,
    unchanged,
)

from zsq_ext import ops
from zsq_ext.ops import backend, cpu, reference, resize_crops, view_images
from zsq_ext.ops.cases import image as cases
from zsq_ext.ops.image import edge_of

VIEW = {case.name: case for case in cases.VIEW}
CROP = {case.name: case for case in cases.CROP}
BOTH = pytest.mark.parametrize("case", [*cases.VIEW, *cases.CROP], ids=lambda c: f"{type(c).__name__}_{c.name}")

pytestmark = pytest.mark.usefixtures("poison")


def public(case):
    return getattr(ops, case.op)


# meaning


def looped_view(x, top, left, flip, size, sigma, low, high):
    """DGH's pipeline, image by image, with the depthwise convolution of its two-dimensional kernel."""
    g = torch.exp(-(torch.arange(-1.0, 2, dtype=x.dtype) ** 2) / (2 * sigma**2)) if sigma else torch.tensor([0.0, 1, 0])
    g = (g / g.sum()).to(x.dtype)
    out = []
    for image, i, j, f in zip(x, top.tolist(), left.tolist(), flip.tolist(), strict=True):
        image = (image.flip(2) if f else image)[:, None]
        image = F.conv2d(image, (g[:, None] * g)[None, None], padding=1)[:, 0]
        view = image[:, i : i + size[0], j : j + size[1]]
        out.append(view if low is None else view.clamp(low[:, None, None], high[:, None, None]))
    return torch.stack(out)


def looped_crops(x, top, left, height, width, flip, size):
    out = []
    for image, *crop, f in zip(x, *(t.tolist() for t in (top, left, height, width, flip)), strict=True):
        i, j, h, w = crop
        cut = F.interpolate(image[None, :, i : i + h, j : j + w], size=size, mode="bilinear", align_corners=False)
        out.append(cut.flip(3) if f else cut)
    return torch.cat(out)


MEANT = ["plain", "tail", "whole_groups", "one_channel", "one_pixel", "one_row", "channels_last", "threads"]


@pytest.mark.parametrize("name", [*MEANT, "corners", "everything", "sharp", "wide_sigma", "narrow_sigma", "no_clip"])
def test_a_view_is_what_a_convolution_makes_of_it(name):
    args = {k: t.double() if k in ("x", "low", "high") and t is not None else t for k, t in VIEW[name].args().items()}
    # sums of 9 products of numbers below 5, in float64
    torch.testing.assert_close(view_images(**args), looped_view(**args), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [*MEANT, "larger", "smaller", "mixed", "full", "pixel"])
def test_a_crop_is_what_interpolate_makes_of_it(name):
    args = CROP[name].args()
    args["x"] = args["x"].double()
    # interpolate's places, up to 161, are products rounded in float64: to 3e-14, times differences below 10
    torch.testing.assert_close(resize_crops(**args), looped_crops(**args), rtol=0, atol=1e-12)


def test_float32_keeps_to_the_exact_values():
    for case, exact in ((VIEW["threads"], looped_view), (CROP["threads"], looped_crops)):
        args = case.args()
        wide = {k: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in args.items()}
        # a product of two weights and at most 4 roundings after it, of numbers below 5: unlike matrix products, places
        # add nothing
        got = public(case)(**args).double()
        torch.testing.assert_close(got, exact(**wide), rtol=0, atol=8 * 2**-24 * 5)


def test_documented_weights():
    edge = edge_of(1.25)
    assert (edge, 1 - 2 * edge) == pytest.approx((0.2961, 0.4078), abs=5e-5)
    assert [edge_of(s) for s in (None, 0, 0.0, 1e-300)] == [0.0] * 4
    assert edge_of(1e300) == pytest.approx(1 / 3)


def test_a_constant_stays_inside_and_fades_at_the_border():
    x = torch.full((1, 1, 6, 6), 7.0)
    zero = torch.zeros(1, dtype=torch.int64)
    y = view_images(x, zero, zero, zero.bool(), (6, 6))
    torch.testing.assert_close(y[0, 0, 1:-1, 1:-1], x[0, 0, 1:-1, 1:-1], rtol=3e-7, atol=0)  # 5 roundings
    torch.testing.assert_close(y[0, 0, 0, 1:-1], torch.full((4,), 7 * (1 - edge_of(1.25))), rtol=3e-7, atol=0)


def test_flip_comes_first():
    case = VIEW["tail"]
    args = case.args()
    args["flip"][:] = True
    mirrored = {**args, "x": args["x"].flip(3), "flip": ~args["flip"]}
    assert_same(view_images(**args), view_images(**mirrored))


def test_a_full_crop_is_the_image_and_its_mirror_image():
    args = CROP["full"].args()
    x, flip = args["x"], args["flip"]
    assert_same(resize_crops(**args), torch.where(flip[:, None, None, None], x.flip(3), x))


def test_nan_reaches_what_reads_it_and_nothing_else():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = torch.nan
    zero, nine = torch.zeros(1, dtype=torch.int64), torch.full((1,), 9)
    seen = view_images(x, zero, zero, zero.bool(), (9, 9), low=-torch.ones(1), high=torch.ones(1))
    assert seen.isnan().nonzero()[:, 2:].tolist() == [[i, j] for i in (3, 4, 5) for j in (3, 4, 5)]
    # a full crop reads the pixel itself, and with a weight of 0 the one after it
    read = resize_crops(x, zero, zero, nine, nine, zero.bool(), (9, 9))
    assert read.isnan().nonzero()[:, 2:].tolist() == [[i, j] for i in (3, 4) for j in (3, 4)]


def test_where_the_bounds_cross_the_upper_one_holds():
    x = torch.tensor([-5.0, 0.0, 5.0]).view(1, 1, 1, 3)
    zero = torch.zeros(1, dtype=torch.int64)
    y = view_images(x, zero, zero, zero.bool(), (1, 3), sigma=None, low=torch.ones(1), high=-torch.ones(1))
    assert y.tolist() == [[[[-1.0] * 3]]]


@pytest.mark.parametrize("case", [VIEW["plain"], CROP["plain"]], ids=lambda case: case.op)
def test_int32_and_strided_places_are_taken(case):
    args = case.args()
    expected = public(case)(**args)
    for k in ("top", "left", "height", "width"):
        if k in args:
            args[k] = args[k].repeat_interleave(2).int()[::2]
    args["flip"] = args["flip"].repeat_interleave(2)[::2]
    assert_same(public(case)(**args), expected)


# parity


@BOTH
def test_forward_agrees_with_the_reference(case, fast):
    name, device = fast
    args = case.args(device)
    if refused(fast, case.op, case.dtype, lambda: public(case)(**args)):
        return
    with backend.backend(name), unchanged(args):
        got = public(case)(**args)
    assert_same(got, getattr(reference, case.op)(*case.op_args()))
    assert got.stride() == strides_like(args["x"], case.size)


@BOTH
def test_backward_agrees_with_the_reference(case, fast):
    name, device = fast
    op = f"{case.op}_backward"
    skip_refused(fast, op, case.dtype)
    args = case.backward_args(device)
    with backend.backend(name):
        got = getattr(torch.ops.zsq, op)(*args)
    assert_same(got, getattr(reference, op)(*case.backward_args()))
    assert got.stride() == strides_like(args[0], case.shape[2:])


@BOTH
def test_scalar_path_agrees_with_the_reference(case, scalar):
    name = case.op
    assert_same(getattr(cpu, name)(*case.op_args()), getattr(reference, name)(*case.op_args()))
    back = f"{name}_backward"
    assert_same(getattr(cpu, back)(*case.backward_args()), getattr(reference, back)(*case.backward_args()))


@pytest.mark.parametrize("name", ["threads", "threads_channels_last"])
@pytest.mark.parametrize("table", [VIEW, CROP], ids=["view", "crop"])
def test_any_number_of_threads_gives_the_same_bits(table, name):
    case, found = table[name], []
    for threads in (1, 2, 5):
        with path(threads=threads):
            forward = getattr(cpu, case.op)(*case.op_args())
            found.append((forward, getattr(cpu, f"{case.op}_backward")(*case.backward_args())))
        assert_same(found[-1], found[0])


# properties


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), full=st.integers(1, 40), size=st.integers(1, 60))
def test_crops_of_any_size_have_weights_of_one_and_exact_adjoints(seed, full, size):
    case = cases.CropCase("", (3, 1, full, full + 3), (size, size + 2), torch.float64)
    args = case.args(seed=seed)
    ones = {**args, "x": torch.ones_like(args["x"])}
    torch.testing.assert_close(resize_crops(**ones), torch.ones(3, 1, size, size + 2).double(), rtol=1e-15, atol=0)
    x, grad = args["x"].requires_grad_(), case.grad(seed=seed)
    y = resize_crops(**args)
    (back,) = torch.autograd.grad(y, x, grad)
    # sums of thousands of products of either sign
    assert ((y * grad).sum() - (x * back).sum()).abs() <= 1e-13 * (y * grad).abs().sum()
    float_args = cases.CropCase("", case.shape, case.size).op_args(seed=seed)
    assert_same(cpu.resize_crops(*float_args), reference.resize_crops(*float_args))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), sigma=st.floats(0.2, 5))
def test_images_may_change_places(seed, sigma):
    case = cases.ViewCase("", sigma=sigma)
    args = case.args(seed=seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    moved = {k: args[k][order] if k in ("x", "top", "left", "flip") else args[k] for k in args}
    assert_same(view_images(**args)[order], view_images(**moved))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_a_view_of_everything_holds_every_view(seed):
    args = VIEW["plain"].args(seed=seed)
    whole = view_images(**{**args, "top": args["top"] * 0, "left": args["left"] * 0, "size": (13, 21)})
    for part, all_, i, j in zip(view_images(**args), whole, args["top"].tolist(), args["left"].tolist(), strict=True):
        assert_same(part, all_[:, i : i + 9, j : j + 18])
