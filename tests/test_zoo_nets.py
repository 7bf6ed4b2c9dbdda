"""The ImageNet networks: names, shapes and sizes are torchvision's, and those of pytorchcv under the flags."""

import pytest
import torch
from torch import nn

from zsq_ext.zoo import torchvision_nets
from zsq_ext.zoo.torchvision_nets import mobilenet_v2, resnet18, resnet50, vgg11_bn, vgg16_bn

# name, flags -> parameters, state_dict entries, BN layers, at 1000 classes
GOLDEN = [
    ("resnet18", {}, 11_689_512, 122, 20),
    ("resnet50", {}, 25_557_032, 320, 53),
    ("resnet50", {"stride_in_1x1": True}, 25_557_032, 320, 53),
    ("mobilenet_v2", {}, 3_504_872, 314, 52),
    ("mobilenet_v2", {"expand_first": True}, 3_505_960, 320, 53),
    ("vgg11_bn", {}, 132_868_840, 62, 8),
    ("vgg13_bn", {}, 133_053_736, 76, 10),
    ("vgg16_bn", {}, 138_365_992, 97, 13),
]

# MACs, ReLU outputs, BN inputs, weights, weight layers, activations for one image of 224 pixels
SIZES = [
    ("resnet18", {}, 1_814_073_344, 2_308_096, 2_483_712, 11_678_912, 21, 17),
    ("resnet50", {}, 4_089_184_256, 9_608_704, 11_113_984, 25_502_912, 54, 49),
    ("resnet50", {"stride_in_1x1": True}, 3_857_973_248, 9_081_856, 10_587_136, 25_502_912, 54, 49),
    ("mobilenet_v2", {}, 300_774_272, 6_105_792, 6_678_112, 3_469_760, 53, 35),
    ("mobilenet_v2", {"expand_first": True}, 313_619_328, 6_507_200, 7_079_520, 3_470_784, 54, 36),
    ("vgg11_bn", {}, 7_609_090_048, 7_434_240, 7_426_048, 132_851_392, 11, 10),
    ("vgg16_bn", {}, 15_470_264_320, 13_555_712, 13_547_520, 138_344_128, 16, 15),
]

# A few entries that pin torchvision's naming where it is easy to get wrong.
ENTRIES = [
    ("resnet18", "conv1.weight", (64, 3, 7, 7)),
    ("resnet18", "layer2.0.downsample.0.weight", (128, 64, 1, 1)),
    ("resnet18", "layer2.0.downsample.1.running_var", (128,)),
    ("resnet18", "layer4.1.bn2.num_batches_tracked", ()),
    ("resnet18", "fc.bias", (1000,)),
    ("resnet50", "layer1.0.downsample.0.weight", (256, 64, 1, 1)),
    ("resnet50", "layer3.5.conv2.weight", (256, 256, 3, 3)),
    ("resnet50", "layer4.2.bn3.weight", (2048,)),
    ("mobilenet_v2", "features.0.0.weight", (32, 3, 3, 3)),
    ("mobilenet_v2", "features.1.conv.0.0.weight", (32, 1, 3, 3)),
    ("mobilenet_v2", "features.1.conv.1.weight", (16, 32, 1, 1)),
    ("mobilenet_v2", "features.2.conv.1.1.running_mean", (96,)),
    ("mobilenet_v2", "features.17.conv.2.weight", (320, 960, 1, 1)),
    ("mobilenet_v2", "features.18.0.weight", (1280, 320, 1, 1)),
    ("mobilenet_v2", "classifier.1.weight", (1000, 1280)),
    ("vgg11_bn", "features.25.weight", (512, 512, 3, 3)),
    ("vgg13_bn", "features.31.weight", (512, 512, 3, 3)),
    ("vgg16_bn", "features.0.bias", (64,)),
    ("vgg16_bn", "features.41.running_mean", (512,)),
    ("vgg16_bn", "classifier.0.weight", (4096, 25088)),
    ("vgg16_bn", "classifier.6.bias", (1000,)),
]


def on_meta(name: str, **flags) -> nn.Module:
    """The network without memory for its values: VGG-16 would take half a gigabyte."""
    with torch.device("meta"):
        return getattr(torchvision_nets, name)(**flags)


def sizes(net: nn.Module, pixels: int) -> tuple[int, int, int, int, int, int]:
    """MACs, ReLU outputs, BN inputs, weights, weight layers and activations of one forward pass."""
    macs = relu = bn = weights = layers = activations = 0

    def count(module, inputs, output):
        nonlocal macs, relu, bn, weights, layers, activations
        if isinstance(module, nn.Conv2d | nn.Linear):
            positions = output[0, 0].numel()
            macs += positions * module.weight.numel()
            weights += module.weight.numel()
            layers += 1
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            relu += output.numel()
            activations += 1
        elif isinstance(module, nn.BatchNorm2d):
            bn += inputs[0].numel()

    handles = [module.register_forward_hook(count) for module in net.modules()]
    net.eval()(torch.empty(1, 3, pixels, pixels, device="meta"))
    for handle in handles:
        handle.remove()
    return macs, relu, bn, weights, layers, activations


@pytest.mark.parametrize(("name", "flags", "parameters", "entries", "norms"), GOLDEN)
def test_counts(name, flags, parameters, entries, norms):
    net = on_meta(name, **flags)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == entries
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == norms


@pytest.mark.parametrize(("name", "flags", "macs", "relu", "bn", "weights", "layers", "activations"), SIZES)
def test_sizes_at_224(name, flags, macs, relu, bn, weights, layers, activations):
    assert sizes(on_meta(name, **flags), 224) == (macs, relu, bn, weights, layers, activations)


@pytest.mark.parametrize(("name", "entry", "shape"), ENTRIES)
def test_entry(name, entry, shape):
    assert on_meta(name).state_dict()[entry].shape == shape


def test_stride_flag_moves_only_the_stride():
    plain, early = on_meta("resnet50"), on_meta("resnet50", stride_in_1x1=True)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in early.state_dict().items()}
    for stage in ("layer2", "layer3", "layer4"):
        first, moved = plain.get_submodule(stage)[0], early.get_submodule(stage)[0]
        assert (first.conv1.stride, first.conv2.stride) == ((1, 1), (2, 2))
        assert (moved.conv1.stride, moved.conv2.stride) == ((2, 2), (1, 1))


def test_num_classes_and_forward():
    torch.manual_seed(0)
    for net in (resnet18(7), mobilenet_v2(7)):
        logits = net.eval()(torch.randn(2, 3, 64, 64))
        assert logits.shape == (2, 7)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("pixels", [32, 64, 225])
def test_vgg_takes_any_size(pixels):
    assert on_meta("vgg16_bn", num_classes=5)(torch.empty(1, 3, pixels, pixels, device="meta")).shape == (1, 5)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    net = mobilenet_v2(4, expand_first=True).train()
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("build", [resnet18, resnet50, mobilenet_v2, vgg11_bn, vgg16_bn])
@pytest.mark.parametrize("classes", [0, -1, 2.5])
def test_bad_num_classes(build, classes):
    with pytest.raises(ValueError, match=f"{build.__name__}: num_classes must be a positive int, got {classes}"):
        build(classes)
