"""The units of reconstruction: together they are the network, and each quantizer belongs to one of them.

Broken on purpose, and red: a unit that ends behind the pooling; the first of two branches taking the addition; height
and width swapped on the way out; a budget for each tensor instead of all.
"""

import errno

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.tune.rows import Room, Rows
from zsq_ext.tune.units import between, quantized, units
from zsq_ext.zoo import small_nets, torchvision_nets


class Branches(nn.Module):
    """Branches that are concatenated, a layer used twice, a gate, and a reshape that asks for the batch's size."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 3, 3, padding=1), nn.ConvTranspose2d(3, 6, 2)
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.gate, self.fc = nn.Conv2d(12, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.up(F.relu(self.conv(F.relu(self.conv(x))))))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        x = x * torch.sigmoid(self.gate(x.mean([2, 3], keepdim=True)))
        return self.fc(x.mean([2, 3]).view(x.shape[0], -1))


NETS = {
    "resnet20": (small_nets.resnet20, 32),
    "mobilenet_small": (small_nets.mobilenet_small, 32),
    "resnet18": (torchvision_nets.resnet18, 32),
    "branches": (Branches, 8),
}


@pytest.fixture(scope="module", params=NETS)
def captured(request):
    build, size = NETS[request.param]
    torch.manual_seed(0)
    x = torch.randn(3, 3, size, size)
    return capture(build().eval(), torch.zeros(2, 3, size, size)), x


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("placement", [None, "after_relu", "all_layers", "academic"])
def test_units_one_after_the_other_are_the_network(captured, granularity, placement):
    module, x = captured
    parts = units(module, granularity)
    student = module
    if placement is not None:
        student = prepare(module, QConfig(4, 4, placement))
        with calibrating(student), torch.no_grad():
            student(x)
    entry = parts[0].inputs[0]
    held, owners, weights = {entry: x}, {}, set()
    for unit in parts:
        inputs = [name if name == entry else quantized(student, name) for name in unit.inputs]
        part = between(student, inputs, quantized(student, unit.output))
        for node in part.graph.nodes:
            if node.op == "call_module":
                owners.setdefault(node.target, unit.name)
        weights |= {name for name, _ in part.named_parameters()}
        with torch.no_grad():
            held[unit.output] = part(*(held[name] for name in unit.inputs))
    with torch.no_grad():
        assert torch.equal(held[parts[-1].output], student(x))
    everything = {str(n.target) for n in student.graph.nodes if n.op == "call_module"}
    assert owners.keys() == everything
    assert weights == dict(student.named_parameters()).keys()


def test_a_block_ends_before_the_pooling_behind_it():
    module = capture(small_nets.resnet20().eval(), torch.zeros(2, 3, 32, 32))
    parts = units(module, "block")
    assert len(parts) == 11
    assert (parts[-2].output, parts[-1].inputs, parts[-1].output) == ("relu_18", ("relu_18",), "linear")


class Forked(nn.Module):
    """A sum of two convolutions, either of which may be computed first."""

    def __init__(self, swapped):
        super().__init__()
        self.swapped = swapped
        self.stem, self.body, self.side = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        if self.swapped:
            side = self.norms[1](self.side(x))
            return self.fc(F.relu(self.norms[0](self.body(x)) + side).mean([2, 3]))
        body = self.norms[0](self.body(x))
        return self.fc(F.relu(body + self.norms[1](self.side(x))).mean([2, 3]))


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_branches_the_one_computed_last_takes_the_addition(swapped):
    module = capture(Forked(swapped).eval(), torch.zeros(2, 3, 8, 8))
    first, second = ("side", "body") if swapped else ("body", "side")
    parts = [(unit.name, unit.inputs, unit.output) for unit in units(module, "layer")]
    assert parts == [
        ("stem", ("x",), "conv2d"),
        (first, ("conv2d",), "batch_norm"),
        (second, ("conv2d", "batch_norm"), "relu"),
        ("fc", ("relu",), "linear"),
    ]


def test_between_names_what_is_not_there():
    module = capture(small_nets.resnet20().eval(), torch.zeros(2, 3, 32, 32))
    with pytest.raises(KeyError, match="no node 'nothing'"):
        between(module, ["x"], "nothing")
    with pytest.raises(KeyError, match=r"'relu_2' reads 'x', which inputs \['relu_1'\] do not cover"):
        between(module, ["relu_1"], "relu_2")


@pytest.mark.parametrize("budget", [0, 2**20])
@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (5, 7)])
def test_rows_are_what_was_written_wherever_they_are(tmp_path, budget, shape):
    values = torch.randn(shape)
    sample = values[:2]
    rows = Room(budget, tmp_path).like(5, sample)
    assert rows.mapped == (budget == 0)
    assert list(tmp_path.iterdir()) == []
    for part in rows.chunks(2):
        rows[part] = values[part]
    chosen = torch.tensor([4, 0, 0])
    assert torch.equal(rows[chosen], values[chosen])
    assert torch.equal(rows[1:4], values[1:4])
    if len(shape) == 4:
        assert rows[chosen].is_contiguous(memory_format=torch.channels_last)


def test_room_is_what_living_rows_leave():
    sample = torch.zeros(1, 64)  # 256 bytes
    room = Room(600, None)
    first, second = room.like(1, sample), room.like(1, sample)
    assert not first.mapped
    assert not second.mapped
    assert room.like(1, sample).mapped
    del first
    assert not room.like(1, sample).mapped


def test_a_full_disk_is_an_error_with_numbers(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match=rf"^reconstruct: {tmp_path} must have room for 4 MiB .* cache_bytes .*No space"):
        Room(0, tmp_path).like(2**20, torch.zeros(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_given_images_are_not_copied():
    images = torch.randn(4, 3, 2, 2)
    assert Rows(images, images.device)[0:2].data_ptr() == images.data_ptr()
