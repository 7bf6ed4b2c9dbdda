"""Preparing a captured network: where quantizers stand, what they compute, how ranges move, what a student survives."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zsq_ext.core.steps import Diverged
from zsq_ext.ops import fake_quant_minmax
from zsq_ext.quant import modules, ranges
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import ACTIVATION_RANGES, QConfig
from zsq_ext.quant.modules import (
    ActivationQuantizer,
    RangeTrace,
    WeightQuantizer,
    activation_quantizers,
    calibrating,
    weight_range,
)
from zsq_ext.quant.prepare import plan, prepare, weights_together
from zsq_ext.quant.ranges import affine_params


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Small(nn.Module):
    """Every kind of site: stem, residual sum, pooling, classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu1(self.bn1(self.stem(x)))
        x = self.relu2(self.bn2(self.conv(x)) + x)
        return self.fc(x.mean([2, 3]))


def build(dtype=torch.float32):
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = Small().to(dtype)
    torch.set_rng_state(torch_state)
    return capture(model, torch.zeros(2, 3, 8, 8, dtype=dtype))


@pytest.fixture(scope="module")
def teacher():
    return build()


@pytest.fixture(scope="module")
def images():
    return normal(16, 3, 8, 8)


def calibrated(teacher, images, *bits, **options):
    student = prepare(teacher, QConfig(*bits, **options))
    with calibrating(student), torch.no_grad():
        student(images)
    return student


WEIGHTS = ["stem.weight", "conv.weight", "fc.weight"]
AFTER_RELU = ["relu1:relu", "relu2:hardtanh"]
ALL_LAYERS = ["input", "relu1:relu", "bn2:batch_norm_1", "relu2:hardtanh", "model:mean", "output"]
ACADEMIC = ["relu1:relu", "relu2:hardtanh"]
PLACED = [("after_relu", AFTER_RELU), ("all_layers", ALL_LAYERS), ("academic", ACADEMIC)]


# Configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"w_bits": 1}, "w_bits must be an integer from 2 to 8, got 1"),
        ({"w_bits": 9}, "w_bits must be an integer from 2 to 8, got 9"),
        ({"w_bits": None}, "w_bits must be an integer from 2 to 8, got None"),
        ({"w_bits": True}, "w_bits must be an integer from 2 to 8, got True"),
        ({"a_bits": 4.0}, "a_bits must be an integer from 2 to 8, got 4.0"),
        ({"edge_bits": 16}, "edge_bits must be an integer from 2 to 8, got 16"),
        ({"sites": {"fc.weight": 0}}, r"sites\['fc.weight'\] must be an integer from 2 to 8, got 0"),
        ({"sites": ["fc.weight"]}, r"sites must map names to bits, got \['fc.weight'\]"),
        ({"placement": "everywhere"}, r"placement must be one of .*after_relu.*, got 'everywhere'"),
        ({"a_range": "mse"}, "a_range must be one of .*legacy_ema.*, got 'mse'"),
        ({"w_range": "ema"}, "w_range must be one of .*minmax.*, got 'ema'"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ({"beta": float("nan")}, r"beta must be in \[0, 1\), got nan"),
        ({"beta": "0.9"}, r"beta must be in \[0, 1\), got '0.9'"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(ValueError, match=f"QConfig: {message}"):
        QConfig(**{"w_bits": 4, "a_bits": 4, **fields})


def test_a_configuration_survives_json_shapes_and_does_not_share_its_sites():
    sites = {"fc.weight": 8}
    config = QConfig(3, None, "all_layers", edge_bits=8, sites=sites, a_range="lp", w_range="lp", beta=0.5)
    sites["fc.weight"] = 2
    assert config.sites == {"fc.weight": 8}
    assert QConfig.from_dict(config.to_dict()) == config
    assert (config.label, QConfig(4, 8).label) == ("W3", "W4A8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.w_bits = 4


# The plan


@pytest.mark.parametrize(("placement", "activations"), PLACED)
def test_sites(teacher, placement, activations):
    sites = plan(teacher, QConfig(3, 5, placement))
    assert [s.name for s in sites] == WEIGHTS + activations
    assert [(s.kind, s.bits, s.axis) for s in sites] == [("weight", 3, 0)] * 3 + [
        ("activation", 8 if name == "input" else 5, None) for name in activations
    ]


def test_weights_only(teacher, images):
    assert [s.name for s in plan(teacher, QConfig(4, None, "all_layers"))] == WEIGHTS
    student = prepare(teacher, QConfig(4, None))
    assert activation_quantizers(student) == []
    assert not torch.equal(student(images), teacher(images))


def test_edge_bits(teacher):
    def edges(placement):
        return [s.name for s in plan(teacher, QConfig(3, 3, placement, edge_bits=8)) if s.bits == 8]

    assert edges("after_relu") == ["stem.weight", "fc.weight", "relu2:hardtanh"]  # pooled, it is what fc reads
    assert edges("all_layers") == ["stem.weight", "fc.weight", "input", "model:mean", "output"]
    # the first layer's output and what the last one reads, as BRECQ has it
    assert edges("academic") == ["stem.weight", "fc.weight", "relu1:relu", "relu2:hardtanh"]


def test_the_image_has_the_bits_of_bytes(teacher):
    def bits(**config):
        return next(s.bits for s in plan(teacher, QConfig(3, 2, "all_layers", **config)) if s.name == "input")

    assert bits() == 8
    assert bits(edge_bits=4) == 8
    assert bits(sites={"input": 5}) == 5


def test_what_the_last_layer_reads_is_not_what_an_earlier_one_reads():
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)]
    module = capture(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 5)), torch.zeros(2, 3, 4, 4))
    assert {s.name: s.bits for s in plan(module, QConfig(3, 3, edge_bits=8)) if s.kind == "activation"} == {"1:relu": 3}


def test_single_sites_come_before_everything_else(teacher):
    config = QConfig(3, 3, edge_bits=8, sites={"fc.weight": 5, "relu1:relu": 6})
    bits = {s.name: s.bits for s in plan(teacher, config)}
    assert bits == {"stem.weight": 8, "conv.weight": 3, "fc.weight": 5, "relu1:relu": 6, "relu2:hardtanh": 8}
    found = {m.name: m.bits for m in prepare(teacher, config).modules() if hasattr(m, "bits")}
    assert found == bits


def test_an_unknown_site_is_refused_with_its_neighbours(teacher):
    with pytest.raises(ValueError, match=r"sites of the network, got 'conv1.weight'; close to it: conv.weight"):
        plan(teacher, QConfig(4, 4, sites={"conv1.weight": 4}))
    with pytest.raises(ValueError, match=r"got 'zzz'; they are stem.weight, conv.weight, .*, relu2:hardtanh$"):
        plan(teacher, QConfig(4, 4, sites={"zzz": 4}))
    with pytest.raises(ValueError, match="got 'relu1:relu'"):  # there, but for another configuration
        plan(teacher, QConfig(4, None, sites={"relu1:relu": 4}))


def test_a_network_with_nothing_to_quantize():
    pooling = capture(nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="no convolution or linear layer with a parameter"):
        plan(pooling, QConfig(4, 4))
    linear = capture(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.zeros(2, 3, 2, 2))
    with pytest.raises(ValueError, match="no activation to quantize under placement 'after_relu'"):
        plan(linear, QConfig(4, 4))
    assert [s.name for s in plan(linear, QConfig(4, 4, "all_layers", edge_bits=8))] == ["1.weight", "input", "output"]


# The student


def test_prepare_leaves_the_teacher_alone(teacher, images):
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    nodes = [(n.name, n.args) for n in teacher.graph.nodes]
    student = calibrated(teacher, images, 2, 2, placement="all_layers")
    student(images).sum().backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert [(n.name, n.args) for n in teacher.graph.nodes] == nodes
    assert not any(p.requires_grad for p in teacher.parameters())


def test_every_parameter_learns_and_keeps_its_name(teacher, images):
    student = calibrated(teacher, images, 4, 4)
    student(images).square().sum().backward()
    assert dict(student.named_parameters()).keys() == dict(teacher.named_parameters()).keys()
    for name, parameter in student.named_parameters():
        assert parameter.is_leaf
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("placement", ["after_relu", "all_layers"])
def test_eight_bits_are_close_and_each_bit_halves_the_error(teacher, images, placement):
    expected = teacher(images)

    def error(bits):
        student = calibrated(teacher, images, bits, bits, placement=placement)
        return ((student(images) - expected).norm() / expected.norm()).item()

    # each of 3 weights and 2 to 6 activations adds about (range / 255) / sqrt(12) of its range: 0.1 % each
    assert error(8) < 0.01
    # 17 = 255 / 15 between 8 and 4 bits, if errors were independent
    assert 17 / 3 < error(4) / error(8) < 17 * 3


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("w_range", ["minmax", "lp"])
def test_values_lie_on_the_grid(teacher, images, bits, w_range):
    student = calibrated(teacher, images, bits, bits, placement="all_layers", w_range=w_range)
    seen = {}
    for name, module in student.named_modules():
        if isinstance(module, (WeightQuantizer, ActivationQuantizer)):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (m, args[0], out)}))
    student(images)
    assert len(seen) == 9
    for module, before, after in seen.values():
        weight = isinstance(module, WeightQuantizer)
        scale, zero_point, qmin, qmax = module.params(before) if weight else module.params()
        shape = (-1,) + (1,) * (before.ndim - 1)
        codes = after / scale.view(shape) + zero_point.view(shape)
        # x_hat = k * scale rounds once, x_hat / scale once more: k within 2 ulp of an integer below 2**9
        assert (codes - codes.round()).abs().max() <= 2**9 * 2**-23
        assert qmin <= codes.round().min()
        assert codes.round().max() <= qmax
        assert qmax - qmin == 2 ** (8 if module.name == "input" else bits) - 1
        if w_range == "minmax":
            assert (after - before).abs().max() <= scale.max() * (1 + 1e-4)  # a step: the zero-point rounds too
    for parameter in (seen[f"quantizers.{n}_weight"][2] for n in ("stem", "conv", "fc")):
        assert all(len(channel.unique()) <= 2**bits for channel in parameter)


def test_frozen_weight_ranges_stay_and_live_ones_follow(teacher, images):
    for w_range, follows in (("minmax", True), ("lp", False)):
        student = prepare(teacher, QConfig(4, None, w_range=w_range))
        quantizer = student.get_submodule("quantizers.conv_weight")
        weight = student.get_parameter("conv.weight")
        before = quantizer.params(weight)[0]
        with torch.no_grad():
            weight.mul_(2)
        assert torch.equal(quantizer.params(weight)[0], 2 * before if follows else before)


def test_double_precision(images):
    teacher = build(torch.float64)
    student = calibrated(teacher, images.double(), 8, 8, placement="all_layers")
    output = student(images.double())
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, teacher(images.double()), rtol=0, atol=0.01 * output.abs().max().item())
    doubled = calibrated(build(), images, 8, 8, w_range="lp").double()
    assert doubled(images.double()).dtype == torch.float64


@pytest.mark.parametrize("w_range", ["minmax", "lp"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_quantized_together_are_the_same_network(teacher, images, w_range, layout):
    student = calibrated(teacher, images, 3, 4, edge_bits=8, w_range=w_range).to(memory_format=layout)
    network = weights_together(student)
    calls = [node for node in network.graph.nodes if node.target is fake_quant_minmax]
    assert len(calls) == (w_range == "minmax")
    assert {node.name for node in student.graph.nodes} <= {node.name for node in network.graph.nodes}
    assert {id(p) for p in network.parameters()} == {id(p) for p in student.parameters()}
    x = images.contiguous(memory_format=layout)
    for _ in range(2):
        found = []
        for module in (student, network):
            output = module(x)
            found.append((output, *torch.autograd.grad(output.square().sum(), list(student.parameters()))))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        with torch.no_grad():  # the ranges follow
            for parameter in student.parameters():
                parameter.mul_(1.5)


def test_weights_together_of_a_shared_and_of_a_transposed_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up, self.fc = nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 6, 2), nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(self.up(self.conv(self.conv(x))).mean([2, 3]))

    student = prepare(capture(Net(), torch.zeros(2, 3, 8, 8)), QConfig(4, None))
    x = normal(2, 3, 8, 8)
    assert torch.equal(weights_together(student)(x), student(x))
    compiled = torch.compile(weights_together(student), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), student(x))


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


# What a student survives


def test_deepcopy_and_state_dict(teacher, images):
    student = calibrated(teacher, images, 4, 4, placement="all_layers", w_range="lp", edge_bits=8)
    expected = student(images)
    twin = copy.deepcopy(student)
    assert torch.equal(twin(images), expected)
    fresh = prepare(build(), QConfig(4, 4, "all_layers", w_range="lp", edge_bits=8))
    assert not torch.equal(fresh(images), expected)
    state = student.state_dict()
    assert {"quantizers.x.lo", "quantizers.relu.hi", "quantizers.mean.batches"} <= state.keys()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh(images), expected)
    with torch.no_grad():
        twin.get_parameter("fc.bias").add_(1)
        twin.get_submodule("quantizers.x").set_range(0.0, 1e-3)
    assert torch.equal(student(images), expected)


def test_a_copy_taken_while_calibrating_can_be_left_alone(teacher, images):
    student = calibrated(teacher, images, 4, 4)
    with calibrating(student):
        twin = copy.deepcopy(student)
    before = twin(images)
    twin(2 * images)
    assert torch.equal(twin(images), before)


def test_train_mode_and_channels_last(teacher, images):
    student = calibrated(teacher, images, 8, 8)
    expected = student.eval()(images)
    assert torch.equal(student.train()(images), expected)
    nhwc = copy.deepcopy(student).to(memory_format=torch.channels_last)
    # another convolution kernel sums in another order; a value on a rounding boundary moves by a step of 1 / 255
    got = nhwc(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=0, atol=expected.abs().max().item() / 255)


def test_autocast(teacher, images):
    student = calibrated(teacher, images, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = student(images)
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    # bf16 keeps 8 bits, about as fine as the grid: a few units of 2**-8 of the largest logit
    exact = student(images)
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=8 * 2**-8 * exact.abs().max().item())
    assert student.get_parameter("stem.weight").grad.dtype == torch.float32


def test_compile_in_one_graph(teacher, images):
    student = calibrated(teacher, images, 4, 4, placement="all_layers")
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    output, expected = compiled(images), student(images)
    assert torch.equal(output, expected)
    exact = torch.autograd.grad(expected.square().sum(), student.get_parameter("stem.weight"))
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), student.get_parameter("stem.weight")), exact)


def test_export(teacher, images):
    student = calibrated(teacher, images, 4, 4, placement="all_layers").requires_grad_(False)
    program = torch.export.export(student, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert sum("fake_quant" in str(n.target) for n in program.graph.nodes) == 9
    assert torch.equal(program.module()(images[:5]), student(images[:5]))


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_training(teacher, images, process_group):
    student = calibrated(teacher, images, 4, 4)
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(student))
    parallel(images).square().sum().backward()
    student(images).square().sum().backward()
    grads = {name: p.grad for name, p in student.named_parameters()}
    assert grads
    for name, parameter in parallel.module.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])


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
