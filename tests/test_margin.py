"""AGM's margin: found in the first epoch of tuning, given, frozen after, and the same after a resume.

Mutants tried, each red: the mean over steps instead of usable batches; the epoch's last median left out; the margin
moved on after the epoch; AGM on while its margin is looked for; a given s overwritten; a given m multiplied by its
factor; a given s alone enough for the hinge, and not enough for the others; the sums missing from the checkpoint.
"""

import math

import pytest
import torch

from zsq_ext.core.progress import QUIET
from zsq_ext.core.run import Run
from zsq_ext.core.steps import Stage, State, run_steps
from zsq_ext.tune.ideas import Agm
from zsq_ext.tune.margin import AgmMargin

CPU = torch.device("cpu")
MEDIANS = [0.9, 0.8, 0.5, 0.25, 0.125, 4.0]


def watched(margin, medians, first=0):
    for step, median in enumerate(medians, first):
        if margin.watches(step):
            margin.watch(step, torch.tensor(median))
    return margin.margin.item(), margin.sigma.item()


def phases(margin, steps):
    return "".join("w" if margin.watches(n) else "c" if margin.counts(n) else "-" for n in range(steps))


def test_the_first_epoch_behind_the_warm_up_is_watched():
    margin = AgmMargin(Agm(), warmup=2, per_epoch=3, device=CPU)
    assert phases(margin, 8) == "--wwwccc"
    found = watched(margin, MEDIANS)
    assert found == pytest.approx(((0.5 + 0.25 + 0.125) / 3, (0.5 + 0.25 + 0.125) / 6))


def test_the_factors():
    margin = AgmMargin(Agm(margin_factor=2.0, sigma_factor=0.25), 0, 2, CPU)
    assert watched(margin, [0.5, 1.0]) == pytest.approx((1.5, 0.375))


@pytest.mark.parametrize(
    ("idea", "phases_of", "found"),
    [
        (Agm(margin=3.0), "ccc", (3.0, 1.5)),
        (Agm(margin=3.0, margin_factor=2.0, sigma=0.7), "ccc", (3.0, 0.7)),
        (Agm(sigma=0.7), "wwc", (0.75, 0.7)),
        (Agm(form="gauss", sigma=0.7), "ccc", (None, 0.7)),
        (Agm(form="erfc", sigma=0.7), "ccc", (None, 0.7)),
        (Agm(form="erfc"), "wwc", (0.75, 0.375)),
        (Agm(form="gauss", margin=3.0), "ccc", (3.0, 1.5)),
    ],
    ids=str,
)
def test_what_is_given_is_not_looked_for(idea, phases_of, found):
    margin = AgmMargin(idea, 0, 2, CPU)
    assert phases(margin, 3) == phases_of
    m, s = watched(margin, [0.5, 1.0])
    assert s == pytest.approx(found[1])
    assert found[0] is None or m == pytest.approx(found[0])


def test_batches_passed_over_do_not_count():
    assert watched(AgmMargin(Agm(), 0, 3, CPU), [0.5, math.nan, 1.0]) == pytest.approx((0.75, 0.375))
    m, s = watched(AgmMargin(Agm(), 0, 2, CPU), [math.nan, math.nan])
    assert (m, s) == pytest.approx((1e-6, 0.5e-6))  # finite, and next to no push


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 7])
def test_the_same_after_a_resume(tmp_path, stop):
    """Killed before, within and behind the epoch in which the margin is found."""

    def tune(run):
        margin = AgmMargin(Agm(), 1, 3, CPU)
        used = []

        def step(n):
            if margin.watches(n):
                margin.watch(n, torch.tensor(1 / (n + 1)))
            used.append((margin.margin.item(), margin.sigma.item()) if margin.counts(n) else None)
            return {"loss": torch.zeros(())}

        run_steps(Stage(run, "tuning", 0, QUIET), 9, step, State(margin.tensors()), advice="")
        return used

    whole = tune(Run(None, {}))
    assert whole[:4] == [None] * 4
    assert whole[4] == pytest.approx(((1 / 2 + 1 / 3 + 1 / 4) / 3, (1 / 2 + 1 / 3 + 1 / 4) / 6))
    assert len(set(whole[4:])) == 1
    run = Run(tmp_path, {}, checkpoint_seconds=0)
    margin = AgmMargin(Agm(), 1, 3, CPU)
    for n in range(stop):  # what a checkpoint after `stop` steps holds
        if margin.watches(n):
            margin.watch(n, torch.tensor(1 / (n + 1)))
    run.save("checkpoint-tuning", State(margin.tensors()).tensors(), {"step": stop, "history": []})
    assert tune(run) == whole[stop:]
