"""The methods that train a generator, from the front door: what they are made of, what they give back and refuse."""

from dataclasses import replace

import pytest
import torch

import zsq_ext as zsq
from zsq_ext.core.progress import QUIET
from zsq_ext.methods import METHODS, PRESETS, agm, gdfq, synq
from zsq_ext.methods.recipe import Recipe
from zsq_ext.tune.ideas import Agm, LowPass, Mix

OWN = {"gdfq": gdfq.gdfq, "kmdfq": gdfq.kmdfq, "adadfq": gdfq.adadfq}


def short(recipe, **train):
    """Twelve steps of the recipe, at which its network's weights hardly move."""
    images, tune = recipe.images, recipe.tune
    generator = replace(images.generator, batch=6, latent=8, steps_per_epoch=3, lr_epochs=(2,))
    made = replace(images, images=10, held_out=5, generator=generator, steps=12)
    length = {"epochs": 4, "steps_per_epoch": 3, "range_epochs": 1, "warmup_epochs": 1, "lr": 1e-5, "lr_epochs": (2,)}
    return Recipe(made, replace(tune, train=replace(tune.train, **{**length, **train}), drift=None))


def quantize(nets, method, config, **more):
    return zsq.quantize(
        nets.residual(), method, w_bits=4, a_bits=4, input_shape=(3, 8, 8), config=config, progress=QUIET, **more
    )


@pytest.mark.parametrize("method", ["gdfq", "kmdfq", "adadfq", "agm"])
def test_every_method_runs_and_hands_back_its_generators_images(nets, method):
    result = quantize(nets, method, short(METHODS[method].config("smoke", METHODS[method].profiles[0])))
    assert result.images.shape == (10, 3, 8, 8)
    # the last norm of every generator
    torch.testing.assert_close(result.images[:6].mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert result.histories["tuning"][-1]["step"] == 12
    assert len(result.histories["calibration"]) == 3
    assert result.quality.unseen


def test_what_the_bases_differ_in():
    """Spec: section 2.7 and the table of section 3."""
    made, tune = zip(*(OWN[name]("cifar") for name in OWN), strict=True)
    assert [m.generator.batch for m in made] == [200, 200, 16]
    assert [(m.generator.ce, m.generator.bns) for m in made] == [(1.0, 0.1), (1.0, 1.0), (0.0, 1.0)]
    assert [m.band is None for m in made] == [True, True, False]
    assert [t.distill.kd for t in tune] == ["kl_mean", "mse", "entropy"]
    assert [t.distill.ce for t in tune] == [1.0, 1.0, 0.0]
    assert [t.train.warmup_epochs for t in tune] == [4, 20, 4]
    assert {(t.train.epochs, t.train.steps_per_epoch, t.train.lr) for t in tune} == {(400, 200, 1e-4)}
    assert {(t.train.lr_epochs, m.generator.lr_epochs) for t, m in zip(tune, made, strict=True)} == {
        ((100, 200, 300),) * 2
    }
    made, tune = zip(*(OWN[name]("imagenet") for name in OWN), strict=True)
    assert [(m.generator.batch, t.train.warmup_epochs, t.train.lr) for m, t in zip(made, tune, strict=True)] == [
        (16, 50, 1e-6),
        (16, 50, 1e-6),
        (16, 50, 1e-5),
    ]
    assert (tune[2].train.lr_epochs, made[2].generator.lr_epochs) == ((350, 400), (350, 400))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("profile", agm.PROFILES)
def test_agm_is_its_base_and_two_ideas(preset, profile):
    recipe, (images, tune) = agm.config(preset, profile), OWN[profile](preset)
    assert recipe.images == images
    assert recipe.tune == replace(tune, distill=replace(tune.distill, ideas=(Agm(), Mix())))


def test_ideas_join_and_another_tuning_takes_the_generators_images(nets):
    joined = quantize(nets, "gdfq", short(gdfq.recipe(gdfq.gdfq)("smoke", "repo")), ideas=(Agm(margin=1.0), LowPass(4)))
    assert "g_agm" in joined.histories["tuning"][-1]
    fixed = quantize(nets, "gdfq", short(gdfq.recipe(gdfq.gdfq)("smoke", "repo")), tune="none")
    assert fixed.histories["tuning"] == []
    assert [row["step"] for row in fixed.histories["images"]] == [10, 12]


def refused(nets, message, method="gdfq", config=None, **more):
    with pytest.raises(ValueError, match=f"^quantize: {message}"):
        quantize(nets, method, config or short(METHODS[method].config("smoke", METHODS[method].profiles[0])), **more)


def test_what_is_refused_before_any_work(nets):
    refused(
        nets, "images must be left out where a generator makes them on the way, got", images=torch.zeros(9, 3, 8, 8)
    )
    recipe = short(gdfq.recipe(gdfq.gdfq)("smoke", "repo"))
    pixels = replace(recipe, images=synq.IMAGES["smoke"])
    refused(nets, "images must come from a generator, got PixelImages", config=pixels)
    other = replace(recipe, tune=replace(recipe.tune, train=replace(recipe.tune.train, steps_per_epoch=4)))
    refused(nets, "generator.steps_per_epoch must be 4, the student's, got 3", config=other)
    late = short(gdfq.recipe(gdfq.adadfq)("smoke", "repo"), range_start=1, warmup_epochs=2)
    refused(nets, "range_start must be 0 where the generator sees the student, got 1", "adadfq", config=late)
    refused(nets, "band must be None where images are made on their own", "adadfq", tune="none")
    with pytest.raises(ValueError, match=r"^quantize: num_classes must be .*5.*, got 7"):
        quantize(nets, "gdfq", recipe, num_classes=7)
    with pytest.raises(ValueError, match=r"^quantize: input_shape must have height and width divisible by 4"):
        zsq.quantize(nets.residual((3, 6, 6)), "gdfq", w_bits=4, a_bits=4, input_shape=(3, 6, 6), progress=QUIET)


def test_a_batch_of_one_is_trained_on(nets):
    recipe = short(gdfq.recipe(gdfq.gdfq)("smoke", "repo"))
    one = replace(recipe.images, generator=replace(recipe.images.generator, batch=1))
    assert quantize(nets, "gdfq", replace(recipe, images=one)).images.shape == (10, 3, 8, 8)
