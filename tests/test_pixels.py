"""The pixel engine: its schedule, what it minimises, determinism, resumption, and what it leaves behind."""

import gc

import pytest
import torch

from zsq_ext.core.progress import QUIET
from zsq_ext.core.rng import stream
from zsq_ext.core.run import Run
from zsq_ext.core.steps import Diverged, Stage
from zsq_ext.synth.objectives import bn_statistics_loss, cross_entropy
from zsq_ext.synth.pixels import PixelConfig, Plateau, make_images
from zsq_ext.synth.teacher import Teacher

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
QUICK = PixelConfig(batch=4, iterations=24, lr=0.2, patience=3, min_lr=0.01)


@pytest.fixture(scope="module")
def frozen(teacher):
    return Teacher(teacher)


def objective_of(teacher, watch=None):
    def objective(seen):
        if watch is not None:
            watch(seen)
        bns = bn_statistics_loss(seen.statistics, teacher.target)
        return {"ce": cross_entropy(seen.logits, seen.labels), "bns": bns}

    return objective


def make(teacher, run=None, config=QUICK, watch=None, seed=0, name="images", shape=(3, 8, 8)):
    objective = objective_of(teacher, watch)
    stage = Stage(run or Run(None, {}), name, seed, QUIET)
    return make_images(stage, teacher, LABELS, shape, objective, config)


@pytest.mark.parametrize(
    ("patience", "min_lr", "factor"), [(10, 0.0, 0.1), (2, 1e-3, 0.5), (0, 0.0, 0.1), (3, 0.5, 0.1)]
)
def test_the_plateau_is_torchs(patience, min_lr, factor):
    """Falling at first and noisy later, with stretches that improve by less than the threshold."""
    generator = torch.Generator().manual_seed(patience)
    losses = torch.exp(-torch.arange(160) / 25.0) + 0.02 * torch.rand(160, generator=generator) + 0.3
    losses[60:75] = losses[:60].min() * (1 - 5e-5)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=factor, patience=patience, min_lr=min_lr)
    ours = Plateau(0.5, factor, patience, min_lr, torch.device("cpu"))
    rates = []
    for loss in losses:
        theirs.step(loss.item())
        ours.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
        # theirs multiplies in fp64, ours in fp32: half an ulp (2^-24) for the start and for each of at most 8 cuts
        assert ours.lr.item() == pytest.approx(rates[-1], rel=10 * 2**-24)
    assert len(set(rates)) > 1 or min_lr == 0.5  # it did cut, unless it starts at the floor


def test_the_plateau_sees_nan_as_no_progress():
    ours = Plateau(1.0, 0.1, 1, 0.0, torch.device("cpu"))
    for loss in (1.0, float("nan"), float("nan")):
        ours.step(torch.tensor(loss))
    assert ours.lr.item() == pytest.approx(0.1)
    assert ours.best.item() == 1.0


def test_the_loss_falls_and_labels_are_reached(frozen):
    images, history = make(frozen, config=PixelConfig(batch=6, iterations=60, lr=0.2, patience=50))
    assert [row["step"] for row in history] == [10, 20, 30, 40, 50, 60]
    start = torch.randn(6, 3, 8, 8, generator=stream(0, "images-0/init"))
    first = sum(objective_of(frozen)(frozen.observe(start, LABELS)).values()).item()
    assert history[0]["ce"] + history[0]["bns"] < first
    assert history[-1]["ce"] + history[-1]["bns"] < 0.3 * first
    agreement = [(frozen.module(x).argmax(1) == LABELS).float().mean() for x in (start, images)]
    assert agreement[1] > agreement[0]


def test_one_batch_is_adam_with_torchs_own_plateau(frozen):
    """Two steps beyond the first cut of the rate; the images of the reference move under torch's schedulers alone."""
    config = PixelConfig(batch=6, iterations=8, lr=0.2, patience=0, min_lr=0.0)
    images, history = make(frozen, config=config)
    x = torch.randn(6, 3, 8, 8, generator=stream(0, "images-0/init")).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.2)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    objective = objective_of(frozen)
    for _ in range(8):
        optimizer.zero_grad()
        loss = torch.stack(list(objective(frozen.observe(x, LABELS)).values())).sum()
        loss.backward()
        optimizer.step()
        schedule.step(loss.item())
    assert history[-1]["ce"] + history[-1]["bns"] == pytest.approx(loss.item(), rel=1e-3)
    # Adam divides a gradient by its own size, so where it is nearly 0 an fp32 rounding of it is a full step of 0.2;
    # such pixels are few
    far = ((images - x.detach()).abs() > 1e-3).float().mean()
    assert far < 0.01


def test_the_same_seed_gives_the_same_images_and_nothing_else_does(frozen):
    images, history = make(frozen)
    torch.manual_seed(123)
    again, same_history = make(frozen)
    assert torch.equal(images, again)
    assert history == same_history
    assert not torch.equal(images, make(frozen, seed=1)[0])
    assert not torch.equal(images, make(frozen, name="centres")[0])
    assert images.shape == (6, 3, 8, 8)
    assert images.dtype == torch.float32
    assert not images.requires_grad


def test_batches_do_not_depend_on_each_other(frozen):
    """The first four images are the same whether two more follow or not."""
    images, _ = make(frozen)
    objective = objective_of(frozen)
    alone, _ = make_images(Stage(Run(None, {}), "images", 0, QUIET), frozen, LABELS[:4], (3, 8, 8), objective, QUICK)
    assert torch.equal(images[:4], alone)


@pytest.mark.parametrize("crop", [0.0, 0.5])
def test_an_interrupted_run_resumes_to_the_same_images_at_every_checkpoint(frozen, tmp_path, tools, crop):
    config = PixelConfig(**{**vars(QUICK), "crop_probability": crop})
    whole, history = make(frozen, config=config)
    if crop:
        assert not torch.equal(whole, make(frozen)[0])  # the augmentation did something
    run = Run(tmp_path, {}, checkpoint_seconds=0)
    # 24 steps per batch: inside the first look, between looks, at the end of batch 1, and inside batch 2
    for stop in (4, 15, 23, 24, 31, 47):
        calls = []

        def count(_, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) > stop % 10 + 1:
                raise tools.Interrupted

        with pytest.raises(tools.Interrupted):
            make(frozen, run, config, count)
    images, resumed = make(frozen, run, config)
    assert torch.equal(images, whole)
    assert resumed == history
    assert not list(tmp_path.glob("checkpoint-*"))  # finished batches need none
    again, resumed = make(frozen, run, config, lambda _: pytest.fail("a finished batch was made again"))
    assert torch.equal(again, whole)
    assert again.stride() == images.stride() == whole.stride()
    assert resumed == history


def test_a_checkpoint_at_every_look_resumes_exactly(frozen, tmp_path, tools):
    """One interruption per run, so that every checkpoint of a batch is where some run continues."""
    config = PixelConfig(**{**vars(QUICK), "batch": 6})
    whole, history = make(frozen, config=config)
    for stop in (10, 13, 20):
        run = Run(tmp_path / str(stop), {}, checkpoint_seconds=0)
        calls = []

        def count(_, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) > stop:
                raise tools.Interrupted

        with pytest.raises(tools.Interrupted):
            make(frozen, run, config, count)
        assert run.load("checkpoint-images-0")[1]["step"] == stop - stop % 10
        calls = []
        images, resumed = make(frozen, run, config, lambda _, calls=calls: calls.append(1))
        assert len(calls) == 24 - (stop - stop % 10)
        assert torch.equal(images, whole)
        assert resumed == history


def test_nothing_accumulates_and_nothing_is_left(frozen, teacher, tools):
    tensors, hooks = [], []

    def watch(_):
        hooks.append(tools.hooks_on(teacher) + tools.hooks_on(frozen._fused))
        if len(hooks) not in (3, 8, 14):
            return
        gc.collect()
        # maps and images of this batch: what a leaked graph or hook would hold, and what no other test has left over
        tensors.append(sum(type(o) is torch.Tensor and o.ndim == 4 and len(o) == 6 for o in gc.get_objects()))

    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    make(frozen, config=PixelConfig(batch=6, iterations=14, lr=0.2), watch=watch)
    assert set(hooks) == {0}
    # at the third step Adam's state and the schedule's first loss exist; from then on nothing may stay behind
    assert tensors[0] == tensors[1] == tensors[2]
    assert tools.hooks_on(teacher) == 0
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_divergence_stops_with_advice(frozen):
    def objective(seen):
        return {"ce": cross_entropy(seen.logits, seen.labels) * float("nan")}

    with pytest.raises(Diverged, match=r"images-0: loss term 'ce' is not finite at step 0\. Try a lower learning rate"):
        make_images(Stage(Run(None, {}), "images", 0, QUIET), frozen, LABELS, (3, 8, 8), objective, QUICK)


def test_the_teacher_shows_what_enters_its_batch_norms(teacher, frozen, nets):
    """Against forward hooks on the network itself; a mean of 256 values has at most 256 roundings of 2^-24."""
    net, x = nets.residual(), torch.randn(4, 3, 8, 8)
    inputs = []
    handles = [norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for norm in net.norms]
    with torch.no_grad():
        logits = net(x)
    for handle in handles:
        handle.remove()
    seen = frozen.observe(x, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(seen.logits, logits, rtol=1e-4, atol=1e-5)
    assert len(seen.statistics.channels) == len(inputs) == 4
    layers = (part.split(seen.statistics.channels) for part in (*seen.statistics[:2], frozen.target.mean))
    for mean, variance, target, u, norm in zip(*layers, inputs, net.norms, strict=True):
        torch.testing.assert_close(mean, u.mean((0, 2, 3)), rtol=256 * 2**-24, atol=1e-5)
        torch.testing.assert_close(variance, u.var((0, 2, 3), correction=0), rtol=256 * 2**-24, atol=1e-5)
        assert torch.equal(target, norm.running_mean)


def test_statistics_of_a_set_do_not_depend_on_the_reading_batch(frozen):
    images = torch.randn(7, 3, 8, 8)
    whole, parts = frozen.statistics(images, 7), frozen.statistics(images, 3)
    for one, two in zip(whole[:2], parts[:2], strict=True):
        torch.testing.assert_close(one, two, rtol=7 * 64 * 2**-24, atol=1e-6)


def test_a_network_without_batch_norm_is_refused(nets):
    from zsq_ext.quant.capture import capture

    with pytest.raises(ValueError, match=r"must have batch norms .*, got none; pass images=\.\.\. to use images"):
        Teacher(capture(nets.vgg(norm=False), torch.zeros(2, 3, 8, 8)))
