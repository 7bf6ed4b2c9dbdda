"""How the ranges of a student move, stand still, are set and are learned."""

import copy

import pytest
import small_student
import torch
from small_student import calibrated, normal
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zsq_ext.core.steps import Diverged
from zsq_ext.quant import modules, ranges
from zsq_ext.quant.config import ACTIVATION_RANGES, QConfig
from zsq_ext.quant.modules import (
    ActivationQuantizer,
    RangeTrace,
    WeightQuantizer,
    activation_quantizers,
    calibrating,
    weight_range,
)
from zsq_ext.quant.prepare import prepare
from zsq_ext.quant.ranges import affine_params

images = small_student.images
teacher = small_student.teacher


# Ranges


def test_ranges_move_only_while_calibrating(teacher, images):
    student = prepare(teacher, QConfig(4, 4, "all_layers"))
    quantizers = activation_quantizers(student)

    def state():
        return [(q.lo.item(), q.hi.item(), q.batches.item()) for q in quantizers]

    empty = state()
    student(images)
    assert state() == empty == [(0.0, 0.0, 0)] * 6
    with calibrating(student):
        student(images)  # with grad
        with torch.no_grad():
            student(images)
        with torch.inference_mode():
            student(images)
    moved = state()
    assert [count for _, _, count in moved] == [3] * 6
    student(2 * images)
    assert state() == moved


def test_calibrating_can_be_nested_and_ends_with_an_error(teacher, images):
    student = prepare(teacher, QConfig(4, 4))
    quantizer = activation_quantizers(student)[0]
    with calibrating(student):
        with calibrating(student):
            student(images)
        student(images)
    with pytest.raises(RuntimeError, match="stop"), calibrating(student):
        raise RuntimeError("stop")
    student(images)
    assert quantizer.batches.item() == 2


def test_the_first_range_of_the_network_is_the_moving_average_of_the_images(teacher):
    student = prepare(teacher, QConfig(4, 4, "all_layers", beta=0.7))
    batches = [normal(4, 3, 8, 8, seed=s) for s in range(5)]
    with calibrating(student), torch.no_grad():
        for batch in batches:
            student(batch)
    first = activation_quantizers(student)[0]
    shares = [0.3 * 0.7 ** (4 - t) / (1 - 0.7**5) for t in range(5)]
    for end, extreme in zip(first.range(), (torch.amin, torch.amax), strict=True):
        expected = sum(share * extreme(b).item() for share, b in zip(shares, batches, strict=True))
        assert end.item() == pytest.approx(expected, rel=1e-5)  # five updates in fp32


@pytest.mark.parametrize("kind", ACTIVATION_RANGES)
def test_kinds_of_range(kind):
    quantizer = ActivationQuantizer("site", 4, kind, beta=0.8)
    batches = [normal(100, seed=s) * (s + 1) for s in range(4)]
    quantizer.observing = True
    for batch in batches:
        quantizer(batch)
    state = torch.zeros(1), torch.zeros(1), torch.zeros((), dtype=torch.int64)
    for batch in batches:
        found = ranges.lp_search(batch, 4, signed=False, include_zero=True) if kind == "lp" else ranges.min_max(batch)
        update = ranges.ema_update_legacy if kind == "legacy_ema" else ranges.ema_update
        state = update(*state, *found, 0.8)
    expected = state[:2] if kind == "legacy_ema" else ranges.ema_value(*state, 0.8)
    if kind == "minmax":
        expected = torch.cat(batches).amin()[None], torch.cat(batches).amax()[None]
    assert all(torch.equal(a, b) for a, b in zip(quantizer.range(), expected, strict=True))
    scale, zero_point, qmin, qmax = quantizer.params()
    assert (qmin, qmax) == (0, 15)
    assert 0 <= zero_point.item() <= 15
    assert scale.item() == pytest.approx((expected[1] - expected[0]).item() / 15)


@pytest.mark.parametrize("kind", ACTIVATION_RANGES)
def test_a_range_can_be_set(kind):
    quantizer = ActivationQuantizer("site", 8, kind)
    quantizer.set_range(-1.0, 3.0)
    lo, hi = quantizer.range()
    assert (lo.item(), hi.item()) == (pytest.approx(-1), pytest.approx(3))
    with pytest.raises(ValueError, match=r"set_range: lo must be < hi, both finite, got 1.0 and 1.0"):
        quantizer.set_range(1.0, 1.0)


def test_the_grid_is_computed_once_while_the_range_stands_still(monkeypatch):
    calls = []
    monkeypatch.setattr(modules, "affine_params", lambda *args, **rest: calls.append(1) or affine_params(*args, **rest))
    quantizer, x = ActivationQuantizer("site", 4), normal(100)

    def grid(count, dtype=torch.float32):
        """The grid in force, checked against a new one, after so many have been computed in all."""
        found, fresh = quantizer.params(dtype)[:2], quantizer._computed(dtype)[:2]
        assert len(calls) == count + 1
        calls.pop()
        assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))
        return found

    quantizer.set_range(-1.0, 3.0)
    first = grid(1)
    assert grid(1)[0] is first[0]
    grid(2, torch.float64)
    grid(3)
    quantizer.set_range(-1.0, 1.0)
    grid(4)
    with calibrating(quantizer):
        quantizer(x)
        quantizer(x)
    assert len(calls) == 6
    grid(6)
    quantizer.load_state_dict({**quantizer.state_dict(), "hi": torch.tensor([5.0])})
    grid(7)
    with torch.inference_mode():
        grid(8)
    assert not quantizer.double().params()[0].is_inference()
    grid(9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        quantizer.set_range(0.0, 2.0)
        quantizer.params()
    assert type(quantizer.params()[0]) is torch.Tensor
    quantizer = copy.deepcopy(quantizer)
    assert quantizer._grid is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ACTIVATION_RANGES)
def test_a_bad_batch_is_seen_in_every_later_output(kind, bad):
    quantizer = ActivationQuantizer("site", 4, kind)
    quantizer.observing = True
    quantizer(normal(100))
    broken = normal(100, seed=1)
    broken[50] = bad
    quantizer(broken)
    quantizer.observing = False
    assert quantizer(normal(100)).isnan().all()


def test_calibration_that_ends_in_a_bad_range_says_where(teacher):
    student = prepare(teacher, QConfig(4, 4))
    trace = RangeTrace(student, 2)
    images = torch.zeros(2, 3, 8, 8)
    with calibrating(student):
        for bad in (0.0, float("nan")):
            images[0, 0, 0, 0] = bad
            student(images)
            trace.record()
    name = activation_quantizers(student)[0].name
    with pytest.raises(Diverged, match=f"^ranges: the range of '{name}' is not finite after calibration, got "):
        trace.history()


def test_a_weight_that_is_not_finite_has_no_range():
    weight = torch.ones(3, 4)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="weight_range: weight must be finite, got NaN or infinity in channel 1"):
        weight_range(weight, 0, 4, "lp")


def test_nan_passes_a_calibrated_quantizer():
    quantizer = ActivationQuantizer("site", 4)
    quantizer.set_range(0.0, 1.0)
    assert quantizer(torch.tensor([float("nan"), 0.4])).isnan().tolist() == [True, False]


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ACTIVATION_RANGES)
def test_a_step_never_waits_for_the_device(teacher, images, kind):
    student = prepare(teacher, QConfig(4, 4, "all_layers", a_range=kind))
    with NoWaiting(), calibrating(student):
        student(images[:2]).sum().backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        images.sum().item()


# Learned steps


def test_a_learned_step_becomes_a_range(teacher, images):
    """The step to a few units in the last place, the zero-point exactly."""
    factors = 0.25 + 4 * torch.rand(200, generator=torch.Generator().manual_seed(0))
    for kind in ACTIVATION_RANGES:
        student = calibrated(teacher, images, 4, 4, placement="all_layers", a_range=kind)
        for quantizer in activation_quantizers(student):
            start, zero_point, *_ = quantizer.params()
            for factor in factors[:20]:
                quantizer.set_step(start * factor)
                scale, zero, *_ = quantizer.params()
                torch.testing.assert_close(scale, start * factor, rtol=8 * 2**-24, atol=0)
                assert torch.equal(zero, zero_point)
            quantizer.forget()
            assert quantizer.batches == 0
            assert quantizer.range() == (0, 0)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_learned_step_becomes_a_weights_range(bits):
    weight = (normal(200, 30) + torch.linspace(-9, 9, 200)[:, None]) * torch.logspace(-3, 3, 200)[:, None]
    quantizer = WeightQuantizer("w", bits, 0, modules.weight_range(weight, 0, bits, "lp"))
    start, zero_point, *_ = quantizer.params(weight)
    wanted = start * (0.25 + 4 * torch.rand(200, generator=torch.Generator().manual_seed(0)))
    quantizer.set_step(wanted)
    scale, zero, qmin, qmax = quantizer.params(weight)
    assert torch.equal(zero, zero_point)
    # hi - lo cancels where the zero-point is far out: an ulp of the larger bound, in units of the width
    far = torch.maximum((qmin - zero_point).abs(), (qmax - zero_point).abs()) / (qmax - qmin)
    assert ((scale - wanted).abs() <= wanted * (4 + 2 * far) * 2**-24).all()


def test_a_channel_that_a_range_cannot_say_keeps_its_own():
    weight = torch.tensor(
        [[1000.0, 1000.0, 1000.0001], [-1.0, 0.0, 2.0]]
    )  # the first has its zero millions of steps off
    quantizer = WeightQuantizer("w", 4, 0, modules.weight_range(weight, 0, 4, "lp"))
    start, zero_point, *_ = quantizer.params(weight)
    assert zero_point[0].abs() > 2**20
    quantizer.set_step(start * 1.37)
    scale, zero, *_ = quantizer.params(weight)
    assert torch.equal(zero, zero_point)
    torch.testing.assert_close(scale[1], start[1] * 1.37)
    with pytest.raises(ValueError, match=r"^set_step: the range must be frozen"):
        WeightQuantizer("w", 4, 0).set_step(start)
