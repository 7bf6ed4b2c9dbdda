"""A small captured network with all that a placement tells apart, and its students."""

import pytest
import torch
from torch import nn

from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import (
    calibrating,
)
from zsq_ext.quant.prepare import prepare


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
