"""The command in this process, on networks and data of a second, for the tests of what it does and what it refuses."""

import numpy as np
import pytest
import torch
from recipes import changed
from safetensors.torch import save_file
from typer.testing import CliRunner

from zsq_ext.cli import app
from zsq_ext.methods import synq
from zsq_ext.synth.pixels import PixelConfig
from zsq_ext.tune.finetune import TuneConfig
from zsq_ext.zoo import small_nets, teachers

RUNNER = CliRunner()

NET = """
import torch
from torch import nn

def tiny():
    torch.manual_seed(0)
    conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False)
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )

number = 7
def wrong(): return number
"""


def zsq_(*arguments):
    """Runs the command in this process."""
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def fails(*arguments):
    """The one line that a command leaves when it refuses something."""
    done = zsq_(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def fails_in_its_last_line(*arguments):
    """As `fails`, for an error that comes after progress was reported."""
    done = zsq_(*arguments)
    assert done.exit_code == 2, done.output
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def net(tmp_path):
    """A user's own network, as path.py:function."""
    path = tmp_path / "net.py"
    path.write_text(NET)
    return f"{path}:tiny"


@pytest.fixture
def cifar(tmp_path):
    """Twenty images in CIFAR-10's binary format."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (20, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(20) % 10
    (folder / "test_batch.bin").write_bytes(rows.tobytes())
    return f"cifar10:{folder}"


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Embedded teachers with weights of no value."""
    monkeypatch.setattr(teachers, "WEIGHTS", tmp_path)
    torch.manual_seed(0)
    tensors = small_nets.resnet20(40).state_dict()
    save_file(tensors, tmp_path / "resnet20.safetensors", metadata={"task": "none", "top1_test": "2.50"})
    return tmp_path


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Runs of a second, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    config = changed(
        synq.config("smoke", "repo"),
        images=12,
        held_out=4,
        pixels=PixelConfig(batch=16, iterations=2),
        finetune=TuneConfig(epochs=2, steps_per_epoch=2, batch=4, lr=1e-4),
        range_steps=2,
        range_batch=8,
    )
    monkeypatch.setitem(synq.IMAGES, "smoke", config.images)
    monkeypatch.setitem(synq.TUNING, "smoke", config.tune)
