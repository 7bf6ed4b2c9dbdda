"""What a student survives: copies, modes, layouts, autocast, compilation, export, distributed training."""

import copy

import pytest
import small_student
import torch
import torch.distributed as dist
from small_student import build, calibrated
from torch import nn

from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import (
    calibrating,
)
from zsq_ext.quant.prepare import prepare

images = small_student.images
teacher = small_student.teacher


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
