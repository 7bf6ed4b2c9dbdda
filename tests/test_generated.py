"""Images from a generator: what they are, that they resume, that any tuning takes them, and what is refused.

Broken on purpose, each turned a test here red: images of an untrained generator; the training's own draws as images;
one more or one less held out; labels of other images; the finished set, or the checkpoint on the way, not used again;
the checkpoint left behind; the band accepted; classes, statistics or the size unchecked.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

import zsq_ext as zsq
from zsq_ext.core.progress import QUIET
from zsq_ext.core.run import Run
from zsq_ext.core.spec import InputSpec
from zsq_ext.core.steps import Stage
from zsq_ext.methods import generated, hast, synq
from zsq_ext.methods.generated import GeneratedImages
from zsq_ext.methods.job import Job
from zsq_ext.methods.ptq import reconstruction
from zsq_ext.methods.recipe import Recipe
from zsq_ext.quant.config import QConfig
from zsq_ext.synth.generate import EntropyBand, GeneratorConfig, GeneratorTrainer, train_generator
from zsq_ext.synth.objectives import bn_statistics_loss, cross_entropy
from zsq_ext.synth.teacher import Teacher

QUICK = GeneratedImages(images=10, held_out=5, generator=GeneratorConfig(batch=6), steps=12)
SPEC = InputSpec((3, 8, 8), num_classes=5)


def job(teacher, out=None, seed=0, spec=SPEC, checkpoint_seconds=0.0, resume=False):
    run = Run(out, {}, resume=resume, checkpoint_seconds=checkpoint_seconds)
    return Job(run, teacher, spec, QConfig(4, 4), seed, QUIET)


def same(one, two):
    tensors, others = one.tensors(), two.tensors()
    assert tensors.keys() == others.keys()
    assert one.history == two.history
    return all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_they_are_drawn_from_the_trained_generator(teacher):
    made = QUICK.make(job(teacher))
    trainer = GeneratorTrainer(Stage(Run(None, {}), "images-0", 0, QUIET), 5, (3, 8, 8), QUICK.generator, "cpu")
    history = train_generator(trainer, Teacher(teacher), 12)
    images, labels = trainer.sample(15)
    assert made.history == history
    assert [row["step"] for row in history] == [10, 12]
    assert torch.equal(torch.cat([made.images, made.held_out]), images)
    assert torch.equal(torch.cat([made.labels, made.held_out_labels]), labels)
    assert made.held_out.shape == (5, 3, 8, 8)
    assert same(made, QUICK.make(job(teacher)))
    assert not torch.equal(QUICK.make(job(teacher, seed=1)).images, made.images)


def test_they_satisfy_what_the_generator_learnt(teacher):
    """Against an untrained generator's, by the loss of the whole set: means over more than one batch."""
    frozen = Teacher(teacher)

    def loss(steps):
        config = GeneratorConfig(batch=16, bns=1.0)
        made = GeneratedImages(images=64, held_out=0, generator=config, steps=steps).make(job(teacher))
        seen = frozen.observe(made.images, made.labels)
        return cross_entropy(seen.logits, seen.labels) + bn_statistics_loss(seen.statistics, frozen.target)

    assert loss(120) < 0.7 * loss(1)


def test_a_run_goes_on_where_it_stood(teacher, tmp_path, tools, monkeypatch):
    """Stopped while the generator learns, before it draws, and when all is there."""
    whole = QUICK.make(job(teacher))
    step, count = GeneratorTrainer.step, []

    def until(last):
        def stops(self, gradients, n):
            count.append(n)
            if n == last:
                raise tools.Interrupted
            step(self, gradients, n)

        monkeypatch.setattr(GeneratorTrainer, "step", stops)

    def stop(self, number, name="sample"):
        raise tools.Interrupted

    until(11)
    with pytest.raises(tools.Interrupted):
        QUICK.make(job(teacher, tmp_path))
    until(None)
    count.clear()
    with monkeypatch.context() as patch:
        patch.setattr(GeneratorTrainer, "sample", stop)
        with pytest.raises(tools.Interrupted):
            QUICK.make(job(teacher, tmp_path, resume=True))
    assert count == [10, 11]
    count.clear()
    assert same(QUICK.make(job(teacher, tmp_path, resume=True)), whole)
    assert count == []
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.json", "seconds.json", "images-0.safetensors"}
    monkeypatch.setattr(generated, "train_generator", None)  # the finished set needs none
    assert same(QUICK.make(job(teacher, tmp_path, resume=True)), whole)


def test_any_tuning_takes_them(nets):
    """Through the front door: synthesised, and reconstructed on; the caller's network keeps its values."""
    model = nets.residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = reconstruction("brecq", "smoke")
    tune = replace(own, config=replace(own.config, iterations=4, activation_iterations=4, batch=4))
    recipe = Recipe(QUICK, tune)
    options = {"input_shape": (3, 8, 8), "config": recipe, "progress": QUIET}
    result = zsq.quantize(model, "dgh", w_bits=4, a_bits=4, **options)
    made = zsq.synthesize(model, "dgh", **options)
    assert result.images.shape == (10, 3, 8, 8)
    assert torch.equal(made.images, result.images)
    kinds = recipe.to_dict()["images"]
    assert kinds["kind"] == "GeneratedImages"
    assert kinds["generator"]["lr_epochs"] == [100, 200, 300]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_ranges_come_from_a_generator_where_they_did_in_the_release():
    tuned = {
        (preset, m): m.config(preset, "repo").tune for preset in ("smoke", "cifar", "imagenet") for m in (synq, hast)
    }
    for (preset, _), tune in tuned.items():
        assert tune.ranges == ("images" if preset == "smoke" else "generator")
        assert (tune.generator_steps, tune.generator) == (800, GeneratorConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"held_out": -1}, "held_out must be at least 0, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"generator": GeneratorConfig(ce=0, bns=0)}, "generator.bns must be positive where ce is 0, got 0"),
    ],
)
def test_configurations_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=f"^GeneratedImages: {message}$"):
        GeneratedImages(**fields)


def test_what_they_cannot_be_made_for(nets, tmp_path):
    def synthesize(model, images=QUICK, shape=(3, 8, 8)):
        recipe = Recipe(images, synq.plain_tuning("smoke"))
        zsq.synthesize(model, "synq", input_shape=shape, config=recipe, progress=QUIET, out=tmp_path / "run")

    with pytest.raises(ValueError, match=r"^synthesize: the model must have batch norms"):
        synthesize(nets.vgg(norm=False))
    with pytest.raises(ValueError, match=r"^synthesize: input_shape must have height and width divisible by 4 .*, got"):
        synthesize(nets.residual((3, 10, 10)), shape=(3, 10, 10))
    band = replace(QUICK, band=EntropyBand())
    with pytest.raises(
        ValueError, match=r"^synthesize: band must be None where images are made on their own \(the gen"
    ):
        synthesize(nets.residual(), band)
    single = replace(QUICK, generator=GeneratorConfig(batch=1))
    with pytest.raises(ValueError, match=r"^synthesize: batch must be at least 2 where images are 4 x 4, got 1"):
        synthesize(nets.residual((3, 4, 4)), single, (3, 4, 4))
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match=r"must be a classifier, with one output \(N, K\), for a generator"):
        synthesize(backbone)
    assert not (tmp_path / "run").exists()
