"""Class activation maps: gradients, profiles, degenerate maps and errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_ext.tune import cam


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(batch=3, channels=6, size=(5, 4), dtype=torch.float64):
    activations = [normal(batch, channels, *size, seed=s, dtype=dtype) for s in (1, 2)]
    alphas = [normal(batch, channels, seed=s, dtype=dtype) for s in (3, 4)]
    return alphas[0], activations[0], alphas[1], activations[1]


def released_loss(student_alpha, student, teacher_alpha, teacher, size):
    """Upsample, stretch, compare, with the upsampled maps formed."""
    maps = []
    for alpha, activation in ((student_alpha, student), (teacher_alpha, teacher)):
        s = (alpha.clamp_min(1e-10)[:, :, None, None] * activation).sum(1).relu()
        s = F.interpolate(s[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)
        low, high = s.amin(1, keepdim=True), s.amax(1, keepdim=True)
        maps.append((s - low) / (high - low + 1e-10))
    return F.mse_loss(*maps)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    native=st.tuples(st.integers(1, 8), st.integers(1, 8)).filter(lambda s: s != (1, 1)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_the_small_form_is_the_released_loss_at_every_size(seed, native, size):
    maps = [normal(2, 1, *native, seed=seed + i, dtype=torch.float64).abs() for i in (0, 1)]
    alpha = torch.ones(2, 1, dtype=torch.float64)
    ours = cam.cam_loss(alpha, maps[0], alpha, maps[1], size=size)
    # a map that turns flat when resized is rounding noise (1e-16) over 1e-10 in the released form, zero in ours
    torch.testing.assert_close(ours, released_loss(alpha, maps[0], alpha, maps[1], size), rtol=1e-9, atol=1e-11)


def test_the_gradient_is_the_released_one_too():
    sa, s, ta, t = pair()
    ours, released = s.clone().requires_grad_(), s.clone().requires_grad_()
    cam.cam_loss(sa, ours, ta, t, size=(20, 16)).backward()
    released_loss(sa, released, ta, t, (20, 16)).backward()
    assert ours.grad.any()
    torch.testing.assert_close(ours.grad, released.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalise", cam.NORMALISATIONS)
def test_gradcheck_of_every_normalisation(normalise):
    sa, s, ta, t = pair()
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: cam.cam_loss(sa, a, ta, t, normalise=normalise, size=(9, 9)), s)


def test_the_gradient_reaches_the_student_map_alone():
    sa, s, ta, t = (x.requires_grad_() for x in pair())
    cam.cam_loss(sa, s, ta, t, size=(10, 8)).backward()
    assert s.grad is not None
    assert sa.grad is None
    assert ta.grad is None
    assert t.grad is None


def test_the_paper_form_is_the_mean_squared_frobenius_norm():
    sa, s, ta, t = pair()
    maps = [torch.einsum("bk,bkhw->bhw", a, x).relu() for a, x in ((sa, s), (ta, t))]
    loss = cam.cam_loss(sa, s, ta, t, normalise="raw", floor=None)
    torch.testing.assert_close(loss, (maps[0] - maps[1]).square().sum((1, 2)).mean())


def test_the_floor_drops_negative_weights():
    alpha, activation = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, 2, 2)
    other, otherwise = torch.zeros(1, 2), torch.zeros(1, 2, 2, 2)
    for floor, squares in ((None, 0), (cam.ALPHA_FLOOR, 4)):
        assert cam.cam_loss(alpha, activation, other, otherwise, normalise="raw", floor=floor) == squares


def test_equal_maps_of_different_strength_agree_under_min_max():
    sa, s, _, _ = pair(dtype=torch.float32)
    for normalise in ("minmax_native", "minmax_upsampled"):
        loss = cam.cam_loss(sa, s, 7 * sa, s, normalise=normalise, size=(32, 32))
        assert loss.item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("level", [0.0, 1e-12, 1.0, 1e6])
def test_one_constant_map_counts_as_zero(level):
    s = torch.full((2, 3, 7, 7), level).requires_grad_()
    alpha = torch.full((2, 3), 0.37)
    t = normal(2, 3, 7, 7, seed=5).abs()
    loss = cam.cam_loss(alpha, s, alpha, t, size=(224, 224))
    loss.backward()
    assert not s.grad.any()
    assert loss > 0


def test_a_faint_map_is_not_a_constant_one():
    maps = 1 + 1e-3 * normal(4, 7, 7, seed=6).clamp(-3, 3)
    stretched = cam.min_max_normalise(maps)
    torch.testing.assert_close(stretched.amin((1, 2)), torch.zeros(4))
    torch.testing.assert_close(stretched.amax((1, 2)), torch.ones(4))


def test_low_precision_and_autocast_compute_in_fp32():
    sa, s, ta, t = pair(dtype=torch.float32)
    exact = cam.cam_loss(sa, s, ta, t, size=(16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cam.cam_loss(sa, s, ta, t, size=(16, 16)), exact)
    half = cam.cam_loss(sa.half(), s.half(), ta.half(), t.half(), size=(16, 16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.01, atol=0)


def test_the_kept_matrices_survive_inference_mode():
    cam._upsampling.cache_clear()
    sa, s, ta, t = pair()
    with torch.inference_mode():
        first = cam.cam_loss(sa, s, ta, t, size=(11, 13)).item()
    s.requires_grad_()
    loss = cam.cam_loss(sa, s, ta, t, size=(11, 13))
    loss.backward()
    assert loss.item() == first


def test_alpha_of_a_tail_without_a_closed_form():
    """Two linear layers: the supplied logits and activation decide."""
    activation = normal(3, 4, 5, 5, seed=7, dtype=torch.float64).requires_grad_()
    first, second = (normal(*s, seed=i, dtype=torch.float64) for i, s in ((8, (6, 4)), (9, (2, 6))))
    hidden = (activation.relu().mean((2, 3)) @ first.T).tanh()
    logits = hidden @ second.T
    classes = torch.tensor([0, 1, 1])
    alpha = cam.autograd_alpha(logits, activation, classes)
    slope = ((1 - hidden**2) * second[classes]) @ first
    share = (activation > 0).double().mean((2, 3))
    torch.testing.assert_close(alpha, (slope * share / 25).detach())
    # the graph is still there
    logits.sum().backward()
    assert activation.grad.any()


def test_closed_form_in_half_precision_is_computed_in_fp32():
    weight, slope = normal(5, 4, seed=10), normal(4, seed=11)
    before, classes = normal(2, 4, 7, 7, seed=12), torch.tensor([1, 4])
    exact = cam.closed_form_alpha(weight, classes, slope, before)
    half = cam.closed_form_alpha(weight.half(), classes, slope.half(), before.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.01, atol=1e-6)


def test_bn_slope_is_the_layers_own():
    bn = torch.nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        bn.weight.copy_(normal(4, seed=13))
        bn.running_var.copy_(normal(4, seed=14).abs())
        x = normal(1, 4, 1, 1, seed=15)
        rise = (bn(x + 1) - bn(x)).flatten()
    torch.testing.assert_close(cam.bn_slope(bn.weight, bn.running_var, bn.eps).detach(), rise, rtol=1e-4, atol=1e-5)


def test_classes_by_rule():
    logits, labels = torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.tensor([0, 0])
    assert cam.cam_classes(logits, labels, "argmax").tolist() == [1, 0]
    assert cam.cam_classes(logits, labels, "label").tolist() == [0, 0]
    with pytest.raises(ValueError, match='cam_classes: rule must be "argmax" or "label", got \'best\''):
        cam.cam_classes(logits, labels, "best")


def test_a_single_position_is_refused_everywhere():
    """MobileNetV2's classifier is a 1 x 1 convolution; its map, stretched, would be rounding noise."""
    one, alpha, classes = torch.ones(2, 3, 1, 1), torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    message = "must have more than one position, got a 1 x 1 map"
    with pytest.raises(ValueError, match=message):
        cam.cam_loss(alpha, one, alpha, one, size=(32, 32))
    with pytest.raises(ValueError, match=message):
        cam.closed_form_alpha(torch.ones(5, 3), classes, torch.ones(3), one)
    with pytest.raises(ValueError, match=message):
        cam.autograd_alpha(torch.ones(2, 5), one, classes)


def test_errors_name_the_argument():
    sa, s, ta, t = pair(dtype=torch.float32)
    with pytest.raises(ValueError, match="cam_loss: normalise must be one of"):
        cam.cam_loss(sa, s, ta, t, normalise="none")
    with pytest.raises(ValueError, match="cam_loss: size must be"):
        cam.cam_loss(sa, s, ta, t)
    with pytest.raises(ValueError, match=r"must have one shape \(B, H, W\), got \(3, 5, 4\) and \(3, 5, 3\)"):
        cam.cam_loss(sa, s, ta, t[..., :3], size=(8, 8))
    with pytest.raises(ValueError, match=r"cam_map: alpha must have shape \(3, 6\), got \(3, 5\)"):
        cam.cam_loss(sa[:, :5], s, ta, t, size=(8, 8))
    with pytest.raises(ValueError, match=r"cam_loss: teacher_activation must be \(B, K, H, W\)"):
        cam.cam_loss(sa, s, ta, t[0], size=(8, 8))
    classes = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"fc_weight must be \(C, 6\) and slope \(6,\)"):
        cam.closed_form_alpha(torch.ones(5, 7), classes, torch.ones(6), s)
    with pytest.raises(ValueError, match=r"classes must have shape \(3,\), got \(2,\)"):
        cam.closed_form_alpha(torch.ones(5, 6), classes[:2], torch.ones(6), s)
