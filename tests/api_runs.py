"""Runs of the front door that take a second, for the tests of what it gives and of what it refuses."""

from dataclasses import replace

import pytest
import torch
from recipes import changed

import zsq_ext as zsq
from zsq_ext.core.progress import QUIET
from zsq_ext.methods import synq
from zsq_ext.synth.generate import GeneratorConfig
from zsq_ext.synth.pixels import PixelConfig
from zsq_ext.tune.finetune import TuneConfig

QUICK = changed(
    synq.config("smoke", "repo"),
    images=8,
    held_out=4,
    pixels=PixelConfig(batch=6, iterations=5, lr=0.2),
    generator=GeneratorConfig(batch=4),
    generator_steps=3,
    range_steps=3,
    range_batch=4,
    finetune=TuneConfig(epochs=2, steps_per_epoch=2, batch=4, lr=1e-5),
)
NO_TUNING = replace(QUICK.tune.finetune, epochs=0)


def quantize(model, method="synq", shape=(3, 8, 8), **more):
    given = {"w_bits": 4, "a_bits": 4, "input_shape": shape, "config": QUICK, "progress": QUIET, **more}
    if "preset" in more:
        del given["config"]
    return zsq.quantize(model, method, **given)


def same_state(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def model(nets):
    return nets.residual()


@pytest.fixture(scope="module")
def result(model):
    return quantize(model)


def halves(network, batches):
    """A measure that is none of ours: the share of positive logits, and of images."""
    logits = torch.cat([network(images) for images, _ in batches])
    return {"positive": 100 * (logits > 0).float().mean().item(), "all": 100.0}


X, Y = torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)
