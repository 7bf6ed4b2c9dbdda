"""Random resized crops: the sampling convention, the distribution of the draws, determinism and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_ext.synth import augment


def stream(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=stream(seed), dtype=dtype)


def one_by_one(x, crops, size):
    """Each image cut, resized by `interpolate` and flipped: what torchvision does, in a loop."""
    out = []
    for image, top, left, height, width, flip in zip(x, *(f.tolist() for f in crops), strict=True):
        cut = image[None, :, top : top + height, left : left + width]
        cut = F.interpolate(cut, size=size, mode="bilinear", align_corners=False, antialias=False)
        out.append(cut.flip(3) if flip else cut)
    return torch.cat(out)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    out=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    low=st.floats(0.02, 1.0),
)
def test_every_image_is_what_the_loop_makes_of_it(seed, height, width, out, low):
    x = normal(6, 3, height, width, seed=seed)
    crops = augment.draw_crops(6, (height, width), stream(seed), scale=(low, 1.0))
    # positions up to 40 in fp32, so weights to 4e-6, times differences of a few units
    torch.testing.assert_close(augment.resize_crops(x, crops, out), one_by_one(x, crops, out), rtol=0, atol=5e-5)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 64),
    width=st.integers(1, 64),
    low=st.floats(0.01, 1.0),
)
def test_crops_lie_inside_the_image(seed, height, width, low):
    crops = augment.draw_crops(50, (height, width), stream(seed), scale=(low, 1.0))
    assert (crops.top >= 0).all()
    assert (crops.left >= 0).all()
    assert (crops.height >= 1).all()
    assert (crops.width >= 1).all()
    assert (crops.top + crops.height <= height).all()
    assert (crops.left + crops.width <= width).all()


def test_draws_follow_the_published_distribution():
    crops = augment.draw_crops(20000, (224, 224), stream(1), scale=(0.4, 1.0))
    area = (crops.height * crops.width) / 224**2
    ratio = crops.width / crops.height
    # rounding to whole pixels moves both by less than a percent
    assert 0.39 < area.min() < 0.41
    assert area.max() <= 1
    assert 0.74 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.35
    # the logarithm of the ratio is symmetric, and a flip is a fair coin (3.5 standard errors)
    assert abs(ratio.log().mean().item()) < 0.005
    assert abs(crops.flip.float().mean().item() - 0.5) < 0.0125
    free = (224 - crops.height).float()
    placed = crops.top[free > 20] / free[free > 20]
    assert abs(placed.mean().item() - 0.5) < 0.01
    assert placed.min() == 0
    assert placed.max() == 1


def test_every_position_is_equally_likely():
    crops = augment.draw_crops(30000, (4, 4), stream(2), scale=(0.25, 0.25), ratio=(1.0, 1.0))
    assert (crops.height == 2).all()
    counts = torch.bincount(crops.top * 3 + crops.left, minlength=9)
    # binomial with p = 1/9: standard deviation 54
    assert (counts - 30000 / 9).abs().max() < 4 * 54.4


@pytest.mark.parametrize(
    ("size", "expected"), [((10, 100), (10, 13, 0, 43)), ((100, 10), (13, 10, 43, 0)), ((1, 1), (1, 1, 0, 0))]
)
def test_an_image_too_narrow_falls_back_to_the_centre(size, expected):
    crops = augment.draw_crops(3, size, stream(3), scale=(1.0, 1.0))
    for field, value in zip((crops.height, crops.width, crops.top, crops.left), expected, strict=True):
        assert (field == value).all()


def test_full_size_without_flip_is_the_identity_bit_for_bit():
    x = normal(4, 3, 17, 23)
    assert torch.equal(augment.random_resized_crop_flip(x, stream(4), (1, 1), (23 / 17, 23 / 17), flip=0), x)
    flipped = augment.random_resized_crop_flip(x, stream(4), (1, 1), (23 / 17, 23 / 17), flip=1)
    assert torch.equal(flipped, x.flip(3))


def test_a_nan_spoils_only_what_reads_it():
    x = normal(1, 1, 12, 12)
    x[0, 0, 6, 6] = torch.nan
    crops = augment.Crops(*torch.tensor([[2], [2], [8], [8]]), torch.tensor([False]))
    spoiled = augment.resize_crops(x, crops, (16, 16)).isnan()
    # pixel 4 of the crop is read from places within one pixel of it: outputs 7 to 10 of either axis
    assert spoiled.nonzero()[:, 2:].tolist() == [[i, j] for i in range(7, 11) for j in range(7, 11)]


def test_a_stream_decides_everything():
    x = normal(8, 3, 16, 16)
    first = augment.random_resized_crop_flip(x, stream(5))
    assert torch.equal(first, augment.random_resized_crop_flip(x, stream(5)))
    assert not torch.equal(first, augment.random_resized_crop_flip(x, stream(6)))
    state = torch.get_rng_state()
    generator = stream(5)
    augment.random_resized_crop_flip(x, generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generator.get_state(), stream(5).get_state())


def test_the_draw_does_not_depend_on_the_settings():
    """A stream advances by the same amount whatever the options, so switching one changes no later draw."""
    a, b = stream(7), stream(7)
    augment.draw_crops(4, (32, 32), a)
    augment.draw_crops(4, (224, 200), b, scale=(0.1, 0.2), flip=0)
    assert torch.equal(a.get_state(), b.get_state())


def test_gradient():
    x = normal(2, 2, 5, 4, dtype=torch.float64).requires_grad_()
    crops = augment.draw_crops(2, (5, 4), stream(8), scale=(0.3, 0.8))
    assert torch.autograd.gradcheck(lambda t: augment.resize_crops(t, crops, (6, 3)), x)


def test_the_backward_pass_runs_under_deterministic_algorithms():
    x = normal(4, 3, 8, 8).requires_grad_()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        augment.random_resized_crop_flip(x, stream(9)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    # every output pixel is an average, so the gradient adds up to the number of outputs
    assert x.grad.sum().item() == pytest.approx(x.numel(), rel=1e-5)


def test_precision_follows_the_images():
    x = normal(3, 3, 8, 8).bfloat16()
    crops = augment.draw_crops(3, (8, 8), stream(10))
    out = augment.resize_crops(x, crops)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, augment.resize_crops(x.float(), crops).bfloat16())
    exact = augment.resize_crops(x.float(), crops)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment.resize_crops(x.float(), crops), exact)


def test_no_images():
    assert augment.random_resized_crop_flip(torch.zeros(0, 3, 8, 8), stream(11)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale must be ascending"),
        ({"scale": (0.8, 0.5)}, "scale must be ascending"),
        ({"scale": (0.5, 1.5)}, "scale must be ascending"),
        ({"ratio": (2.0, 1.0)}, "ratio must be positive"),
        ({"flip": 1.5}, "flip must be a probability"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"draw_crops: {message}"):
        augment.random_resized_crop_flip(torch.zeros(1, 3, 8, 8), stream(0), **options)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\), got shape \(3, 8, 8\)"):
        augment.random_resized_crop_flip(torch.zeros(3, 8, 8), stream(0))
    with pytest.raises(ValueError, match="with B = 2 crops"):
        augment.resize_crops(torch.zeros(1, 3, 8, 8), augment.draw_crops(2, (8, 8), stream(0)))
