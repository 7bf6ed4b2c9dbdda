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
    assert_exports,
    assert_raises,
    assert_same,
    compiled,
    every,
    other_stream,
    path,
    refused,
    replayed,
    skip_refused,
    strides_like,
    unchanged,
)

from zsq_ext.ops import backend, cpu, reference, resize_crops, view_images
from zsq_ext.ops.cases import image as cases
from zsq_ext.ops.image import _edge_of

VIEW = {case.name: case for case in cases.VIEW}
CROP = {case.name: case for case in cases.CROP}
BOTH = pytest.mark.parametrize("case", [*cases.VIEW, *cases.CROP], ids=lambda c: f"{type(c).__name__}_{c.name}")

pytestmark = pytest.mark.usefixtures("poison")


def name_of(case):
    return "view_images" if isinstance(case, cases.ViewCase) else "resize_crops"


def public(case):
    return view_images if isinstance(case, cases.ViewCase) else resize_crops


def op_args(case, device="cpu", seed=0):
    """What the op gets: sigma as the weight that it makes."""
    args = case.args(device, seed)
    if isinstance(case, cases.CropCase):
        return tuple(args.values())
    return *(args[k] for k in ("x", "top", "left", "flip", "size")), _edge_of(case.sigma), args["low"], args["high"]


def backward_args(case, device="cpu"):
    _, *where = op_args(case, device)
    if isinstance(case, cases.CropCase):
        return case.grad(device), *where[:-1], case.shape[2:]
    top, left, flip, _, edge, _, _ = where
    return case.grad(device), top, left, flip, case.shape[2:], edge


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
    edge = _edge_of(1.25)
    assert (edge, 1 - 2 * edge) == pytest.approx((0.2961, 0.4078), abs=5e-5)
    assert [_edge_of(s) for s in (None, 0, 0.0, 1e-300)] == [0.0] * 4
    assert _edge_of(1e300) == pytest.approx(1 / 3)


def test_a_constant_stays_inside_and_fades_at_the_border():
    x = torch.full((1, 1, 6, 6), 7.0)
    zero = torch.zeros(1, dtype=torch.int64)
    y = view_images(x, zero, zero, zero.bool(), (6, 6))
    torch.testing.assert_close(y[0, 0, 1:-1, 1:-1], x[0, 0, 1:-1, 1:-1], rtol=3e-7, atol=0)  # 5 roundings
    torch.testing.assert_close(y[0, 0, 0, 1:-1], torch.full((4,), 7 * (1 - _edge_of(1.25))), rtol=3e-7, atol=0)


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


@pytest.mark.parametrize("case", [VIEW["plain"], CROP["plain"]], ids=name_of)
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
    if refused(fast, name_of(case), case.dtype, lambda: public(case)(**args)):
        return
    with backend.backend(name), unchanged(args):
        got = public(case)(**args)
    assert_same(got, getattr(reference, name_of(case))(*op_args(case)))
    assert got.stride() == strides_like(args["x"], case.size)


@BOTH
def test_backward_agrees_with_the_reference(case, fast):
    name, device = fast
    op = f"{name_of(case)}_backward"
    skip_refused(fast, op, case.dtype)
    args = backward_args(case, device)
    with backend.backend(name):
        got = getattr(torch.ops.zsq, op)(*args)
    assert_same(got, getattr(reference, op)(*backward_args(case)))
    assert got.stride() == strides_like(args[0], case.shape[2:])


@BOTH
def test_scalar_path_agrees_with_the_reference(case, scalar):
    name = name_of(case)
    assert_same(getattr(cpu, name)(*op_args(case)), getattr(reference, name)(*op_args(case)))
    back = f"{name}_backward"
    assert_same(getattr(cpu, back)(*backward_args(case)), getattr(reference, back)(*backward_args(case)))


@pytest.mark.parametrize("name", ["threads", "threads_channels_last"])
@pytest.mark.parametrize("table", [VIEW, CROP], ids=["view", "crop"])
def test_any_number_of_threads_gives_the_same_bits(table, name):
    case, found = table[name], []
    for threads in (1, 2, 5):
        with path(threads=threads):
            forward = getattr(cpu, name_of(case))(*op_args(case))
            found.append((forward, getattr(cpu, f"{name_of(case)}_backward")(*backward_args(case))))
        assert_same(found[-1], found[0])


# gradients


ADJOINT = ["plain", "tail", "whole_groups", "channels_last", "one_pixel", "one_row", "outside"]


@pytest.mark.parametrize("name", ["reference", "cpu"])  # the others have their bits, and no float64
def test_adjoints_are_exact(name):
    """<A x, y> = <x, A^T y>."""
    if backend.missing(name):
        pytest.skip(f"{name}: {backend.missing(name)}")
    some = [VIEW[k] for k in (*ADJOINT, "corners", "sharp_corners", "everything")]
    some += [CROP[k] for k in (*ADJOINT, "larger", "smaller", "mixed", "pixel", "full")]
    for case in some:
        x, *where = op_args(case)
        if isinstance(case, cases.ViewCase):
            where[-2:] = None, None
        x, grad = x.double(), case.grad().double()
        with backend.backend(name):
            y = getattr(torch.ops.zsq, name_of(case))(x, *where)
            back = getattr(torch.ops.zsq, f"{name_of(case)}_backward")(grad, *backward_args(case)[1:])
        left, right = (y * grad).sum(), (x * back).sum()
        # every product went through at most 20 roundings or so, each of half a unit
        assert abs(left - right) <= 20 * torch.finfo(torch.float64).eps * (y * grad).abs().sum(), case.name


@every(cases.VIEW)
def test_pixels_outside_the_view_get_an_exact_zero(case):
    if case.values == "special" or case.corner == "outside":
        return
    args = backward_args(case)
    got = reference.view_images_backward(*args)
    reach = 0 if not case.sigma else 1
    for dx, i, j, flip in zip(got, *(t.tolist() for t in args[1:4]), strict=True):
        seen = torch.zeros(case.shape[2:], dtype=torch.bool)
        if min(case.size):
            seen[max(0, i - reach) : i + case.size[0] + reach, max(0, j - reach) : j + case.size[1] + reach] = True
        outside = dx.masked_fill(seen.flip(1) if flip else seen, 0)
        assert_same(outside, torch.zeros_like(outside))


def test_the_clip_passes_every_gradient():
    args = VIEW["plain"].args()
    x, grad = args["x"].requires_grad_(), VIEW["plain"].grad()
    narrow = {**args, "low": torch.zeros(3), "high": torch.zeros(3)}
    y = view_images(**narrow)
    assert not y.any()
    (clipped,) = torch.autograd.grad(y, x, grad)
    (free,) = torch.autograd.grad(view_images(**{**args, "low": None, "high": None}), x, grad)
    assert_same(clipped, free)
    assert clipped.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout):
    double = {"dtype": torch.float64, "layout": layout, "shape": (2, 2, 4, 5)}
    view = cases.ViewCase("", size=(3, 3), clip=False, **double).args()
    crop = cases.CropCase("", size=(3, 6), **double).args()
    for function, args in ((view_images, view), (resize_crops, crop)):
        x = args.pop("x").requires_grad_()
        torch.autograd.gradcheck(lambda x, f=function, a=args: f(x, **a), x)
        torch.autograd.gradgradcheck(lambda x, f=function, a=args: f(x, **a) ** 2, x)


@pytest.mark.parametrize("case", [VIEW["plain"], CROP["plain"]], ids=name_of)
def test_only_places_are_saved(case):
    args = case.args()
    y = public(case)(**{**args, "x": args["x"].requires_grad_()})
    assert {t.dtype for t in y.grad_fn.saved_tensors} == {torch.int64, torch.bool}
    with torch.no_grad():
        assert not public(case)(**args).requires_grad


@pytest.mark.parametrize("case", [VIEW["plain"], CROP["plain"]], ids=name_of)
def test_autocast_keeps_the_dtype(case):
    args = case.args()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(public(case)(**args), getattr(reference, name_of(case))(*op_args(case)))


# errors


def _good(view):
    zero, one = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    good = {"x": torch.zeros(2, 3, 8, 8), "top": zero, "left": zero, "flip": zero.bool(), "size": (4, 4)}
    return good | ({"low": torch.zeros(3), "high": torch.ones(3)} if view else {"height": one, "width": one})


@every(cases.VIEW_ERRORS)
def test_errors_of_views_name_the_argument(case):
    assert_raises(case, view_images, _good(view=True))


@every(cases.CROP_ERRORS)
def test_errors_of_crops_name_the_argument(case):
    assert_raises(case, resize_crops, _good(view=False))


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
    float_args = op_args(cases.CropCase("", case.shape, case.size), seed=seed)
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


# torch's machinery

# Not nan_inf: opcheck compares results by value, and NaN differs from itself.
OPCHECK = ["plain", "channels_last", "one_pixel", "no_images", "no_output", "strided", "expanded", "permuted"]
OPCHECK += ["fp16_contiguous", "bf16_channels_last", "fp64_contiguous"]


@pytest.mark.parametrize("name", OPCHECK)
@pytest.mark.parametrize("table", [VIEW, CROP], ids=["view", "crop"])
def test_opcheck(table, name):
    case = table[name]
    torch.library.opcheck(getattr(torch.ops.zsq, name_of(case)).default, op_args(case))
    torch.library.opcheck(getattr(torch.ops.zsq, f"{name_of(case)}_backward").default, backward_args(case))


@every([VIEW["plain"], VIEW["channels_last"], CROP["plain"]])
def test_compile_keeps_the_op(case):
    args = case.args()
    x = args.pop("x").requires_grad_()
    out, graphs = compiled(lambda x: public(case)(x, **args), x)
    (got,) = torch.autograd.grad(out, x, case.grad())
    assert any(f"zsq.{name_of(case)}" in op for op in graphs[0])
    assert_same(out, getattr(reference, name_of(case))(*op_args(case)))
    assert_same(got, getattr(reference, f"{name_of(case)}_backward")(*backward_args(case)))


class Pipeline(torch.nn.Module):
    def forward(self, x, start, flip):
        x = view_images(x, start, start, flip, (7, 6), low=torch.full((3,), -1.0), high=torch.ones(3))
        return resize_crops(x, start, start, start + 3, start + 2, flip, (5, 9))


def test_export_keeps_the_ops():
    def inputs(batch):
        rng = torch.Generator().manual_seed(batch)
        start = torch.randint(0, 3, (batch,), generator=rng)
        return torch.randn(batch, 3, 10, 8, generator=rng), start, start > 0

    assert_exports(Pipeline(), inputs(2), inputs(5), "view_images", "resize_crops")


def test_meta_tensors_have_a_shape_and_no_values():
    x, n = torch.empty(2, 3, 8, 8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    assert view_images(x, n, n, n.bool(), (5, 4)).shape == (2, 3, 5, 4)
    assert resize_crops(x, n, n, n, n, n.bool(), (5, 14)).shape == (2, 3, 5, 14)


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("case", [VIEW["plain"], CROP["plain"]], ids=name_of)
def test_cuda_graph_replays_with_new_contents(name, case):
    args = case.args("cuda")

    def change():
        for k, t in case.args("cuda", seed=7).items():
            if isinstance(t, torch.Tensor) and k not in ("low", "high"):
                args[k].copy_(t)

    with backend.backend(name):
        out = replayed(lambda: public(case)(**args), change)
    expected = op_args(case, seed=7)
    if isinstance(case, cases.ViewCase):
        expected = *expected[:-2], args["low"].cpu(), args["high"].cpu()
    assert_same(out, getattr(reference, name_of(case))(*expected))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_runs_on_the_current_stream(name):
    case = VIEW["threads"]
    args = case.args("cuda")
    with other_stream(), backend.backend(name):
        args["x"].mul_(2)
        out = view_images(**args)
    expected = op_args(case)
    assert_same(out, reference.view_images(expected[0] * 2, *expected[1:]))
