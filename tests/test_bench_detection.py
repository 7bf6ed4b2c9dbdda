"""The detection table: rows of DGH's images and their controls, measured by AP, run once each."""

from dataclasses import replace

from zsq_ext.bench import detection
from zsq_ext.bench.accuracy import Table
from zsq_ext.methods import dgh
from zsq_ext.methods.ptq import Reconstruction


def quick():
    """Six images in two visits, and units that learn for two steps."""
    recipe = dgh.config("smoke", "repo")
    images = replace(recipe.images, images=6, held_out=2, stored=replace(recipe.images.stored, batch=8, iterations=2))
    short = replace(recipe.tune.config, iterations=2, activation_iterations=1)
    return replace(recipe, images=images, tune=Reconstruction(short))


def test_a_detector_is_quantized_end_to_end_and_a_table_runs_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "BITS", ((8, 8),))
    monkeypatch.setattr(detection, "VARIANTS", ("DGH", "real scenes"))
    made, real = [], detection.api.synthesize
    monkeypatch.setattr(detection.api, "synthesize", lambda *a, **k: made.append(k["config"].images) or real(*a, **k))
    table, test = Table(tmp_path / "table.json"), detection.TestScenes(8)
    detection.run_table(table, (0,), test, recipe=quick())
    assert [row["variant"] for row in table.rows] == ["DGH", "real scenes"]
    assert [type(source).__name__ for source in made] == ["DghImages"]
    by_images = {row["variant"]: row["AP50"] for row in table.rows}
    assert by_images["real scenes"] > 50  # 8 bits cost little, on ranges from six scenes and eight scenes to judge by
    again = Table(tmp_path / "table.json")
    detection.run_table(again, (0,), test, recipe=quick())
    assert (len(made), again.rows) == (1, table.rows)
    text = detection.summary(again.rows)
    assert f"| float | | | {table.rows[0]['float']['AP50']:.2f} |" in text
    assert text.count("| W8A8 |") == 2
