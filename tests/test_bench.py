"""The measuring room: what is timed is right, floors are what they say, and the tables show it."""

import functools
import math
import subprocess
import sys
import types
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from zsq_ext import bench
from zsq_ext.bench import compare, fake_quant, families, generator, image, roofline, steps, timing
from zsq_ext.core.progress import QUIET
from zsq_ext.ops.backend import choice
from zsq_ext.ops.cases import adaround as cases_adaround
from zsq_ext.ops.cases import bn_act as cases_bn_act
from zsq_ext.ops.cases import fake_quant as cases
from zsq_ext.ops.cases import fake_quant_minmax as cases_minmax
from zsq_ext.ops.cases import heads as cases_heads
from zsq_ext.ops.cases import image as cases_image
from zsq_ext.ops.cases import qdrop as cases_qdrop

SECONDS = 0.01


@pytest.fixture
def quick(monkeypatch):
    """Clocks that look for a moment only: what is tested is the rows, not the times."""
    compare = timing.compare
    monkeypatch.setattr(
        timing, "compare", lambda contenders, inputs, device, seconds=0.0: compare(contenders, inputs, device, SECONDS)
    )
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device, call_bytes=None: 1e9)
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
    monkeypatch.setattr(cases, "FAKE_QUANT_BENCH_LAYERS", [])
    rows = [row for row in families.rows(QUIET, only="fake_quant") if row["backend"] == "cpu"]
    both = "forward+backward"
    assert [(row["op"], row["pass"]) for row in rows] == [
        ("fake_quant", "forward"),
        ("fake_quant", "out"),
        ("fake_quant", both),
        ("fake_quant_lsq", both),
    ]
    x = case.args("cpu")[0]
    for row, factor in zip(rows, (2, 2, 5, 5), strict=True):
        assert row["bytes"] == factor * x.nbytes
        assert row["floor_ms"] == pytest.approx(row["bytes"] / 1e9 * 1e3)
        assert row["pct_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["ms"])
        assert set(row["peers"]) - {"torchao"} == {"eager", "aten"} | (
            {"clone"} if row["op"] == "fake_quant" else set()
        )
        assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]


def test_torchao_is_a_peer_where_it_is_installed(monkeypatch):
    seen = []

    def stand_in(x, block, scale, zero_point, dtype, qmin, qmax):
        seen.append((block, dtype, qmin, qmax))
        return x.clone()

    module = types.ModuleType("torchao.quantization.quant_primitives")
    module._fake_quantize_affine = stand_in
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    fake_quant._torchao.cache_clear()
    try:
        peers = fake_quant._peers(cases.FAKE_QUANT_BENCH[0], lsq=False)
    finally:
        fake_quant._torchao.cache_clear()
    x, one, many = torch.randn(2, 3, 4), torch.ones(1), torch.ones(3)
    peers["torchao"](x, one, one.int(), -8, 7, None)
    peers["torchao"](x, many, many.int(), 0, 255, 1)
    assert seen == [((2, 3, 4), torch.int8, -8, 7), ((2, 1, 4), torch.uint8, 0, 255)]


def test_codes_and_ranges_are_timed(quick, monkeypatch):
    case = next(case for case in cases.FAKE_QUANT_BENCH if case.dtype == torch.float32)
    monkeypatch.setattr(cases, "FAKE_QUANT_BENCH", [case])
    rows = [row for row in families.rows(QUIET, only="codes_and_ranges") if row["backend"] == "cpu"]
    *codes, ranges = rows
    assert [row["op"] for row in codes] == ["quantize", "dequantize"]
    assert all(row["bytes"] == case.args("cpu")[0].nbytes * 5 / 4 for row in codes)  # a code is a byte
    assert (ranges["op"], ranges["bytes"], set(ranges["peers"])) == ("channel_range", 512 * 4608 * 4, {"aten"})


def test_heads_are_timed_beside_the_chains_they_replace(quick, monkeypatch):
    logits = [cases_heads.DistillCase("small", (8, 20)), cases_heads.DistillCase("half", (8, 20), dtype=torch.float16)]
    maps = [cases_heads.CamCase("last", layout="channels_last", upper=6.0)]
    monkeypatch.setattr(cases_heads, "DISTILL_BENCH", logits)
    monkeypatch.setattr(cases_heads, "CAM_BENCH", maps)
    rows = [row for row in families.rows(QUIET, only="heads") if row["backend"] == "cpu"]
    size = maps[0].activation().nbytes
    assert [(row["op"], row["bytes"], set(row["peers"])) for row in rows] == [
        ("distill_head", 5 * 640, {"eager"}),
        ("distill_head", 5 * 320, {"eager"}),
        ("cam_map", 2 * size, {"eager", "bmm"}),
        ("count_active", size, {"eager"}),
    ]


def test_bn_act_is_timed_beside_what_hooks_do(quick, monkeypatch):
    found = [cases_bn_act.BnActCase("small", (2, 8, 6, 6), residual=True), cases_bn_act.BnActCase("plain", stats=None)]
    monkeypatch.setattr(cases_bn_act, "BN_ACT_BENCH", found)
    rows = [row for row in families.rows(QUIET, only="bn_act") if row["backend"] == "cpu"]
    assert [(row["case"], row["pass"]) for row in rows] == [
        (case, pass_) for case in ("small", "plain") for pass_ in ("forward", "forward+backward")
    ]
    sizes = [case.args()["u"].nbytes for case in found]
    assert [row["bytes"] for row in rows] == [3 * sizes[0], 7 * sizes[0], 2 * sizes[1], 5 * sizes[1]]
    assert all(set(row["peers"]) == {"eager", "clone"} for row in rows)


def test_extremes_are_timed_beside_an_observer_and_move_nothing(quick, monkeypatch):
    case = cases_bn_act.BnActCase("range", (2, 8, 6, 6), stats=None, extremes=True)
    monkeypatch.setattr(cases_bn_act, "BN_ACT_BENCH", [case])
    (row,) = [row for row in families.rows(QUIET, only="bn_act") if row["backend"] == "cpu"]
    assert (row["pass"], row["bytes"]) == ("forward", 2 * case.args()["u"].nbytes)
    assert set(row["peers"]) == {"eager", "clone"}


def test_adaround_is_timed_beside_the_published_chain(quick, monkeypatch):
    monkeypatch.setattr(cases_adaround, "ADAROUND_BENCH", {"block": ((8, 4, 3, 3), (8, 1, 3, 3))})
    rows = [row for row in families.rows(QUIET, only="adaround") if row["backend"] == "cpu"]
    assert [(row["op"], row["pass"]) for row in rows] == [("adaround", "forward"), ("adaround", "forward+backward")]
    n = 8 * 4 * 9 + 8 * 9
    assert [row["bytes"] for row in rows] == [10 * n, 24 * n]
    assert all(set(row["peers"]) == {"eager"} for row in rows)


def test_qdrop_is_timed_beside_where(quick, monkeypatch):
    monkeypatch.setattr(cases_qdrop, "QDROP_BENCH", [cases_qdrop.QDropCase("small", layout="channels_last")])
    rows = [row for row in families.rows(QUIET, only="qdrop") if row["backend"] == "cpu"]
    assert [(row["op"], row["pass"]) for row in rows] == [("qdrop", "forward"), ("qdrop", "forward+backward")]
    n = 4 * 8 * 6 * 6
    assert [row["bytes"] for row in rows] == [3 * 4 * n, 6 * 4 * n]
    assert all(set(row["peers"]) == {"eager", "clone"} for row in rows)


def test_images_are_timed_beside_what_is_written_without_the_ops(quick, monkeypatch):
    view = cases_image.ViewCase("view", (2, 3, 12, 12), (8, 8))
    crop = cases_image.CropCase("crop", (2, 3, 12, 12), (8, 8))
    monkeypatch.setattr(cases_image, "VIEW_BENCH", [view])
    monkeypatch.setattr(cases_image, "CROP_BENCH", [crop])
    monkeypatch.setattr(image, "LOW_PASS", [((2, 3, 16, 12), 4.0)])
    rows = [row for row in families.rows(QUIET, only="image") if row["backend"] in ("cpu", "torch")]
    both = "forward+backward"
    assert [(row["op"], row["pass"]) for row in rows] == [
        *((op, pass_) for op in ("view_images", "resize_crops") for pass_ in ("forward", both)),
        ("low_pass", "forward"),
    ]
    x, y, args = 4 * 2 * 3 * 144, 4 * 2 * 3 * 64, crop.args()
    seen = 4 * 3 * int((args["height"] * args["width"]).sum())
    assert [row["bytes"] for row in rows[:4]] == [2 * y, 3 * y + x, seen + y, seen + 2 * y + x]
    assert [set(row["peers"]) for row in rows] == [{"eager"}] * 2 + [{"matmul", "loop"}] * 2 + [{"rfft2"}]


def test_minmax_is_timed_beside_one_weight_after_the_other(quick, monkeypatch):
    case = cases_minmax.MinMaxCase("small")
    monkeypatch.setattr(cases_minmax, "FAKE_QUANT_MINMAX_BENCH", [case])
    rows = [row for row in families.rows(QUIET, only="fake_quant_minmax") if row["backend"] == "cpu"]
    assert [(row["op"], row["case"], row["pass"]) for row in rows] == [
        ("fake_quant_minmax", "small", "fresh"),
        ("fake_quant_minmax", "small", "out"),
    ]
    for row in rows:
        assert row["bytes"] == 2 * sum(t.nbytes for t in case.args()[0])
        assert set(row["peers"]) == {"eager", "one by one", "clone"}


def test_what_is_wrong_is_not_timed():
    with pytest.raises(RuntimeError, match="something differs from the reference; not timed"):
        timing.assert_equal("something", torch.ones(2), torch.tensor([1.0, 1.0 + 1e-6]))
    with pytest.raises(RuntimeError, match="not timed"):
        timing.assert_equal("something", torch.ones(2), torch.tensor([1.0, 1.01]), tolerance=1e-3)
    timing.assert_equal("something", torch.ones(2), torch.tensor([1.0, 1.0 + 1e-6]), tolerance=1e-3)


def test_contenders_take_turns_on_inputs_that_no_other_has_just_read():
    seen = []
    contenders = {name: functools.partial(lambda name, i: seen.append((name, i)), name) for name in "ab"}
    times = timing.compare(contenders, [(0,), (1,), (2,)], "cpu", seconds=0.0)
    assert set(times) == {"a", "b"}
    assert seen[:2] == [("a", 0), ("b", 0)]  # to warm up
    seen = seen[2:]
    assert [i for _, i in seen] == [k % 3 for k in range(len(seen))]
    calls = 1 + timing._CALLS
    turns = [{name for name, _ in seen[k : k + calls]} for k in range(0, len(seen), calls)]
    assert turns[:2] == [{"a"}, {"b"}]
    assert sorted(map(str, turns[2:])) == ["{'a'}", "{'b'}"]


def test_a_median_of_two_lies_between_them():
    assert timing._summary([4.0, 2.0]) == timing.Timing(3.0, 2.2, 3.8)


def test_endless_timing_is_refused():
    with pytest.raises(ValueError, match="seconds must be at least 0 and finite, got inf"):
        families.rows(QUIET, seconds=math.inf)


def test_a_forced_backend_is_chosen_outside_the_clock():
    seen = []
    record = lambda: seen.append(choice())  # noqa: E731
    timing.compare({"free": record, "forced": timing.Forced("reference", record)}, [()], "cpu", seconds=0.0)
    calls = 1 + timing._CALLS
    assert seen[: 2 + 2 * calls] == ["auto", "reference"] + ["auto"] * calls + ["reference"] * calls
    assert timing.Forced("cpu", choice)() == "cpu"


def test_inputs_outgrow_the_cache():
    args = (torch.arange(4.0).expand(3, 4).t(), {"axis": 1, "list": [torch.ones(2)]})
    made = timing.copies(args, 16 << 20, "cpu")
    assert len(made) * (16 << 20) > 2 * timing.cache_bytes("cpu")
    assert len({x.data_ptr() for x, _ in made}) == len({rest["list"][0].data_ptr() for _, rest in made}) == len(made)
    assert all(torch.equal(x, args[0]) and rest["axis"] == 1 for x, rest in made)
    assert len(timing.copies(args, 1, "cpu")) == timing._MAX_COPIES


def test_steps_of_a_network(quick):
    rows = []
    for op, (step, eager) in steps._steps(Tiny(steps.CLASSES), "cpu").items():
        rows += steps._rows(op, "tiny", step, eager, "cpu")
        for got, want in zip(step(), eager(), strict=True):  # the peer does the same work
            timing.assert_equal(op, got, want, 1e-3)
    assert [(row["op"], row["backend"]) for row in rows] == [
        (op, name)
        for op in ("synq_tuning_step", "synq_generation_step", "dgh_generation_step")
        for name in ("reference", "cpu")
    ]
    for row in rows:
        assert row["peak_mb"] > 0
        assert row["peak_mb_eager"] > 0
        assert set(row["peers"]) == {"reference", "eager"}
        assert 0 < row["outside_convolutions"] < 1

    # two convolutions on 32 x 32, one of them with one input channel per group, and a linear; an image each
    forward = 2 * steps.BATCH * (32 * 32 * 9 * (8 * 3 + 8) + 8 * steps.CLASSES)
    generation = rows[2]["flops"]  # one forward, and back to the image
    assert generation == rows[4]["flops"] == 2 * forward
    tuning = rows[0]["flops"]  # two forwards of both networks, and back to weights and images
    assert 4 * forward < tuning <= 10 * forward

    header, *cells = bench.lines({"rows": rows})
    assert header[-2:] == ["outside convolutions", "times as fast as"]
    assert all(len(line) == len(header) for line in cells)
    assert "reference" in cells[1][-1]
    assert "outside convolutions:" in bench.legend({"rows": rows})


def test_the_profiler_says_nothing_of_itself():
    code = "import torch; from zsq_ext.bench import timing; print(timing.peak_mb(lambda: torch.ones(1 << 18), 'cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("1.0\n", "")


def test_families_have_no_column_for_convolutions():
    row = dict.fromkeys(("op", "case", "dtype", "device", "backend", "pass"), "x")
    row |= {"ms": 1.0, "ms_p10": 0.5, "ms_p90": 2.0, "pct_of_floor": 50.0, "peers": {"eager": 3.0}}
    header, cells = bench.lines({"rows": [row]})
    assert header[-2:] == ["% of floor", "times as fast as"]
    assert cells[-2:] == ["50", "eager 3.00x"]
    legend = bench.legend({"rows": [row]})
    assert all(f"{column}:" in legend for column in ("ms", "p10-p90", "% of floor", "times as fast as"))
    assert "outside convolutions" not in legend


def test_generators_beside_their_plain_form(quick, monkeypatch):
    monkeypatch.setattr(generator, "CASES", [("embedding", 8, 3, 2), ("conditional", 8, 3, 2)])
    rows = generator.rows(QUIET)
    assert [(row["case"], row["pass"]) for row in rows] == [
        (f"{kind} 8 px B=2", pass_)
        for kind in ("embedding", "conditional")
        for pass_ in ("forward", "forward+backward")
    ]
    for row in rows:
        # two convolutions of a small map, a third one and a linear layer; backward twice that, but not to bare noise
        taps = 128 * 2 * 2 * 128 + 64 * 4 * 4 * 128
        linear, last = 128 * 2 * 2 * 100, 64 * 8 * 8 * 9 * 3
        for name, many in (("flops", 16), ("flops_plain", 36)):
            forward = 2 * 2 * (many * taps + last + linear)
            both = 3 * forward - (2 * 2 * linear if "conditional" in row["case"] else 0)
            assert row[name] == (forward if row["pass"] == "forward" else both)
        assert set(row["peers"]) == {"plain"}
        assert row["peak_mb"] > 0


def test_a_generator_that_differs_is_not_timed(quick, monkeypatch):
    monkeypatch.setattr(generator, "CASES", [("embedding", 8, 3, 2)])
    monkeypatch.setattr(generator.Generator, "SLOPE", property(lambda self: 0.5 if self.up1.plain else 0.2))
    with pytest.raises(RuntimeError, match="differs from the reference; not timed"):
        generator.rows(QUIET)


def test_suites_have_names():
    with pytest.raises(ValueError, match="suite must be one of families, steps, generator, got 'nothing'"):
        bench.run("nothing")


def result(*rows, suite="families", **environment):
    machine = {"cpu": "x", "gpu": None, "limits": {"cpu": {"copy_gb_s": 10.0, "matmul_gflop_s": 100.0}}}
    return {"suite": suite, "environment": {**machine, **environment}, "rows": list(rows)}


def row(case, ms, p10, p90, **more):
    keys = {"op": "o", "case": case, "dtype": "float32", "device": "cpu", "backend": "cpu", "pass": "forward"}
    floor = {"bytes": 10**6, "flops": 10**6, "pct_of_floor": 50.0}
    return {**keys, **floor, "ms": ms, "ms_p10": p10, "ms_p90": p90, **more}


def test_a_change_is_one_that_both_runs_noise_leaves_standing():
    old = result(row("same", 1, 0.9, 1.2), row("slower", 1, 0.9, 1.2), row("faster", 1, 0.9, 1.2), row("gone", 1, 1, 1))
    new = result(
        row("same", 1.3, 1.1, 1.4), row("slower", 2, 1.3, 3), row("faster", 0.5, 0.4, 0.8), row("new", 1, 1, 1)
    )
    found = compare.compare(old, new)
    assert {change.keys[1]: change.verdict for change in found.changes} == {
        "same": "", "slower": "slower", "faster": "faster",
    }  # fmt: skip
    assert str(found) == (
        "3 rows compared: 1 slower, 1 faster beyond the noise of both runs\n"
        "1 rows only in the old run, 1 only in the new one"
    )
    header, first, *_ = found.lines()
    assert dict(zip(header, first, strict=True))["case"] == "slower"  # twice as long is the largest change
    assert first[-2:] == ["2.00", "slower"]


def test_runs_of_two_machines_are_told_apart():
    found = compare.compare(result(gpu={"name": "a", "copy_gb_s": 1}), result(gpu={"name": "a", "copy_gb_s": 2}))
    assert not found.machine
    found = compare.compare(result(cpu="x"), result(cpu="y"))
    assert "the runs are not of one machine: cpu 'x' and 'y'" in str(found)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="old must be of the suite 'families', got 'steps'"):
        compare.compare(result(suite="steps"), result())
    with pytest.raises(ValueError, match="old must be what zsq bench --json wrote"):
        compare.check([], "families")
    for lacking, said in (
        (row("a", 1, 0.9, None), "a time as ms_p90 in every row, got None in row 1"),
        ({"op": "x", "ms": 1.0}, "a name as case in every row, got None in row 1"),
        (3, "a name as op in every row, got None in row 1"),
    ):
        with pytest.raises(ValueError, match=f"^compare: old must have {said}$"):
            compare.check(result(row("a", 1, 0.9, 1.2), lacking), "families")
    with pytest.raises(ValueError, match=r"^compare: old must hold rows as a list, got dict$"):
        compare.check({**result(), "rows": {}}, "families")


def test_the_roofline_is_the_rows_own_floor():
    """At one operation per byte the memory allows 10 GFLOP/s: a row at half of its floor's speed lies at 5."""
    svg = roofline.draw(result(row("a", 0.2, 0.2, 0.2)), "cpu")
    root = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    (points,) = (p.get("points").split() for p in root.iter(f"{name}polyline"))
    corners = [tuple(float(v) for v in p.split(",")) for p in points]
    titles = [c for c in root.iter(f"{name}circle") if len(c)]
    (circle,) = titles
    assert "o a cpu forward: 50 % of the floor" in circle[0].text
    x, y = float(circle.get("cx")), float(circle.get("cy"))
    (x0, y0), (x1, y1), (x2, level) = corners
    assert y1 == level  # behind the ridge
    assert x == x0  # the plot begins at one operation per byte
    assert x1 - x0 == pytest.approx((x2 - x0) / 2, abs=0.2)  # the ridge is at 10, the plot ends at 100
    decade = y0 - y1  # the roof rises from 10 to 100 GFLOP/s, and SVG counts downwards
    assert y - y0 == pytest.approx(decade * math.log10(2), abs=0.2)


def test_a_plot_of_nothing_is_refused():
    with pytest.raises(ValueError, match="must hold rows with bytes and operations on cpu, got 0"):
        roofline.draw(result(), "cpu")


def test_an_op_alone(quick):
    rows = families.rows(QUIET, only="count_active")
    assert {r["op"] for r in rows} == {"count_active"}
    assert not set(families.OPS) - set(families.FAMILIES)
    for name, ops in families.OPS.items():
        if name != "image":  # which draws its images to count them
            assert {subject.op for subject in families.FAMILIES[name]("cpu")} - {name} == set(ops)
    assert set(families.OPS["image"]) == {*image._FLOPS, "low_pass"}


def test_a_family_alone_and_beside_the_compiler(quick, monkeypatch):
    case = cases.FakeQuantCase("small", (4, 8, 6, 6))
    monkeypatch.setattr(cases, "FAKE_QUANT_BENCH", [case])
    monkeypatch.setattr(cases, "FAKE_QUANT_BENCH_LAYERS", [])
    rows = [r for r in families.rows(QUIET, only="fake_quant", inductor=True) if r["backend"] == "cpu"]
    assert {r["op"] for r in rows} == {"fake_quant", "fake_quant_lsq"}
    assert all("inductor" in r["peers"] for r in rows)
    with pytest.raises(ValueError, match=r"only must be one of fake_quant, .*, got 'nothing'"):
        families.rows(QUIET, only="nothing")
    with pytest.raises(ValueError, match="only must be left out with the suite 'steps'"):
        bench.run("steps", only="fake_quant")
