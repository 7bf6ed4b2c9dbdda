"""The measuring room: what is timed is right, floors are what they say, and the tables show it."""

import pytest
import torch
from torch import nn

from zsq_ext import bench
from zsq_ext.bench import families, heads, steps, timing
from zsq_ext.core.progress import QUIET
from zsq_ext.ops.cases import bn_act as cases_bn_act
from zsq_ext.ops.cases import fake_quant as cases
from zsq_ext.ops.cases import heads as cases_heads

SECONDS = 0.01


@pytest.fixture
def quick(monkeypatch):
    """Clocks that look for a moment only: what is tested is the rows, not the times."""
    compare = timing.compare
    monkeypatch.setattr(timing, "compare", lambda *args, seconds=0.0: compare(*args, seconds=SECONDS))
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(timing, "matmul_rate", lambda device: 1e9)


class Tiny(nn.Module):
    """A residual network of two convolutions, one of them depthwise."""

    def __init__(self, classes):
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.b_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = self.a_norm(self.a(x)).relu()
        return self.fc((x + self.b_norm(self.b(x))).relu().mean((2, 3)))


def test_every_contender_of_a_family_is_timed_beside_its_peers(quick, monkeypatch):
    case = next(case for case in cases.FAKE_QUANT_BENCH if case.dtype == torch.float32)
    monkeypatch.setattr(cases, "FAKE_QUANT_BENCH", [case])
    monkeypatch.setattr(cases_bn_act, "BN_ACT_BENCH", [])
    monkeypatch.setattr(cases_heads, "DISTILL_BENCH", [])
    monkeypatch.setattr(cases_heads, "CAM_BENCH", [])
    rows = [row for row in families.rows(QUIET) if row["backend"] == "cpu"]
    both = "forward+backward"
    assert [(row["op"], row["pass"]) for row in rows] == [
        ("fake_quant", "forward"),
        ("fake_quant", both),
        ("fake_quant_lsq", both),
    ]
    x = case.args("cpu")[0]
    for row, factor in zip(rows, (2, 5, 5), strict=True):
        assert row["bytes"] == factor * x.nbytes
        assert row["floor_ms"] == pytest.approx(row["bytes"] / 1e9 * 1e3)
        assert row["pct_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["ms"])
        assert set(row["peers"]) == {"eager", "aten"} | ({"clone"} if row["op"] == "fake_quant" else set())
        assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]


def test_heads_are_timed_beside_the_chains_they_replace(quick, monkeypatch):
    logits = [cases_heads.DistillCase("small", (8, 20)), cases_heads.DistillCase("half", (8, 20), dtype=torch.float16)]
    maps = [cases_heads.CamCase("last", layout="channels_last", upper=6.0)]
    monkeypatch.setattr(cases_heads, "DISTILL_BENCH", logits)
    monkeypatch.setattr(cases_heads, "CAM_BENCH", maps)
    rows = [row for row in heads.rows(QUIET) if row["backend"] == "cpu"]
    size = maps[0].activation().nbytes
    assert [(row["op"], row["bytes"], set(row["peers"])) for row in rows] == [
        ("distill_head", 5 * 640, {"eager"}),
        ("distill_head", 5 * 320, {"eager"}),
        ("cam_map", 2 * size, {"eager", "bmm"}),
        ("count_active", size, {"eager"}),
    ]


def test_bn_act_is_timed_beside_what_hooks_do(quick, monkeypatch):
    found = [cases_bn_act.BnActCase("small", (2, 8, 6, 6), residual=True), cases_bn_act.BnActCase("plain", stats=None)]
    monkeypatch.setattr(cases, "FAKE_QUANT_BENCH", [])
    monkeypatch.setattr(cases_bn_act, "BN_ACT_BENCH", found)
    monkeypatch.setattr(cases_heads, "DISTILL_BENCH", [])
    monkeypatch.setattr(cases_heads, "CAM_BENCH", [])
    rows = [row for row in families.rows(QUIET) if row["backend"] == "cpu"]
    assert [(row["case"], row["pass"]) for row in rows] == [
        (case, pass_) for case in ("small", "plain") for pass_ in ("forward", "forward+backward")
    ]
    sizes = [case.args()["u"].nbytes for case in found]
    assert [row["bytes"] for row in rows] == [3 * sizes[0], 7 * sizes[0], 2 * sizes[1], 5 * sizes[1]]
    assert all(set(row["peers"]) == {"eager", "clone"} for row in rows)


def test_what_is_wrong_is_not_timed():
    with pytest.raises(RuntimeError, match="something differs from the reference; not timed"):
        timing.assert_equal("something", torch.ones(2), torch.tensor([1.0, 1.0 + 1e-6]))
    with pytest.raises(RuntimeError, match="not timed"):
        timing.assert_equal("something", torch.ones(2), torch.tensor([1.0, 1.01]), tolerance=1e-3)
    timing.assert_equal("something", torch.ones(2), torch.tensor([1.0, 1.0 + 1e-6]), tolerance=1e-3)


def test_contenders_meet_the_inputs_in_turn():
    seen = {"a": [], "b": []}
    contenders = {name: seen[name].append for name in seen}
    times = timing.compare(contenders, [(0,), (1,)], "cpu", seconds=0.0)
    assert set(times) == {"a", "b"}
    # three calls to warm up and one to learn the pace, on the first input; then five rounds or more over both
    assert seen["a"][:4] == [0] * 4
    assert seen["a"][4:9] == [0, 1, 0, 1, 0]
    assert seen["a"] == seen["b"]


def test_inputs_outgrow_the_cache():
    made = timing.copies(lambda seed: seed, 16 << 20, "cpu")
    assert len(made) * (16 << 20) > 2 * timing._CPU_CACHE_BYTES
    assert len(timing.copies(lambda seed: seed, 1, "cpu")) == timing._MAX_COPIES


def test_steps_of_a_network(quick):
    rows = []
    for op, step in steps._steps(Tiny(steps.CLASSES), "cpu").items():
        rows += steps._rows(op, "tiny", step, "cpu")
    assert [(row["op"], row["backend"]) for row in rows] == [
        (op, name) for op in ("synq_tuning_step", "synq_generation_step") for name in ("reference", "cpu")
    ]
    for row in rows:
        assert set(row["peers"]) == {"reference"}
        assert 0 < row["outside_convolutions"] < 1

    # two convolutions on 32 x 32, one of them with one input channel per group, and a linear; an image each
    forward = 2 * steps.BATCH * (32 * 32 * 9 * (8 * 3 + 8) + 8 * steps.CLASSES)
    generation = rows[2]["flops"]  # one forward, and back to the image
    assert generation == 2 * forward
    tuning = rows[0]["flops"]  # two forwards of both networks, and back to weights and images
    assert 4 * forward < tuning <= 10 * forward

    header, *cells = bench.lines({"rows": rows})
    assert header[-2:] == ["outside convolutions", "faster than"]
    assert all(len(line) == len(header) for line in cells)
    assert "reference" in cells[1][-1]


def test_families_have_no_column_for_convolutions():
    row = dict.fromkeys(("op", "case", "dtype", "device", "backend", "pass"), "x")
    row |= {"ms": 1.0, "ms_p10": 0.5, "ms_p90": 2.0, "pct_of_floor": 50.0, "peers": {"eager": 3.0}}
    header, cells = bench.lines({"rows": [row]})
    assert header[-2:] == ["% of floor", "faster than"]
    assert cells[-2:] == ["50", "eager 3.00x"]


def test_suites_have_names():
    with pytest.raises(ValueError, match="suite must be one of families, steps, got 'nothing'"):
        bench.run("nothing")
