"""view_images and resize_crops: their gradients, what they refuse, and torch's machinery."""

import pytest
import torch
from parity import (
    assert_exports,
    assert_raises,
    assert_same,
    compiled,
    every,
    other_stream,
    replayed,
)

from zsq_ext import ops
from zsq_ext.ops import backend, reference, resize_crops, view_images
from zsq_ext.ops.cases import image as cases

VIEW = {case.name: case for case in cases.VIEW}
CROP = {case.name: case for case in cases.CROP}
BOTH = pytest.mark.parametrize("case", [*cases.VIEW, *cases.CROP], ids=lambda c: f"{type(c).__name__}_{c.name}")

pytestmark = pytest.mark.usefixtures("poison")


def public(case):
    return getattr(ops, case.op)


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
        x, *where = case.op_args()
        if isinstance(case, cases.ViewCase):
            where[-2:] = None, None
        x, grad = x.double(), case.grad().double()
        with backend.backend(name):
            y = getattr(torch.ops.zsq, case.op)(x, *where)
            back = getattr(torch.ops.zsq, f"{case.op}_backward")(grad, *case.backward_args()[1:])
        left, right = (y * grad).sum(), (x * back).sum()
        # every product went through at most 20 roundings or so, each of half a unit
        assert abs(left - right) <= 20 * torch.finfo(torch.float64).eps * (y * grad).abs().sum(), case.name


@every(cases.VIEW)
def test_pixels_outside_the_view_get_an_exact_zero(case):
    if case.values == "special" or case.corner == "outside":
        return
    args = case.backward_args()
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


@pytest.mark.parametrize("case", [VIEW["plain"], CROP["plain"]], ids=lambda case: case.op)
def test_only_places_are_saved(case):
    args = case.args()
    y = public(case)(**{**args, "x": args["x"].requires_grad_()})
    assert {t.dtype for t in y.grad_fn.saved_tensors} == {torch.int64, torch.bool}
    with torch.no_grad():
        assert not public(case)(**args).requires_grad


@pytest.mark.parametrize("case", [VIEW["plain"], CROP["plain"]], ids=lambda case: case.op)
def test_autocast_keeps_the_dtype(case):
    args = case.args()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(public(case)(**args), getattr(reference, case.op)(*case.op_args()))


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


# torch's machinery

# Not nan_inf: opcheck compares results by value, and NaN differs from itself.
OPCHECK = ["plain", "channels_last", "one_pixel", "no_images", "no_output", "strided", "expanded", "permuted"]
OPCHECK += ["fp16_contiguous", "bf16_channels_last", "fp64_contiguous"]


@pytest.mark.parametrize("name", OPCHECK)
@pytest.mark.parametrize("table", [VIEW, CROP], ids=["view", "crop"])
def test_opcheck(table, name):
    case = table[name]
    torch.library.opcheck(getattr(torch.ops.zsq, case.op).default, case.op_args())
    torch.library.opcheck(getattr(torch.ops.zsq, f"{case.op}_backward").default, case.backward_args())


@every([VIEW["plain"], VIEW["channels_last"], CROP["plain"]])
def test_compile_keeps_the_op(case):
    args = case.args()
    x = args.pop("x").requires_grad_()
    out, graphs = compiled(lambda x: public(case)(x, **args), x)
    (got,) = torch.autograd.grad(out, x, case.grad())
    assert any(f"zsq.{case.op}" in op for op in graphs[0])
    assert_same(out, getattr(reference, case.op)(*case.op_args()))
    assert_same(got, getattr(reference, f"{case.op}_backward")(*case.backward_args()))


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
@pytest.mark.parametrize("case", [VIEW["plain"], CROP["plain"]], ids=lambda case: case.op)
def test_cuda_graph_replays_with_new_contents(name, case):
    args = case.args("cuda")

    def change():
        for k, t in case.args("cuda", seed=7).items():
            if isinstance(t, torch.Tensor) and k not in ("low", "high"):
                args[k].copy_(t)

    with backend.backend(name):
        out = replayed(lambda: public(case)(**args), change)
    expected = case.op_args(seed=7)
    if isinstance(case, cases.ViewCase):
        expected = *expected[:-2], args["low"].cpu(), args["high"].cpu()
    assert_same(out, getattr(reference, case.op)(*expected))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_runs_on_the_current_stream(name):
    case = VIEW["threads"]
    args = case.args("cuda")
    with other_stream(), backend.backend(name):
        args["x"].mul_(2)
        out = view_images(**args)
    expected = case.op_args()
    assert_same(out, reference.view_images(expected[0] * 2, *expected[1:]))
