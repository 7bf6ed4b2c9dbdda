"""ImageNet networks in plain PyTorch, with torchvision's state_dict names and shapes: its checkpoints load unchanged.

Every activation is a module of its own (`relu1`, `relu2`, ...): a report can then name each quantization site. None
works in place, because BN inputs and block outputs are read while images are made.

Shape letters: N batch, C channels, H W image, K classes.
"""

from torch import Tensor, nn

__all__ = [
    "VGG",
    "BasicBlock",
    "Bottleneck",
    "MobileNetV2",
    "ResNet",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
]


def _conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Convolution without bias (the BN behind it has one), padded so that stride 1 keeps the size."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(c_out)


def _initialise(net: nn.Module, linear_std: float | None) -> None:
    """He initialisation by fan-out; `linear_std=None` keeps PyTorch's default for linear layers."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0.0, linear_std)
            nn.init.zeros_(module.bias)


def _check_classes(function: str, num_classes: int) -> None:
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"{function}: num_classes must be a positive int, got {num_classes!r}")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut x)."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(c_in, width, 3, stride)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = _conv_bn(width, width, 3)
        self.downsample = downsample
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the width, and a shortcut; the stride sits in the 3x3 or in the first 1x1."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, downsample: nn.Module | None, stride_in_1x1: bool):
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1, self.bn1 = _conv_bn(c_in, width, 1, stride_1x1)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = _conv_bn(width, width, 3, stride_3x3)
        self.relu2 = nn.ReLU()
        self.conv3, self.bn3 = _conv_bn(width, width * self.expansion, 1)
        self.downsample = downsample
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.relu3(self.bn3(self.conv3(x)) + shortcut)


class ResNet(nn.Module):
    """7x7 stem, four stages of residual blocks, global average pool, linear classifier. [N, 3, H, W] -> [N, K]."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int,
        **block_options: bool,
    ):
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(3, 64, 7, stride=2)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages, channels = [], 64
        for width, depth, first_stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True):
            blocks = []
            for unit in range(depth):
                stride = first_stride if unit == 0 else 1
                c_out, downsample = width * block.expansion, None
                if stride != 1 or channels != c_out:
                    downsample = nn.Sequential(*_conv_bn(channels, c_out, 1, stride))
                blocks.append(block(channels, width, stride, downsample, **block_options))
                channels = c_out
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self, linear_std=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project without activation; a shortcut where the shape is kept."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int, expand: bool):
        super().__init__()
        hidden = c_in * expansion
        layers: list[nn.Module] = [nn.Sequential(*_conv_bn(c_in, hidden, 1), nn.ReLU6())] if expand else []
        layers.append(nn.Sequential(*_conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()))
        self.conv = nn.Sequential(*layers, *_conv_bn(hidden, c_out, 1))
        self.has_shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """3x3 stem, 17 inverted residuals, 1x1 to 1280 channels, pool, dropout, linear. [N, 3, H, W] -> [N, K]."""

    # (expansion, channels, blocks, stride of the first block), table 2 of the paper
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, num_classes: int, expand_first: bool, dropout: float):
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*_conv_bn(3, 32, 3, stride=2), nn.ReLU6())]
        channels = 32
        for expansion, c_out, blocks, first_stride in self.stages:
            for unit in range(blocks):
                stride = first_stride if unit == 0 else 1
                layers.append(InvertedResidual(channels, c_out, stride, expansion, expansion > 1 or expand_first))
                channels = c_out
        layers.append(nn.Sequential(*_conv_bn(channels, 1280, 1), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        _initialise(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class VGG(nn.Module):
    """Stages of 3x3 convolution + BN + ReLU with max-pooling between, adaptive pool to 7x7, three linear layers."""

    def __init__(self, convs_per_stage: tuple[int, ...], num_classes: int, dropout: float):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, convs in zip((64, 128, 256, 512, 512), convs_per_stage, strict=True):
            for _ in range(convs):
                # torchvision's VGG keeps a bias in front of BN; its checkpoints carry it
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(nn.Linear(channels * 7 * 7, 4096), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(4096, num_classes),
        )
        _initialise(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def resnet18(num_classes: int = 1000) -> ResNet:
    """ResNet-18 for inputs of about 224 pixels.

    Args:
        num_classes: outputs K of the classifier, at least 1.

    Returns:
        A freshly initialised network, float32 [N, 3, H, W] -> logits [N, K]; 11,689,512 parameters at K = 1000.

    Raises:
        ValueError: num_classes is not a positive int.

    Example:
        >>> resnet18(num_classes=10).fc.out_features
        10

    Source: He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385; names as in torchvision.
    """
    _check_classes("resnet18", num_classes)
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes)


def resnet50(num_classes: int = 1000, stride_in_1x1: bool = False) -> ResNet:
    """ResNet-50 for inputs of about 224 pixels.

    Args:
        num_classes: outputs K of the classifier, at least 1.
        stride_in_1x1: False puts a stage's stride in the 3x3 convolution (torchvision, 4.09 GMAC at 224 pixels), True
            in the first 1x1 (the paper and pytorchcv's `resnet50`, 3.86 GMAC). Names and shapes are the same either
            way, so `load_state_dict` takes a checkpoint of the other form and the outputs are wrong: choose by its
            origin.

    Returns:
        A freshly initialised network, float32 [N, 3, H, W] -> logits [N, K]; 25,557,032 parameters at K = 1000.

    Raises:
        ValueError: num_classes is not a positive int.

    Example:
        >>> resnet50(stride_in_1x1=True).layer2[0].conv1.stride
        (2, 2)

    Source: He et al., arXiv 1512.03385; names as in torchvision.
    """
    _check_classes("resnet50", num_classes)
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, stride_in_1x1=stride_in_1x1)


def mobilenet_v2(num_classes: int = 1000, expand_first: bool = False, dropout: float = 0.2) -> MobileNetV2:
    """MobileNetV2, width 1, for inputs of about 224 pixels.

    Args:
        num_classes: outputs K of the classifier, at least 1.
        expand_first: keep a 1x1 convolution (32 -> 32) with BN and ReLU6 in front of the first block's depthwise one,
            as pytorchcv's `mobilenetv2_w1` does: 53 BN and 54 weight layers instead of 52 and 53.
        dropout: probability in front of the classifier; it acts in training mode only.

    Returns:
        A freshly initialised network, float32 [N, 3, H, W] -> logits [N, K]; 3,504,872 parameters at K = 1000 in
        torchvision's form.

    Raises:
        ValueError: num_classes is not a positive int.

    Example:
        >>> len(mobilenet_v2(expand_first=True).features[1].conv)
        4

    Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, arXiv 1801.04381; names as in
    torchvision.
    """
    _check_classes("mobilenet_v2", num_classes)
    return MobileNetV2(num_classes, expand_first, dropout)


def vgg11_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-11 with batch normalisation: 8 convolutions, 132,868,840 parameters at K = 1000. Otherwise as `vgg16_bn`."""
    _check_classes("vgg11_bn", num_classes)
    return VGG((1, 1, 2, 2, 2), num_classes, dropout)


def vgg13_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-13 with batch normalisation: 10 convolutions, 133,053,736 parameters at K = 1000. Otherwise as `vgg16_bn`."""
    _check_classes("vgg13_bn", num_classes)
    return VGG((2, 2, 2, 2, 2), num_classes, dropout)


def vgg16_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-16 with batch normalisation; an adaptive pool lets it take any input of at least 32 x 32 pixels.

    Args:
        num_classes: outputs K of the classifier, at least 1.
        dropout: probability after each hidden linear layer; it acts in training mode only.

    Returns:
        A freshly initialised network, float32 [N, 3, H, W] -> logits [N, K]; 138,365,992 parameters at K = 1000.

    Raises:
        ValueError: num_classes is not a positive int.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks, arXiv 1409.1556; names as in torchvision.
    """
    _check_classes("vgg16_bn", num_classes)
    return VGG((2, 2, 3, 3, 3), num_classes, dropout)
