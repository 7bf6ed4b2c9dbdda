"""The generator engine: what it learns, its schedule, determinism, resumption, and what it leaves alone.

Broken on purpose, each turned a test here red:

* the rate never set, or an epoch late; the gradients doubled; Adam's betas forgotten; gradients kept    -> by hand
* the weight of a term forgotten; a term of weight 0 kept                                               -> terms
* noise of the global stream, or the same at every step or for samples; a start from the global stream  -> seed
* the optimizer, or what the images changed, left out of the state                                      -> resumed
* a last batch of what is left instead of a whole one; labels of another draw                           -> samples
* images handed out after the step, or with their graph                                                 -> handed out
* classes, an empty loss, or a batch of one unchecked                                                   -> refusals
"""

import random

import numpy
import pytest
import torch

from zsq_ext.core.progress import QUIET
from zsq_ext.core.run import Run
from zsq_ext.core.steps import Stage
from zsq_ext.synth.generate import (
    EntropyBand,
    GeneratorConfig,
    GeneratorTrainer,
    generator_terms,
    train_generator,
)
from zsq_ext.synth.generator import Generator
from zsq_ext.synth.objectives import bn_statistics_loss, cross_entropy
from zsq_ext.synth.teacher import Teacher

QUICK = GeneratorConfig(batch=6)
KINDS = ("embedding", "conditional")


@pytest.fixture(scope="module")
def frozen(teacher):
    return Teacher(teacher)


def trainer_of(config=QUICK, run=None, seed=0, shape=(3, 8, 8), classes=5):
    stage = Stage(run or Run(None, {}), "generator", seed, QUIET)
    return GeneratorTrainer(stage, classes, shape, config, "cpu")


def train(frozen, config=QUICK, run=None, seed=0, steps=24, **given):
    return train_generator(trainer_of(config, run, seed), frozen, steps, **given)


def kind(name):
    return GeneratorConfig(batch=6, kind=name)


def test_it_learns(frozen):
    for name in KINDS:
        history = train(frozen, GeneratorConfig(batch=8, kind=name, bns=1.0), steps=80)
        totals = [row["ce"] + row["bns"] for row in history]
        assert len(totals) == 8
        assert totals[-1] < 0.8 * totals[0]


def test_steps_by_hand(frozen):
    """Adam and its rates, on the losses as they are written down, from the same start and draws."""
    config = GeneratorConfig(batch=4, steps_per_epoch=2, lr_epochs=(1, 2), lr_factor=0.5, bns=0.3, betas=(0.6, 0.9))
    assert [config.lr_at(n) for n in range(6)] == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]
    trainer, other = trainer_of(config), trainer_of(config)
    history = train_generator(trainer, frozen, 6)
    optimizer = torch.optim.Adam(other.generator.parameters(), lr=config.lr, betas=(0.6, 0.9))
    for n in range(6):
        z, labels = other.draw(n)
        seen = frozen.observe(other.generator(z, labels), labels)
        loss = cross_entropy(seen.logits, labels) + 0.3 * bn_statistics_loss(seen.statistics, frozen.target)
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 ** (n // 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(value for name, value in history[-1].items() if name != "step") == pytest.approx(loss.item(), rel=1e-6)
    for got, expected in zip(trainer.parameters, other.generator.parameters(), strict=True):
        assert torch.equal(got, expected)
        assert got.grad is None


def test_the_published_schedule():
    config = GeneratorConfig()
    assert (config.batch, config.latent, config.lr, config.betas, config.bns) == (16, 100, 1e-3, (0.5, 0.999), 0.1)
    rates = {epoch: config.lr_at(200 * epoch) for epoch in (0, 99, 100, 199, 200, 299, 300, 399)}
    assert list(rates.values()) == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])
    assert config.lr_at(200 * 100 - 1) == 1e-3
    assert GeneratorConfig(lr_epochs=()).lr_at(10**6) == 1e-3


def test_terms_and_their_weights(frozen):
    z, labels = trainer_of().draw(0)
    seen = frozen.observe(trainer_of().images(z, labels).detach(), labels)
    one = generator_terms(seen, frozen.target, GeneratorConfig(ce=1.0, bns=1.0))
    other = generator_terms(seen, frozen.target, GeneratorConfig(ce=0.5, bns=3.0))
    assert one["ce"] == cross_entropy(seen.logits, labels)
    assert one["bns"] == bn_statistics_loss(seen.statistics, frozen.target)
    assert other["ce"] == 0.5 * one["ce"]
    assert other["bns"] == 3 * one["bns"]
    assert generator_terms(seen, frozen.target, GeneratorConfig(ce=0.0)).keys() == {"bns"}
    assert generator_terms(seen, frozen.target, GeneratorConfig(bns=0.0)).keys() == {"ce"}


def test_images_are_handed_out_detached_and_from_before_the_step(frozen):
    seen, other = [], trainer_of()
    train(frozen, on_images=seen.append, steps=3)
    assert [(images.shape, images.requires_grad) for images in seen] == [((6, 3, 8, 8), False)] * 3
    assert torch.equal(seen[0], other.images(*other.draw(0)))
    assert not torch.equal(seen[1], other.images(*other.draw(1)))


@pytest.mark.parametrize("name", KINDS)
def test_it_is_a_function_of_the_seed_and_leaves_global_streams_alone(frozen, name):
    torch.manual_seed(5)
    before = torch.random.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    first = train(frozen, kind(name))
    trainer_of().sample(7)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.random.get_state()[1].tolist() == before[2]
    torch.manual_seed(6)
    assert train(frozen, kind(name)) == first
    assert train(frozen, kind(name), seed=1) != first
    draws = [trainer_of().draw(n, *stream) for n in (0, 1) for stream in ((), ("sample",))]
    assert len({z[0, 0].item() for z, _ in draws}) == 4
    assert all(z.shape == (6, 100) and labels.shape == (6,) and labels.max() < 5 for z, labels in draws)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("stop", [3, 17])
def test_resumed_equals_unbroken_with_what_the_images_changed(frozen, tmp_path, tools, name, stop):
    def average(into, limit=None):
        def observe(images):
            if limit is not None and into["count"] == limit:
                raise tools.Interrupted
            into["count"] += 1
            into["mean"].mul_(0.9).add_(0.1 * images.amax())

        return observe

    def fresh():
        return {"mean": torch.zeros(()), "count": torch.zeros((), dtype=torch.int64)}

    whole, unbroken = fresh(), trainer_of(kind(name))
    history = train_generator(unbroken, frozen, 24, on_images=average(whole), extra_state=whole)
    broken, run = fresh(), Run(tmp_path, {}, checkpoint_seconds=0)
    with pytest.raises(tools.Interrupted):
        train(frozen, kind(name), run, on_images=average(broken, stop), extra_state=broken)
    resumed, again = fresh(), trainer_of(kind(name), run)
    assert train_generator(again, frozen, 24, on_images=average(resumed), extra_state=resumed) == history
    assert resumed["count"] == 24
    assert torch.equal(resumed["mean"], whole["mean"])
    for got, expected in zip(again.sample(9), unbroken.sample(9), strict=True):
        assert torch.equal(got, expected)


def test_samples_are_made_in_whole_batches(frozen):
    trainer = trainer_of()
    images, labels = trainer.sample(15)
    assert images.shape == (15, 3, 8, 8)
    assert images.dtype == torch.float32
    assert not images.requires_grad
    for n in range(3):
        z, drawn = trainer.draw(n, "sample")
        made = trainer.images(z, drawn)
        assert torch.equal(images[6 * n : 6 * n + 6], made[: 15 - 6 * n])
        assert torch.equal(labels[6 * n : 6 * n + 6], drawn[: 15 - 6 * n])
    few = trainer.sample(7)
    assert torch.equal(few[0], images[:7])
    assert torch.equal(few[1], labels[:7])
    assert not torch.equal(trainer.sample(6, "other")[0], images[:6])
    assert trainer.sample(0)[0].shape == (0, 3, 8, 8)


def test_the_teacher_is_only_read(frozen, teacher, tools):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    train(frozen)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in teacher.parameters())
    assert tools.hooks_on(teacher) == 0


def test_the_state_is_the_networks(frozen):
    tensors, optimizers = trainer_of().state()
    assert list(tensors) == [f"generator.{name}" for name in Generator(5, (3, 8, 8)).state_dict()]
    assert list(optimizers) == ["generator"]


# What it refuses


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "big"}, "kind must be None or one of embedding, conditional, got 'big'"),
        ({"latent": 0}, "latent must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0"),
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"betas": (0.5, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.5, 1.0\)"),
        ({"lr_epochs": (200, 100)}, r"lr_epochs must rise from at least 1, got \(200, 100\)"),
        ({"lr_epochs": (0, 100)}, r"lr_epochs must rise from at least 1, got \(0, 100\)"),
        ({"lr_factor": 0}, r"lr_factor must be in \(0, 1\], got 0"),
        ({"ce": -1}, "ce must be at least 0, got -1"),
        ({"bns": -1}, "bns must be at least 0, got -1"),
    ],
)
def test_configurations_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=f"^GeneratorConfig: {message}$"):
        GeneratorConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": 0.8}, "low must be at least 0 and below high = 0.8, at most 1, got 0.8"),
        ({"low": -0.1}, "low must be at least 0 and below high = 0.8, at most 1, got -0.1"),
        ({"high": 1.1}, "low must be at least 0 and below high = 1.1, at most 1, got 0.1"),
        ({"weight": -1}, "weight must be at least 0, got -1"),
        ({"disagreement": -1}, "disagreement must be at least 0, got -1"),
        ({"agreement": -1}, "agreement must be at least 0, got -1"),
    ],
)
def test_bands_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=f"^EntropyBand: {message}$"):
        EntropyBand(**fields)


def test_other_classes_than_the_teachers(frozen):
    with pytest.raises(ValueError, match=r"^GeneratorTrainer: num_classes must be the teacher's 5 outputs, got 7$"):
        train_generator(trainer_of(classes=7), frozen, 1)


def test_nothing_to_learn(frozen):
    with pytest.raises(ValueError, match=r"^train_generator: bns must be positive where ce is 0, got 0$"):
        train(frozen, GeneratorConfig(ce=0, bns=0))


def test_a_batch_of_one(frozen):
    """Fine, unless it leaves a norm a single value per channel."""
    one = GeneratorConfig(batch=1)
    for name in KINDS:
        (row,) = train(frozen, GeneratorConfig(batch=1, kind=name), steps=2)
        assert row["ce"] + row["bns"] < 1e4
    with pytest.raises(ValueError, match=r"^GeneratorConfig: batch must be at least 2 where images are 4 x 4, got 1$"):
        trainer_of(one, shape=(3, 4, 4))
    with pytest.raises(ValueError, match=r"^Generator: input_shape must have height and width divisible by 4 where"):
        trainer_of(one, shape=(3, 10, 8))
