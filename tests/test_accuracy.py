"""The accuracy harness: rows found by what decided them, and intervals that say when they say nothing."""

import pytest

from zsq_ext.bench.accuracy import KEYS, Table, differences, summary
from zsq_ext.bench.intervals import paired_interval


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
