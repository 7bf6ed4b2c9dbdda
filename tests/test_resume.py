"""Real processes, killed for real: what a resumed run gives is what an unbroken one gives, bit for bit."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from zsq_ext.core.run import load_tensors

# one run of `quantize`; where a stage reaches a step, the process gets a signal that nothing in it expects
RUN = """
import os, signal, sys
from contextlib import contextmanager
# a shell that starts a job in the background has it ignore the keyboard, and so would this process
signal.signal(signal.SIGINT, signal.default_int_handler)
from dataclasses import replace
import torch
from torch import nn
from torch.nn import functional as F
import zsq_ext as zsq
from zsq_ext.core.progress import Progress
from zsq_ext.methods import agm, dgh, synq
from zsq_ext.methods.recipe import Recipe
from zsq_ext.synth.generate import GeneratorConfig
from zsq_ext.synth.pixels import PixelConfig
from zsq_ext.tune.finetune import TuneConfig

method, out, resume, stage_to_die_in, step_to_die_at, with_signal = sys.argv[1:]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1, bias=False) for i in (3, 8, 8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norms[0](self.convs[0](x)))
        y = F.relu(self.norms[1](self.convs[1](x)))
        x = F.relu(x + self.norms[2](self.convs[2](y)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

class Deadly(Progress):
    @contextmanager
    def stage(self, name, total, done=0):
        at = [done]
        print(f"{name} from {done}", flush=True)
        class Stage:
            def advance(self, steps=1, note=""):
                at[0] += steps
                if name == stage_to_die_in and at[0] == int(step_to_die_at):
                    os.kill(os.getpid(), int(with_signal))
        yield Stage()

torch.manual_seed(0)
net = Net().train()
with torch.no_grad():
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))
synq_recipe = Recipe(
    replace(
        synq.IMAGES["cifar"],
        images=8,
        held_out=4,
        pixels=PixelConfig(batch=6, iterations=25, lr=0.2, patience=5),
    ),
    replace(
        synq.TUNING["cifar"],
        ranges="generator",
        generator=GeneratorConfig(batch=4),
        generator_steps=12,
        finetune=TuneConfig(epochs=2, steps_per_epoch=13, batch=4, lr=1e-3, lr_epochs=(1,)),
    ),
)
own = dgh.config("smoke", "repo")
stored = replace(own.images.stored, batch=6, iterations=6, border=2)
tune = replace(own.tune, config=replace(own.tune.config, iterations=25, activation_iterations=15, batch=4))
dgh_recipe = Recipe(replace(own.images, images=10, held_out=4, stored=stored), tune)
own = agm.config("smoke", "kmdfq")
made = replace(own.images, images=8, held_out=4, generator=replace(own.images.generator, batch=4, steps_per_epoch=9))
agm_recipe = Recipe(made, replace(own.tune, train=replace(own.tune.train, epochs=4, steps_per_epoch=9, lr=1e-5)))
recipes = {"synq": synq_recipe, "dgh": dgh_recipe, "agm": agm_recipe}
zsq.quantize(
    net.eval(), method, w_bits=4, a_bits=4, input_shape=(3, 8, 8), out=out, resume=resume == "yes",
    config=recipes[method], progress=Deadly(quiet=True),
)
"""


def start(out, resume=False, stage="", step=0, sign=signal.SIGKILL, method="synq"):
    arguments = [method, str(out), "yes" if resume else "no", stage, str(step), str(int(sign))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ZSQ_CHECKPOINT_SECONDS": "0"}
    command = [sys.executable, "-c", RUN, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def stages(process):
    """Which stages the process entered, and at which step; the last one, which measures, keeps nothing."""
    return [line for line in process.stdout.splitlines() if " from " in line and line != "quality from 0"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    process = start(out)
    assert process.returncode == 0, process.stderr
    assert stages(process) == ["images 1/2 from 0", "images 2/2 from 0", "ranges from 0", "tuning from 0"]
    return out


def assert_same(one, two):
    for name in ("images", "model"):
        a, b = load_tensors(one / f"{name}.safetensors")[0], load_tensors(two / f"{name}.safetensors")[0]
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
    a, b = (json.loads((out / "result.json").read_text()) for out in (one, two))
    del a["seconds"], b["seconds"]
    assert a == b


def test_killed_during_generation(unbroken, tmp_path):
    process = start(tmp_path, stage="images 2/2", step=17)
    assert process.returncode == -signal.SIGKILL
    tensors, info = load_tensors(tmp_path / "checkpoint-images-1.safetensors")
    assert info["step"] == 10
    assert tensors["state.images"].shape == (6, 3, 8, 8)
    process = start(tmp_path, resume=True)
    assert process.returncode == 0, process.stderr
    assert stages(process) == ["images 2/2 from 10", "ranges from 0", "tuning from 0"]
    assert_same(tmp_path, unbroken)


def test_killed_during_tuning_and_again(unbroken, tmp_path):
    """The first process dies in the range calibration, the second in tuning; the third finishes."""
    assert start(tmp_path, stage="ranges", step=11).returncode == -signal.SIGKILL
    process = start(tmp_path, resume=True, stage="tuning", step=24)
    assert process.returncode == -signal.SIGKILL
    assert stages(process) == ["ranges from 10", "tuning from 0"]
    process = start(tmp_path, resume=True)
    assert process.returncode == 0, process.stderr
    assert stages(process) == ["ranges from 12", "tuning from 20"]
    assert_same(tmp_path, unbroken)


def test_interrupted_by_the_keyboard(tmp_path):
    process = start(tmp_path, stage="images 1/2", step=14, sign=signal.SIGINT)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in process.stderr
    assert load_tensors(tmp_path / "checkpoint-images-0.safetensors")[1]["step"] == 10
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.json", "seconds.json", "checkpoint-images-0.safetensors"}


def test_killed_while_a_set_is_made_and_within_a_block(tmp_path):
    """DGH: 14 images in batches of 6, 6 and 2, visited by turns; then BRECQ, rounding before steps, block by block."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, method="dgh").returncode == 0
    assert start(broken, stage="images", step=13, method="dgh").returncode == -signal.SIGKILL
    process = start(broken, resume=True, stage="convs 2/3", step=13, method="dgh")
    assert stages(process)[0] == "images from 10"
    assert process.returncode == -signal.SIGKILL, stages(process)
    process = start(broken, resume=True, method="dgh")
    assert process.returncode == 0, process.stderr
    assert stages(process)[0] == "convs 2/3 from 10"
    assert_same(broken, whole)


def test_killed_while_generator_and_student_learn_in_turns(tmp_path):
    """AGM: the first process dies while ranges follow the generator, the second while AGM looks for its margin."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, method="agm").returncode == 0
    assert start(broken, stage="training", step=13, method="agm").returncode == -signal.SIGKILL
    process = start(broken, resume=True, stage="training", step=24, method="agm")
    assert stages(process) == ["training from 10"]
    assert process.returncode == -signal.SIGKILL
    process = start(broken, resume=True, method="agm")
    assert process.returncode == 0, process.stderr
    assert stages(process) == ["training from 20"]
    assert_same(broken, whole)
