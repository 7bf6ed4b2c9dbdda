"""The fine-tuning loop: it is torch's SGD on batches that a seed decides, and it moves parameters alone."""

import copy
import gc

import pytest
import torch

from zsq_ext.core.progress import QUIET
from zsq_ext.core.rng import stream
from zsq_ext.core.run import Run
from zsq_ext.core.steps import Diverged, Stage
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.synth.filters import LowPass
from zsq_ext.tune.distill import DistillConfig, Distiller
from zsq_ext.tune.finetune import TuneConfig, finetune

IMAGES = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(10) % 5
QUICK = TuneConfig(epochs=4, steps_per_epoch=6, batch=4, lr=1e-5, lr_epochs=(1, 3))


@pytest.fixture(scope="module")
def calibrated(teacher):
    student = prepare(teacher, QConfig(4, 4))
    with calibrating(student), torch.no_grad():
        student(IMAGES)
    return student


def tune(teacher, student, config=QUICK, run=None, loss=None, **more):
    loss = loss or Distiller(teacher, student, DistillConfig())
    stage = Stage(run or Run(None, {}), "tuning", 0, QUIET)
    return finetune(stage, student, IMAGES, LABELS, loss, config, **more)


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_it_is_torchs_sgd_over_seeded_passes(teacher, calibrated, clip):
    student, reference = copy.deepcopy(calibrated), copy.deepcopy(calibrated)
    config = TuneConfig(**{**vars(QUICK), "crop_scale": None, "clip": clip})
    tune(teacher, student, config)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-5, momentum=0.9, nesterov=True, weight_decay=1e-4)
    milestones = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=(1, 3))
    loss = Distiller(teacher, reference, DistillConfig())
    for epoch in range(4):
        for n in range(6 * epoch, 6 * epoch + 6):
            order = torch.randperm(10, generator=stream(0, "tuning/order", n // 2))  # two batches of 4 fit into 10
            chosen = order[4 * (n % 2) :][:4]
            optimizer.zero_grad()
            x = IMAGES[chosen].contiguous(memory_format=torch.channels_last)
            sum(loss(x, LABELS[chosen]).values()).backward()
            norm = torch.stack([p.grad.square().sum() for p in reference.parameters()]).sum().sqrt()
            assert norm > 1.0  # so that clipping to 1 does something
            for parameter in reference.parameters() if clip else ():
                parameter.grad /= norm + 1e-6
            optimizer.step()
        milestones.step()
    for name, value in reference.state_dict().items():
        # rates: theirs multiplies 0.1 step by step, ours takes its power: 2^-53. Losses are summed in one order
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-6, atol=1e-8, msg=name)


def test_parameters_move_and_statistics_and_ranges_stand_still(teacher, calibrated, tools):
    student = copy.deepcopy(calibrated)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    own = {name: value.clone() for name, value in teacher.state_dict().items()}
    tune(teacher, student)
    parameters = {name for name, _ in student.named_parameters()}
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in parameters), name
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, own[name]), name
    assert all(p.grad is None for p in teacher.parameters())
    assert tools.hooks_on(student) + tools.hooks_on(teacher) == 0


def test_the_loss_falls(teacher, calibrated):
    student = copy.deepcopy(calibrated)
    with torch.no_grad():
        loss = Distiller(teacher, student, DistillConfig(ce=0.0))
        first = loss(IMAGES, LABELS)["kd"].item()
        config = TuneConfig(epochs=1, steps_per_epoch=40, batch=10, lr=1e-6, crop_scale=None)
    tune(teacher, student, config, loss=loss)
    assert loss(IMAGES, LABELS)["kd"].item() < 0.8 * first


def test_batches_are_whole_passes_augmented_and_then_filtered(teacher, calibrated):
    student, seen, filtered = copy.deepcopy(calibrated), [], []
    low = LowPass((8, 8), 2.0)
    parameter = next(student.parameters())

    def loss(x, labels):
        seen.append((x, labels))
        return {"loss": (parameter * 0).sum() + x.sum() * 0}

    def filter_batch(x):
        filtered.append(x)
        return low(x)

    tune(teacher, student, TuneConfig(**{**vars(QUICK), "crop_scale": None}), loss=loss, filter_batch=filter_batch)
    assert len(seen) == len(filtered) == 24
    for (x, labels), raw in zip(seen, filtered, strict=True):
        assert torch.equal(x, low(raw))
        where = [int((image == IMAGES).flatten(1).all(1).nonzero()) for image in raw]
        assert labels.tolist() == [LABELS[i] for i in where]
    for first, second in zip(filtered[::2], filtered[1::2], strict=True):
        assert len(torch.cat([first, second]).unique(dim=0)) == 8  # no image twice in a pass
    assert any(not torch.equal(filtered[0], later) for later in filtered[2::2])  # every pass has its own order
    plain = [raw.clone() for raw in filtered]
    filtered.clear()
    tune(teacher, student, loss=loss, filter_batch=filter_batch)
    assert all(not torch.equal(one, two) for one, two in zip(plain, filtered, strict=True))  # cropped before the filter


@pytest.mark.parametrize("batch", [10, 11, 256])
def test_a_batch_is_never_larger_than_the_set(teacher, calibrated, batch):
    sizes, student = [], copy.deepcopy(calibrated)
    parameter = next(student.parameters())

    def loss(x, labels):
        sizes.append(len(x))
        return {"loss": (parameter * 0).sum()}

    tune(teacher, student, TuneConfig(epochs=1, steps_per_epoch=3, batch=batch), loss=loss)
    assert sizes == [10, 10, 10]


def test_evaluation_is_recorded_and_decides_nothing(teacher, calibrated):
    with_test, without = copy.deepcopy(calibrated), copy.deepcopy(calibrated)
    states = []

    def evaluate(student):
        states.append(next(student.parameters()).detach().clone())
        return {"top1": [10.0, 90.0, 20.0, 15.0][len(states) - 1]}

    tuned = tune(teacher, with_test, evaluate=evaluate)
    plain = tune(teacher, without)
    assert same(with_test, without)  # the last epoch is what comes out, though the second was best
    assert [(row["epoch"], row["top1"]) for row in tuned.evaluations] == [(1, 10.0), (2, 90.0), (3, 20.0), (4, 15.0)]
    assert not torch.equal(states[0], states[3])
    assert tuned.history == plain.history
    assert plain.evaluations == []
    assert all(parameter.grad is None for parameter in with_test.parameters())  # the next backward adds to nothing


def test_no_epoch_leaves_the_student_alone(teacher, calibrated):
    student = copy.deepcopy(calibrated)
    assert tune(teacher, student, TuneConfig(epochs=0)).history == []
    assert same(student, calibrated)


@pytest.mark.parametrize("stop", [5, 10, 19, 23])
def test_resumed_equals_unbroken(teacher, calibrated, tmp_path, tools, stop):
    whole, broken, resumed = (copy.deepcopy(calibrated) for _ in range(3))
    history = tune(teacher, whole, evaluate=lambda _: {"top1": 1.0})
    loss, calls = Distiller(teacher, broken, DistillConfig()), []

    def stopping(x, labels):
        if len(calls) == stop:
            raise tools.Interrupted
        calls.append(1)
        return loss(x, labels)

    run = Run(tmp_path, {}, checkpoint_seconds=0)
    with pytest.raises(tools.Interrupted):
        tune(teacher, broken, run=run, loss=stopping, evaluate=lambda _: {"top1": 1.0})
    assert tune(teacher, resumed, run=run, evaluate=lambda _: {"top1": 1.0}) == history
    assert same(whole, resumed)


def test_nothing_accumulates_over_steps(teacher, calibrated, tools):
    student, steps, counts = copy.deepcopy(calibrated), [], []
    distiller = Distiller(teacher, student, DistillConfig())

    def loss(x, labels):
        steps.append(1)
        if len(steps) in (3, 8, 14):
            gc.collect()
            tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
            counts.append((tensors, tools.hooks_on(student) + tools.hooks_on(teacher)))
        return distiller(x, labels)

    tune(teacher, student, TuneConfig(epochs=1, steps_per_epoch=14, batch=4, lr=1e-5), loss=loss)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][1] == 0


def test_divergence_stops_with_advice(teacher, calibrated):
    student = copy.deepcopy(calibrated)
    with pytest.raises(Diverged, match=r"^tuning: .* is not finite .*Try a lower learning rate \(tune\.lr\)"):
        tune(teacher, student, TuneConfig(**{**vars(QUICK), "lr": 1e30}))
