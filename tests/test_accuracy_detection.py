"""The harness on the detection task: AP in place of top-1, and everything else as for classifiers.

Broken on purpose, and which assertion saw it: the float network's figures in the place of the student's; every variant
on the method's own images; differences of AP50.
"""

from dataclasses import replace

import pytest

from zsq_ext import api
from zsq_ext.bench import tasks
from zsq_ext.bench.accuracy import Table, run_table, summary
from zsq_ext.bench.tables import DGH_VARIANTS, TABLES, Plan
from zsq_ext.bench.tasks import TASKS, task_of
from zsq_ext.methods.ptq import Reconstruction

pytest.importorskip("pycocotools")


def quick(recipe):
    """Six images in two visits, and units that learn for two steps."""
    images = replace(recipe.images, images=6, held_out=2, stored=replace(recipe.images.stored, batch=8, iterations=2))
    short = replace(recipe.tune.config, iterations=2, activation_iterations=1)
    return replace(recipe, images=images, tune=Reconstruction(short))


def test_a_detector_is_quantized_end_to_end_and_a_table_runs_what_it_lacks(tmp_path, monkeypatch):
    made, real = [], api.synthesize
    monkeypatch.setattr(api, "synthesize", lambda *a, **k: made.append(k["config"].images) or real(*a, **k))
    variants = tuple(variant for variant in DGH_VARIANTS if variant.images != "noise")
    plan = Plan("fpn_small", variants, ((8, 8),), 1, "shape_scenes")
    table, test = Table(tmp_path / "table.json"), tasks.TestSet(8, task="shape_scenes")
    run_table(table, plan, (0,), test, config=quick)
    assert [row["variant"] for row in table.rows] == ["DGH", "real images"]
    assert [type(source).__name__ for source in made] == ["DghImages"]
    by_images = {row["variant"]: row for row in table.rows}
    # 8 bits cost little, on ranges from six scenes and eight scenes to judge by
    assert by_images["real images"]["AP50_last"] > 50
    assert by_images["real images"]["AP50_last"] != by_images["real images"]["teacher_AP50"]
    assert by_images["real images"]["AP_last"] != by_images["DGH"]["AP_last"]
    assert {row["agreement"] for row in table.rows} == {None}
    assert not any("_best" in key for row in table.rows for key in row)
    again = Table(tmp_path / "table.json")
    run_table(again, plan, (0,), test, config=quick)
    assert (len(made), again.rows) == (1, table.rows)
    text = summary(again.rows, ("DGH",))
    assert f"teacher AP@0.5 {table.rows[0]['teacher_AP50']:.2f} %, AP@[.5:.95] " in text
    assert "| bits | variant | seeds | AP@0.5 | AP@[.5:.95] | agreement | AP@[.5:.95] - DGH | s |" in text
    assert text.count("| W8A8 |") == 2


def test_every_table_is_about_networks_that_know_its_task():
    for plan in (plan for plans in TABLES.values() for plan in plans):
        assert task_of(plan.model) is TASKS[plan.task]
    assert task_of("resnet18") is None


@pytest.mark.parametrize("task", TASKS)
def test_a_test_set_is_its_tasks_images_in_batches(task):
    batches = list(tasks.TestSet(5, batch=2, task=task)())
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    images, truth = TASKS[task].split("test").images(range(4, 5))
    assert images.equal(batches[2][0])
    if task == "shape_scenes":
        assert all(part.equal(whole) for part, whole in zip(batches[2][1], truth, strict=True))
    else:
        assert batches[2][1].equal(truth)
