"""Networks for 32 x 32 images.

``resnet20`` and ``resnet56`` are the CIFAR ResNets of He et al. 2016 (section 4.2) in the form that the zero-shot
quantization papers measure: 1x1 projection shortcuts, and pytorchcv's state-dict names, so that its public checkpoints
load. ``mobilenet_small`` is a MobileNetV2 (Sandler et al. 2018) cut to 32 x 32, with torchvision's names.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


class ConvBlock(nn.Module):
    """conv -> batch norm -> optional ReLU, no bias in the convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, activate: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.activ = nn.ReLU() if activate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x))
        return x if self.activ is None else self.activ(x)


class ResUnit(nn.Module):
    """Two 3x3 convolutions around a shortcut; a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            OrderedDict(
                conv1=ConvBlock(inputs, outputs, 3, stride),
                conv2=ConvBlock(outputs, outputs, 3, activate=False),
            )
        )
        resize = inputs != outputs or stride != 1
        self.identity_conv = ConvBlock(inputs, outputs, 1, stride, activate=False) if resize else None
        self.activ = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.identity_conv is None else self.identity_conv(x)
        return self.activ(self.body(x) + shortcut)


class CifarResNet(nn.Module):
    """A CIFAR ResNet of depth 6n + 2: three stages of n units, widths 16, 32, 64.

    Args:
        depth: 6n + 2, such as 20 or 56.
        num_classes: outputs of the classifier.
        in_channels: image channels.

    Input (N, in_channels, H, W), H and W multiples of 4; output (N, num_classes).
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"CifarResNet: depth must be 6n + 2 with n >= 1, got {depth}")
        units = (depth - 2) // 6
        self.features = nn.Sequential(OrderedDict(init_block=ConvBlock(in_channels, 16, 3)))
        width = 16
        for stage, outputs in enumerate((16, 32, 64), start=1):
            body: OrderedDict[str, nn.Module] = OrderedDict()
            for unit in range(1, units + 1):
                stride = 2 if stage > 1 and unit == 1 else 1
                body[f"unit{unit}"] = ResUnit(width, outputs, stride)
                width = outputs
            self.features.add_module(f"stage{stage}", nn.Sequential(body))
        self.features.add_module("final_pool", nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(torch.flatten(self.features(x), 1))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-20: 22 weight layers, 21 batch norms, 272,474 parameters at 10 classes."""
    return CifarResNet(20, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-56 for 32 x 32 images."""
    return CifarResNet(56, num_classes, in_channels)


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expand 1x1 -> depthwise 3x3 -> project 1x1 without activation; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        width = inputs * expand
        self.shortcut = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [_conv_bn(inputs, width, 1)] if expand != 1 else []
        layers += [
            _conv_bn(width, width, 3, stride, groups=width),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetSmall(nn.Module):
    """A MobileNetV2 for 32 x 32 images: depthwise convolutions, linear bottlenecks, ReLU6.

    Args:
        num_classes: outputs of the classifier.
        in_channels: image channels.

    Input (N, in_channels, H, W); output (N, num_classes).
    """

    # expansion, outputs, repeats, first stride: MobileNetV2's table 2 with its first two reductions left out
    TABLE = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 3, 1), (4, 64, 3, 2))
    LAST = 256

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn(in_channels, 16, 3)]
        width = 16
        for expand, outputs, repeats, first_stride in self.TABLE:
            for repeat in range(repeats):
                layers.append(InvertedResidual(width, outputs, first_stride if repeat == 0 else 1, expand))
                width = outputs
        layers.append(_conv_bn(width, self.LAST, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(self.LAST, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


def mobilenet_small(num_classes: int = 10, in_channels: int = 3) -> MobileNetSmall:
    """A MobileNetV2-style depthwise network for 32 x 32 images."""
    return MobileNetSmall(num_classes, in_channels)
