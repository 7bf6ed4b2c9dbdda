"""The accuracy harness: rows found by what decided them, and intervals that say when they say nothing."""

import pytest
from recipes import changed

from zsq_ext import api
from zsq_ext.bench import tasks
from zsq_ext.bench.accuracy import KEYS, Table, differences, run_table, summary
from zsq_ext.bench.intervals import paired_interval
from zsq_ext.bench.tables import TABLES, Plan, Variant, without
from zsq_ext.synth.pixels import PixelConfig
from zsq_ext.tune.finetune import TuneConfig
from zsq_ext.tune.ideas import CamAlign, LowPass, Perturb


def row(variant="SynQ", seed=0, top1=90.0, settings="a"):
    keys = dict(zip(KEYS, ("textured_shapes", "resnet20", "synq", variant, 4, 4, seed), strict=True))
    return {
        **keys, "settings": settings, "teacher_top1": 94.0, "top1_last": top1, "top1_best": top1 + 1,
        "agreement": 95.0, "seconds": 10.0,
    }  # fmt: skip


def test_an_interval_is_students():
    interval = paired_interval([3.0, 4.0, 5.0], [1.0, 1.0, 1.0])
    # differences 2, 3, 4: mean 3, deviation 1, t(2) = 4.303, so 4.303 / sqrt(3)
    assert interval.mean == pytest.approx(3)
    assert interval.half_width == pytest.approx(2.4843, abs=1e-3)
    assert interval.resolved


def test_an_interval_around_zero_is_not_resolved():
    assert str(paired_interval([1.0, -1.0], [0.0, 0.0])).endswith("(not resolved)")


@pytest.mark.parametrize(("first", "second"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_too_few_pairs_are_refused(first, second):
    with pytest.raises(ValueError, match="paired_interval: needs 2 to 11 pairs"):
        paired_interval(first, second)


def test_an_interrupted_table_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "table.json"
    Table(path).add(row())
    again = Table(path)
    assert again.find(**{key: row()[key] for key in (*KEYS, "settings")}) == row()
    assert again.find(**{**{key: row()[key] for key in KEYS}, "settings": "b"}) is None
    again.add(row(settings="b", top1=91.0))
    assert [r["top1_last"] for r in Table(path).rows] == [91.0]


def test_differences_pair_the_seeds_that_both_have():
    rows = [row(seed=s, top1=90.0 + s) for s in range(3)] + [row("noise", s, 88.0) for s in (1, 2)]
    interval = differences(rows, "SynQ", "noise")
    assert interval.pairs == 2
    assert interval.mean == pytest.approx(3.5)
    assert differences(rows[:1], "SynQ", "noise") is None


def test_the_summary_tells_last_from_best():
    rows = [row(seed=s, top1=90.0 + s) for s in (0, 1)] + [row("noise", s, 88.0) for s in (0, 1)]
    text = summary(rows, ("noise",))
    assert "| W4A4 | SynQ | 2 | 90.50 ± 0.71 | 91.50 | 95.0 | +2.50 ± 6.35 (not resolved) | 10 |" in text
    assert "| variant | seeds | top-1 last | top-1 best | agreement | top-1 - noise |" in text
    ended = [{key: value for key, value in one.items() if key != "top1_best"} for one in rows]
    assert "| variant | seeds | top-1 | agreement | top-1 - noise |" in summary(ended, ("noise",))


def quick(recipe):
    """Two images in two steps."""
    recipe = changed(
        recipe, images=2, held_out=1, range_steps=1, distill=without(CamAlign, Perturb)(recipe).tune.distill
    )
    tuned = recipe.tune.finetune.epochs > 0
    recipe = changed(recipe, finetune=TuneConfig(epochs=int(tuned), steps_per_epoch=1, batch=2, lr=1e-5))
    return changed(recipe, pixels=PixelConfig(iterations=2)) if hasattr(recipe.images, "pixels") else recipe


def test_a_table_makes_what_its_rows_share_once_and_runs_what_it_lacks(tmp_path, monkeypatch):
    """Two variants on the method's images, one on noise, one on real ones: two sets are made, the judge's included."""
    made, real = [], api.synthesize
    monkeypatch.setattr(api, "synthesize", lambda *a, **k: made.append(k["config"].images) or real(*a, **k))
    variants = (
        Variant("min-max", "minmax"),
        Variant("noise", "noise"),
        Variant("SynQ", "synq", change=without(LowPass)),
        Variant("real images", "synq", "real"),
    )
    plan = Plan("resnet20", variants, ((4, 4), (4, None)), 1)
    table, test = Table(tmp_path / "table.json"), tasks.TestSet(4)
    run_table(table, plan, (0,), test, config=quick)
    assert [type(source).__name__ for source in made] == ["PixelImages", "GaussianImages"]
    assert [(row["variant"], row["a_bits"]) for row in table.rows[:3]] == [
        ("min-max", 4),
        ("min-max", None),
        ("noise", 4),
    ]
    assert {row["agreement"] in (0.0, 100.0) for row in table.rows} == {True}  # one image judges all
    again = Table(tmp_path / "table.json")
    run_table(again, plan, (0,), test, config=quick)
    assert (len(made), again.rows) == (2, table.rows)
    assert "| W4 | SynQ | 1 |" in summary(again.rows)


def test_the_tables_are_about_methods_beside_their_controls():
    for plans in TABLES.values():
        for plan in plans:
            names = [variant.name for variant in plan.variants]
            assert len(set(names)) == len(names)
