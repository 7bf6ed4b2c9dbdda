"""What Triton makes of kernels/*.py for real architectures, read off its PTX and ptxas's result: no GPU needed.

The launchers say themselves what they compile. A process of its own, without the interpreter and with a driver that
only names an architecture, calls them on CPU tensors of the benchmarks' sizes, and a launch compiles and does not run.

Broken on purpose, each seen red: a division written `/` (divides), a launch without enable_fp_fusion=False
(contracted), 8 elements of a crop per thread (spills), an index taken modulo (16 bytes), a kernel nobody launches
here (every kernel).
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHS = 80, 90

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


# What the benchmarks time, in each of its forms: a family's cases, and the functions of the backend called with one.


def fake_quants(ops, case):
    x, scale, zero_point, *_, axis = args = case.args()
    ops.fake_quant(*args)
    ops.fake_quant_backward(case.grad(), *args)
    ops.fake_quant_lsq_backward(case.grad(), *case.learned())
    ops.dequantize(ops.quantize(*args), scale, zero_point, axis, x.dtype)
    ops.channel_range(x, axis)


def manies(ops, case):
    from zsq_ext.ops.fake_quant_many_spec import Grids, Needs

    (x, *grids), (learned_x, *learned), some = case.args(), case.args(learned=True), [True] * len(case.each)
    ops.fake_quant_many(x, Grids(*grids))
    ops.fake_quant_many_backward(case.grads(), learned_x, Grids(*learned), Needs(some, some))


def lp_errors(ops, case):
    ops.lp_error(*case.args())


def minmaxes(ops, case):
    tensors, bits, axes, _ = case.args()
    for symmetric in (False, True):
        ops.fake_quant_minmax(tensors, bits, axes, symmetric)


def adarounds(ops, case):
    from zsq_ext.ops.adaround_spec import Rounding

    v, *lists, beta = case.lists()
    rounding, (grad, grad_reg) = Rounding(*lists), case.grads()
    ops.adaround(v, rounding, beta, False)
    ops.adaround(v, rounding, None, True)
    ops.adaround_backward([grad], v, rounding, beta, grad_reg, True)


def bn_acts(ops, case):
    u, _, layer, wanted = case.told()
    mask = ops.bn_act(*case.told(mask=case.saves_mask))[3]
    ops.bn_act_backward(*case.told_backward(mask))
    ops.channel_sums(u, layer.norm.mean, wanted.stats)
    ops.channel_sums_backward(u, layer.norm.mean, *case.grads()[1:])


def distills(ops, case):
    from zsq_ext.ops.heads_spec import Grads, Kept, Needs, Terms, Trust

    student, teacher, labels, given, *how = case.args()
    terms, grads = Terms(*how[:4]), Grads(*case.grads())
    *_, easy, _, rows = ops.distill_head(student, teacher, Trust(labels, given, *how[4:]), terms)
    ops.distill_head_backward(student, teacher, Kept(labels, easy, rows), grads, terms, Needs(True, True))


def cams(ops, case):
    x, alpha, floor = case.args()
    ops.cam_map_backward(x, alpha, ops.cam_map(x, alpha, floor), case.grad(), floor)
    ops.count_active(x, case.upper)


def views(ops, case):
    x, *start, size, sigma, low, high = case.args().values()
    edge = 0.3 if sigma else 0.0
    ops.view_images(x, *start, size, edge, low, high)
    ops.view_images_backward(case.grad(), *start, case.shape[2:], edge)


def crops(ops, case):
    x, *where, size = case.args().values()
    ops.resize_crops(x, *where, size)
    ops.resize_crops_backward(case.grad(), *where, case.shape[2:])


def qdrops(ops, case):
    x, x_hat, *rest = case.op_args()
    ops.qdrop(x, x_hat, *rest)
    ops.qdrop_backward(x, *rest, True, True)


def families():
    """(function, case) of all of them. Two samples do: sizes matter to a compiler by what divides them."""
    from dataclasses import replace

    from torch import bfloat16

    from zsq_ext.ops.cases import (
        adaround,
        bn_act,
        fake_quant,
        fake_quant_many,
        fake_quant_minmax,
        heads,
        image,
        lp_error,
        qdrop,
    )

    weight = adaround.AdaRoundCase("weight", shape=(64, 64, 3, 3))
    (activation, residual, *_), view = bn_act.BN_ACT_BENCH, image.VIEW_BENCH[0]
    tables = {
        fake_quants: fake_quant.FAKE_QUANT_BENCH[1:-1],
        manies: fake_quant_many.FAKE_QUANT_MANY_BENCH[1:],
        lp_errors: lp_error.LP_ERROR_BENCH[1:],
        minmaxes: fake_quant_minmax.FAKE_QUANT_MINMAX_BENCH[1:],
        adarounds: (weight, replace(weight, dtype=bfloat16)),
        bn_acts: (
            *bn_act.BN_ACT_BENCH[:4],
            replace(activation, name="silu", act="silu"),
            replace(residual, name="quantized", quant="channel"),
            *(replace(case, name=f"extremes_{case.name}", extremes=True) for case in bn_act.BN_ACT_BENCH[:4]),
        ),
        distills: (
            *(heads.DistillCase(kd, (256, 1024), kd=kd) for kd in ("kl_batchmean", "mse", "entropy")),
            *heads.DISTILL_BENCH[-1:],
        ),
        cams: heads.CAM_BENCH[2:],
        views: (*image.VIEW_BENCH, replace(view, name="sharp", sigma=None, clip=False)),
        crops: image.CROP_BENCH,
        qdrops: qdrop.QDROP_BENCH,
    }
    for function, table in tables.items():
        for case in table:
            yield function, replace(case, shape=(2, *case.shape[1:])) if len(getattr(case, "shape", ())) == 4 else case


def main(out):
    """Compiles every launch once for each architecture, and writes what came of it."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from zsq_ext.ops import triton as ops

    class Driver:
        """What Triton asks a driver before a launch. The device is the architecture: a cache of kernels has each."""

        def get_current_device(self):
            return self.arch

        def get_current_target(self):
            return GPUTarget("cuda", self.arch, 32)

        def get_current_stream(self, device):
            return 0

    driver, found = Driver(), {}

    def launch(kernel, grid):
        def compile_only(*args, **kwargs):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                made = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            if (driver.arch, made.hash) not in found:
                found[driver.arch, made.hash] = {
                    "kernel": f"{Path(kernel.fn.__code__.co_filename).stem}.{kernel.__name__}",
                    "case": case.name,
                    "float": getattr(case, "dtype", torch.float32) == torch.float32,
                    "arch": driver.arch,
                    "contracts": made.metadata.enable_fp_fusion,
                    "spilled": [int(n) for n in re.findall(r"(\d+) bytes spill", said.getvalue())],
                    "ptx": made.asm["ptx"],
                }

        return compile_only

    triton.runtime.driver.set_active(driver)
    JITFunction.__getitem__ = launch
    for driver.arch in ARCHS:
        for function, case in families():
            function(ops, case)
    out.write_text(json.dumps(list(found.values())))


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptx")
    out = folder / "launches.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DISABLE_LINE_INFO": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    done = subprocess.run([sys.executable, __file__, str(out)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def named(launches, *kernels):
    """The launches of these kernels, of which there must be some for each architecture."""
    chosen = [launch for launch in launches if launch["kernel"] in kernels]
    assert {(launch["kernel"], launch["arch"]) for launch in chosen} == {(k, arch) for k in kernels for arch in ARCHS}
    return chosen


def where(launch):
    return launch["kernel"], launch["case"], launch["arch"]


def test_every_kernel_compiles_for_every_architecture(launches):
    written = {
        f"{path.stem}.{name}"
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert written == {launch["kernel"] for launch in launches}
    named(launches, *written)
    for launch in launches:
        assert f".target sm_{launch['arch']}" in launch["ptx"], where(launch)


def test_nothing_divides_approximately(launches):
    for launch in launches:
        found = re.findall(r"\b(?:div\.full|div\.approx|rcp|sqrt\.approx|rsqrt)\S*", launch["ptx"])
        assert not found, (where(launch), found)


# An exponential's last places are another library's everywhere, and the ops that have one say so.
TRANSCENDENTAL = "heads_distill._distill_kernel", "heads_distill._distill_backward_kernel"


def test_nothing_is_contracted(launches):
    """Neither by Triton, which would write fma, nor by ptxas, which --fmad=false of the same option forbids."""
    for launch in launches:
        assert not launch["contracts"], where(launch)
        if launch["kernel"] != TRANSCENDENTAL[0]:  # its logarithm is libdevice's
            assert "fma." not in launch["ptx"], where(launch)


def test_only_what_has_an_exponential_has_one(launches):
    for launch in launches:
        allowed = launch["kernel"] in TRANSCENDENTAL or launch["case"] == "silu"
        assert allowed or not re.search(r"\b(ex2|lg2|sin|cos|tanh)\.", launch["ptx"]), where(launch)


DIVIDES = (
    "fake_quant._fake_quant_kernel",
    "fake_quant._lsq_kernel",
    "fake_quant_many._forward_kernel",
    "fake_quant_many._backward_kernel",
    "fake_quant_minmax._minmax_kernel",
    "lp_error._lp_error_kernel",
    "image._resize_kernel",
    "image._resize_backward_kernel",
)


def test_what_divides_divides_exactly(launches):
    for launch in named(launches, *DIVIDES):
        assert "div.rn.f32" in launch["ptx"], where(launch)


def test_nothing_is_added_by_atomics(launches):
    for launch in launches:
        assert not re.search(r"\b(atom|red)\.global", launch["ptx"]), where(launch)


def test_nothing_spills(launches):
    for launch in launches:
        assert launch["spilled"] == [0, 0], where(launch)  # stores and loads


# What a contiguous tensor of the benchmarks' sizes is read and written in. Not here: what gathers reads element by
# element, fake_quant_minmax and _many get their pointers from a table, and a row of 7 x 7 places begins anywhere.
WIDE = {
    "fake_quant._fake_quant_kernel": "ld st",
    "fake_quant._lsq_kernel": "ld st",
    "channel_range._range_kernel": "ld",
    "adaround._adaround_kernel": "ld st",
    "bn_act._forward_kernel": "ld",
    "bn_act._backward_kernel": "ld st",
    "heads_distill._distill_kernel": "ld",
    "heads_distill._distill_backward_kernel": "ld st",
    "heads_cam._cam_map_backward_kernel": "st",
    "image._view_kernel": "st",
    "image._resize_kernel": "st",
    "image._resize_backward_kernel": "st",
    "qdrop._qdrop_kernel": "ld st",
}


@pytest.mark.parametrize("kernel", WIDE)
def test_it_moves_16_bytes_at_a_time(kernel, launches):
    for launch in named(launches, kernel):
        if launch["float"] and "7x7" not in launch["case"]:
            for access in WIDE[kernel].split():
                assert re.search(rf"\b{access}\.global\S*\.v4\.b32", launch["ptx"]), (access, where(launch))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
