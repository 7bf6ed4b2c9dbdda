"""DGH's images: the two sources told apart row by row, what is refused before any work, and what a job gets.

Each of these turned a test red: the output term not weighted, heads asked for where nothing is stretched, labels of
zero in place of predictions, held-out images taken from those asked for.
"""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import fx, nn

from zsq_ext.core.progress import QUIET
from zsq_ext.core.run import Run
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods import dgh
from zsq_ext.methods.dgh import DghImages
from zsq_ext.methods.job import Job
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.graph import find
from zsq_ext.quant.structure import heads
from zsq_ext.synth.stored import StoredConfig

SPEC = InputSpec((3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3, valid_range=(0.0, 1.0), num_classes=5)
QUICK = DghImages(images=7, held_out=3, stored=StoredConfig(batch=4, iterations=6, border=2, lr=1.0))
PRESETS = ("smoke", "cifar", "imagenet")


def job(teacher, run=None, given=None):
    return Job(run or Run(None, {}), teacher, SPEC, QConfig(4, 4), seed=0, progress=QUIET, given=given)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_profile_switches_every_row(preset):
    """Spec 3.2."""
    repo, mct = dgh.images(preset, "repo"), dgh.images(preset, "mct")
    for row, theirs, toolkit in (
        ("std weight", "std_factor", (10.0, 1.0)),
        ("image layer", "image_weight", (1.0, 3.0)),
        ("lambda", "output", (3e-7, 1e-5)),
        ("hinges", "margin", (0.5, None)),
    ):
        assert (getattr(repo, theirs), getattr(mct, theirs)) == toolkit, row
    assert (repo.stored.clip_start, mct.stored.clip_start) == (True, False)
    assert repo.stored.border == mct.stored.border == (32 if preset == "imagenet" else 4)


def test_the_command_lines_defaults():
    """Spec 3.1 and 2.5."""
    config = dgh.images("imagenet", "repo")
    assert (config.images, config.stored.batch, config.stored.iterations) == (1024, 128, 1000)
    assert (config.stored.lr, config.stored.eps, config.stored.min_lr) == (16.0, 1e-8, 1e-4)
    assert (config.stored.factor, config.stored.patience, config.stored.reset) == (0.5, 1000 // 50, True)
    assert (config.stored.sigma, config.stored.flip, config.stored.granularity) == (1.25, 0.5, "set")
    toolkit = dgh.images("imagenet", "mct").stored
    assert (toolkit.batch, toolkit.iterations, toolkit.patience) == (32, 500, 500 // 50)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("profile", dgh.PROFILES)
def test_a_configuration_is_json(preset, profile):
    config = dgh.images(preset, profile)
    assert json.loads(json.dumps(asdict(config))) == asdict(config)


@pytest.mark.parametrize("profile", dgh.PROFILES)
@pytest.mark.parametrize("granularity", ["set", "batch", "image"])
def test_a_job_gets_its_images_and_what_the_teacher_takes_them_for(teacher, profile, granularity):
    config = replace(dgh.images("smoke", profile), images=7, held_out=3)
    config = replace(config, stored=replace(QUICK.stored, granularity=granularity))
    made = config.make(job(teacher))
    assert made.images.shape == (7, 3, 8, 8)
    assert made.held_out.shape == (3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(made.labels, teacher(made.images).argmax(1))
        assert torch.equal(made.held_out_labels, teacher(made.held_out).argmax(1))
    assert made.labels.dtype == torch.int64
    assert set(made.history[-1]) == {"step", "bns", "output"}
    assert made.history[-1]["step"] == 6 * 3
    for images in (made.images, made.held_out):
        assert images.min() >= -2
        assert images.max() <= 2


def test_images_held_out_are_made_with_the_others(teacher):
    """One set of ten, and its last three: not a set of seven and a set of three."""
    whole = replace(QUICK, images=10, held_out=0).make(job(teacher))
    made = QUICK.make(job(teacher))
    assert torch.equal(torch.cat([made.images, made.held_out]), whole.images)
    assert len(whole.held_out) == 0


def test_lambda_weighs_the_output_term_and_zero_switches_it_off(teacher):
    histories = {}
    for output in (0.0, 1e-6, 1.0):
        histories[output] = replace(QUICK, output=output).make(job(teacher)).history
    assert "output" not in histories[0.0][-1]
    assert abs(histories[1e-6][0]["output"]) < 1e-4
    assert histories[1.0][-1]["output"] < histories[1.0][0]["output"]  # the ranges grow
    assert histories[0.0][0]["bns"] == pytest.approx(histories[1e-6][0]["bns"], rel=1e-3)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.classes, self.boxes = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return torch.cat([self.classes(x).flatten(1), self.boxes(x).flatten(1)], 1)


def test_a_detector_has_every_head_stretched_and_no_labels():
    """Several outputs in one nesting: each head's range grows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        joined = capture(TwoHeads().eval(), torch.zeros(2, 3, 8, 8))
    graph = fx.Graph()
    graph.graph_copy(joined.graph, copied := {})
    names = heads(joined)
    graph.output({"maps": [copied[find(joined, name)] for name in names]})
    module = fx.GraphModule(joined, graph)
    ranges = {}
    for output in (0.0, 10.0):
        asked = job(module)
        made = replace(QUICK, output=output, margin=None).make(
            replace(asked, spec=replace(asked.spec, num_classes=None))
        )
        with torch.no_grad():
            maps = [z.flatten(1) for z in module(made.images)["maps"]]
        ranges[output] = [(z.amax(1) - z.amin(1)).mean() for z in maps]
    assert all(more > less for less, more in zip(ranges[0.0], ranges[10.0], strict=True))
    assert made.labels is made.held_out_labels is None


def test_a_job_that_was_stopped_goes_on(teacher, tmp_path, tools):
    """The whole method, over a folder; the network's own forward is what stops it."""
    whole = QUICK.make(job(teacher))
    run = Run(tmp_path, {}, checkpoint_seconds=0)
    real, calls = dgh.set_statistics_loss, []

    def stops(*args, **how):
        calls.append(1)
        if len(calls) == 14:
            raise tools.Interrupted
        return real(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dgh, "set_statistics_loss", stops)
        with pytest.raises(tools.Interrupted):
            QUICK.make(job(teacher, run))
    made = QUICK.make(job(teacher, run))
    assert torch.equal(made.images, whole.images)
    assert torch.equal(made.held_out_labels, whole.held_out_labels)
    assert made.history == whole.history


# What is refused


class Activated(nn.Module):
    """No layer feeds the output: nothing whose range could be widened."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return torch.relu(self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def test_a_teacher_without_batch_norm_is_refused(nets):
    module = capture(nets.vgg(norm=False), torch.zeros(2, 3, 8, 8))
    message = (
        r"^DghImages: the model must have batch norms with running statistics .*, got none; pass the checkpoint from"
    )
    with pytest.raises(ValueError, match=message):
        QUICK.check(module, SPEC)


def test_a_teacher_without_a_head_is_refused_only_where_it_would_be_stretched(nets):
    module = capture(nets.seen(Activated, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"^heads: every output must come from a linear layer or a convolution"):
        QUICK.check(module, SPEC)
    off = replace(QUICK, output=0.0)
    off.check(module, SPEC)
    assert len(off.make(job(module)).images) == 7


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("images", 0, "be at least 1"),
        ("held_out", -1, "be at least 0"),
        ("std_factor", -1.0, "be at least 0"),
        ("image_weight", -1.0, "be at least 0"),
        ("output", -1e-7, "be at least 0"),
        ("margin", -0.5, "be None or at least 0"),
    ],
)
def test_a_field_out_of_its_range_is_refused(field, value, rule):
    with pytest.raises(ValueError, match=rf"^DghImages: {field} must {rule}, got {value!r}$"):
        DghImages(**{field: value})
