"""Preparing a captured network: where quantizers stand, and what they compute."""

import dataclasses

import pytest
import small_student
import torch
from small_student import build, calibrated, normal
from torch import nn

from zsq_ext.ops import fake_quant_minmax
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import (
    ActivationQuantizer,
    WeightQuantizer,
    activation_quantizers,
)
from zsq_ext.quant.prepare import plan, prepare, weights_together

images = small_student.images
teacher = small_student.teacher


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
