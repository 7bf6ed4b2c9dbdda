"""Reconstruction and ranges as ways to use images: what a job is given, and what comes back."""

from dataclasses import replace

import pytest
import torch

from zsq_ext.core.progress import QUIET
from zsq_ext.core.run import Run
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods import controls, synq
from zsq_ext.methods.dfq import Dfq, image_range
from zsq_ext.methods.images import GaussianImages
from zsq_ext.methods.job import Job, hold_out
from zsq_ext.methods.ptq import Reconstruction
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import activation_quantizers
from zsq_ext.tune.reconstruct_config import ADAROUND, BRECQ, GENIE_M

UNUSED = GaussianImages()  # the jobs bring their images
IMAGES = hold_out(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 5, 8)
SPEC = InputSpec((3, 8, 8), num_classes=5)
SHORT = replace(GENIE_M, iterations=10, batch=8)


def job(teacher, qconfig, **more):
    return Job(Run(None, {}), teacher, SPEC, qconfig, 0, QUIET, **more)


def test_a_job_describes_the_input_of_its_teacher(teacher):
    message = r"^Job: spec.shape must be \(3, 8, 8\) as the captured model's input, got \(3, 16, 16\)$"
    with pytest.raises(ValueError, match=message):
        replace(job(teacher, QConfig(4, 4)), spec=InputSpec((3, 16, 16), num_classes=5))


def test_reconstruction_of_a_job(teacher):
    tune = Reconstruction(SHORT)
    ranges = {"w_range": tune.w_range, "a_range": tune.a_range}
    qconfig = QConfig(3, 3, "academic", 8, sites={"head.weight": 4}, **ranges)
    outcome = tune.run(job(teacher, qconfig, given=IMAGES), UNUSED)
    assert (outcome.evaluations, outcome.epochs) == ([], 0)  # there are no epochs: whoever asked measures the result
    assert outcome.images is IMAGES
    assert [row["step"] for row in outcome.histories["blocks"]] == [1, 2, 3, 4]
    assert {row["batch"] for row in outcome.histories["tuning"]} == {0, 1, 2, 3}
    assert outcome.student.get_submodule("quantizers.head_weight").bits == 4


def test_live_ranges_are_refused_before_any_work(teacher):
    message = r"^Reconstruction: w_range must be 'lp', which stands still, got 'minmax'$"
    with pytest.raises(ValueError, match=message):
        Reconstruction(SHORT).check(teacher, SPEC, QConfig(4, 4), UNUSED)
    with pytest.raises(ValueError, match=r"^reconstruct: w_range must be 'lp', a range that stands still, got"):
        Reconstruction(SHORT).run(
            job(teacher, QConfig(4, 4), given=IMAGES), UNUSED
        )  # a job by hand, which nothing has checked
    with pytest.raises(ValueError, match=r"^plan: sites must name sites of the network, got 'none'"):
        Reconstruction(SHORT).check(teacher, SPEC, QConfig(4, 4, w_range="lp", sites={"none": 4}), UNUSED)
    assert Reconstruction(BRECQ).check(teacher, SPEC, QConfig(4, 4, w_range="lp"), UNUSED) is None


@pytest.mark.parametrize("w_range", ["minmax", "lp"])
def test_ranges_alone_need_no_classes(teacher, w_range):
    tune = replace(controls.ranges_alone("smoke"), range_steps=3, range_batch=5)
    detector = InputSpec((3, 8, 8))
    tune.check(teacher, detector, QConfig(4, 4), UNUSED)
    found = job(teacher, QConfig(4, 4, w_range=w_range), given=IMAGES)
    outcome = tune.run(replace(found, spec=detector), UNUSED)
    assert all(q.batches == 3 for q in activation_quantizers(outcome.student))
    own = teacher.state_dict()
    assert all(torch.equal(p, own[name]) for name, p in outcome.student.named_parameters())
    assert (outcome.evaluations, outcome.epochs) == ([], 0)


@pytest.mark.parametrize("ranges", ["batch_norms", "images"])
def test_data_free_quantization_of_a_job(teacher, ranges):
    way = Dfq(ranges=ranges, batch=5, batches=3)
    qconfig = QConfig(8, 8, "all_layers" if ranges == "images" else "academic")
    way.check(teacher, SPEC, qconfig, UNUSED)
    outcome = way.run(job(teacher, qconfig, given=IMAGES), UNUSED)
    assert all(q.batches == (3 if ranges == "images" else 1) for q in activation_quantizers(outcome.student))
    with torch.no_grad():
        expected = teacher(IMAGES.held_out)
        assert (outcome.student(IMAGES.held_out) - expected).norm() < 0.2 * expected.norm()
        # the same function in float, but for the biases that were absorbed: one normal value in 741 is cut
        assert (outcome.reference(IMAGES.held_out) - expected).norm() < 0.02 * expected.norm()
    assert len(outcome.images.images) == (16 if ranges == "images" else 0)  # none were used
    assert torch.equal(outcome.images.held_out, IMAGES.held_out)
    with pytest.raises(ValueError, match=r"^Dfq: ranges must be one of batch_norms, images, got 'noise'$"):
        Dfq(ranges="noise")


def test_images_that_nothing_was_tuned_on_judge_where_none_were_held_out():
    rest = hold_out(IMAGES.images, IMAGES.labels, 0)
    assert torch.equal(rest.unused().held_out, IMAGES.images)
    assert torch.equal(rest.unused().held_out_labels, IMAGES.labels)
    assert len(rest.unused().images) == len(rest.unused().labels) == 0


@pytest.mark.parametrize(
    ("tune", "title"),
    [
        (Reconstruction(replace(BRECQ, iterations=3)), "block reconstruction (BRECQ)"),
        (Reconstruction(GENIE_M), "block reconstruction (Genie-M)"),
        (Reconstruction(ADAROUND), "layer reconstruction (AdaRound)"),
        (Reconstruction(replace(GENIE_M, granularity="layer")), "layer reconstruction"),
        (controls.ranges_alone("smoke"), "ranges alone"),
        (synq.plain_tuning("smoke"), "fine-tuning"),
        (Dfq(), "weights equalised, biases corrected"),
    ],
)
def test_a_tuning_says_what_it_does(tune, title):
    assert tune.title == title


def test_the_range_of_an_image_is_that_of_its_widest_channel():
    spec = InputSpec((2, 8, 8), mean=(0.5, 0.25), std=(0.5, 0.125), valid_range=(0.0, 1.0))
    assert image_range(spec) == (-2.0, 6.0)
    assert image_range(SPEC) is None
