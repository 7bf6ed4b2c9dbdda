"""The rows of fake_quant_many and lp_error: what they count, and beside whom they stand."""

import pytest

from zsq_ext.bench import families, timing
from zsq_ext.core.progress import QUIET
from zsq_ext.ops.cases import fake_quant_many as cases_many
from zsq_ext.ops.cases import lp_error as cases_lp


@pytest.fixture
def quick(monkeypatch):
    """Clocks that look for a moment only: what is tested is the rows, not the times."""
    compare = timing.compare
    monkeypatch.setattr(
        timing, "compare", lambda contenders, inputs, device, seconds=0.0: compare(contenders, inputs, device, 0.01)
    )
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device, call_bytes=None: 1e9)
    monkeypatch.setattr(timing, "matmul_rate", lambda device: 1e9)


def rows_of(family):
    return [row for row in families.rows(QUIET, only=family) if row["backend"] == "cpu"]


def test_many_are_timed_beside_one_after_the_other(quick, monkeypatch):
    case = next(case for case in cases_many.FAKE_QUANT_MANY if case.name == "weights")
    monkeypatch.setattr(cases_many, "FAKE_QUANT_MANY_BENCH", [case])
    rows = rows_of("fake_quant_many")
    assert [(row["op"], row["case"], row["pass"]) for row in rows] == [
        ("fake_quant_many", "weights", "forward"),
        ("fake_quant_many", "weights", "forward+backward"),
    ]
    size = sum(t.nbytes for t in case.args()[0])
    assert [row["bytes"] for row in rows] == [2 * size, 5 * size]
    assert all(set(row["peers"]) == {"one by one", "eager", "aten"} for row in rows)


def test_the_networks_are_whole():
    weights = {case.name: case.args()[0] for case in cases_many.FAKE_QUANT_MANY_BENCH}
    assert {name: len(ts) for name, ts in weights.items()} == {"weights_resnet18": 21, "weights_resnet20": 22}
    assert sum(t.numel() for t in weights["weights_resnet20"]) == 270896


def test_errors_are_timed_beside_the_loop(quick, monkeypatch):
    case = cases_lp.LpErrorCase("small", shape=(3, 40), candidates=9)
    monkeypatch.setattr(cases_lp, "LP_ERROR_BENCH", [case])
    (row,) = rows_of("lp_error")
    assert (row["op"], row["case"], row["pass"]) == ("lp_error", "small", "forward")
    assert row["bytes"] == 3 * 40 * 4, "one read, whatever the candidates"
    assert set(row["peers"]) == {"eager"}
