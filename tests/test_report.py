"""Room report: the page says everything, loads nothing, and its pictures are what they claim to be."""

import dataclasses
import math
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from recipes import changed
from torch import nn

import zsq_ext as zsq
from zsq_ext.core.progress import QUIET
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods import synq
from zsq_ext.quant.modules import activation_quantizers
from zsq_ext.quant.quality import Layer, Quality
from zsq_ext.report import Accuracy, html, pictures, svg, write, write_report
from zsq_ext.report.png import encode
from zsq_ext.synth.pixels import PixelConfig
from zsq_ext.tune.finetune import TuneConfig

SPEC = InputSpec((3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), valid_range=(0.0, 1.0), num_classes=5)


def tiny():
    torch.manual_seed(0)
    conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False)  # noqa: E731
    return nn.Sequential(
        *(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ).eval()


def settings():
    return changed(
        synq.config("smoke", "repo"),
        images=12,
        held_out=4,
        pixels=PixelConfig(batch=8, iterations=20),
        finetune=TuneConfig(epochs=2, steps_per_epoch=10, batch=6, lr=1e-4),
        range_steps=2,
    )


def batches():
    generator = torch.Generator().manual_seed(1)
    yield torch.randn(10, 3, 16, 16, generator=generator), torch.arange(10) % 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run and its folder."""
    folder = tmp_path_factory.mktemp("run")
    result = zsq.quantize(
        tiny(), "synq", w_bits=4, a_bits=4, input_spec=SPEC, config=settings(), test=batches, out=folder, progress=QUIET
    )
    return result, folder


def decode(data):
    """A PNG of filter 0 back to pixels (H, W, C)."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        chunks.append((kind, body))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, rest) == (8, [0, 0, 0])
    rows = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, {0: 1, 2: 3, 6: 4}[colour])


class Balance(HTMLParser):
    """Fails on a tag that is closed out of turn."""

    VOID = ("meta", "img", "path", "circle", "polyline", "i")

    def __init__(self):
        super().__init__()
        self.open, self.anchors, self.links = [], set(), set()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes[name] for name in ("id",) if name in attributes}
        self.links |= {attributes[name] for name in ("href",) if name in attributes}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (5, 7, 1), (4, 3, 3), (3, 4, 4)])
def test_png_round_trip(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(decode(encode(pixels)), pixels.reshape(*shape[:2], -1))


def test_png_refuses_what_it_cannot_write():
    with pytest.raises(TypeError, match="uint8"):
        encode(np.zeros((2, 2), np.float32))
    for shape in ((2, 2, 2), (0, 2), (2,)):
        with pytest.raises(ValueError, match="shape"):
            encode(np.zeros(shape, np.uint8))


def test_pixels_undo_the_normalisation_and_clip():
    pixels = torch.tensor([0.0, 0.5, 1.0, 1.7]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    spec = InputSpec((3, 2, 2), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), valid_range=(0.0, 1.0))
    seen = pictures.to_pixels(spec.normalise(pixels), spec)
    assert seen.shape == (1, 2, 2, 3)
    assert seen[0, ..., 0].flatten().tolist() == [0, 128, 255, 255]
    assert pictures.outside(spec.normalise(pixels), spec) == pytest.approx(25.0)


def test_pixels_without_a_known_range_are_stretched_per_image():
    images = torch.stack([torch.linspace(-3, 9, 16).view(1, 4, 4), torch.full((1, 4, 4), 2.0)])
    seen = pictures.to_pixels(images, InputSpec((1, 4, 4)))
    assert (seen[0].min(), seen[0].max()) == (0, 255)
    assert not seen[1].any()  # an image of one value, not NaN
    assert seen.shape == (2, 4, 4, 3)
    assert pictures.outside(images, InputSpec((1, 4, 4))) is None


def test_grid_places_images_and_leaves_gaps_transparent():
    pixels = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)])
    drawn = pictures.grid(pixels, columns=2)
    assert drawn.shape == (4 + pictures.GAP + 4, 4 + pictures.GAP + 4, 4)
    assert drawn[0, 0].tolist() == [10, 10, 10, 255]
    assert drawn[0, -1].tolist() == [20, 20, 20, 255]
    assert drawn[-1, 0].tolist() == [30, 30, 30, 255]
    assert drawn[-1, -1, 3] == 0
    assert drawn[4, 0, 3] == 0


def test_grid_shrinks_large_images_by_area():
    checks = (np.indices((300, 200)).sum(0) % 2 * 255).astype(np.uint8)
    drawn = pictures.grid(checks[None, :, :, None].repeat(3, -1), columns=1, largest=30)
    assert drawn.shape == (30, 20, 4)
    assert drawn[..., :3].min() >= 127  # every cell of 10 x 10 holds as many black as white pixels
    assert drawn[..., :3].max() <= 128


def test_one_of_each_class_first():
    labels = torch.tensor([2, 0, 0, 1, 2, 1])
    assert pictures.one_of_each(labels, 6) == [1, 3, 0, 2, 5, 4]
    assert pictures.one_of_each(labels, 2) == [1, 3]


def test_spectrum_of_white_noise_is_flat_and_of_a_wave_is_a_peak():
    noise = torch.randn(400, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    # smallest bin: radius 1 with 8 coefficients, 4 independent, x 400 images: 2.5 % standard error, five of them
    assert pictures.radial_spectrum(noise) == pytest.approx([1.0] * 16, rel=0.125)
    wave = torch.cos(2 * math.pi * 5 * torch.arange(32) / 32).expand(1, 1, 32, 32)
    power = pictures.radial_spectrum(wave)
    assert max(range(16), key=power.__getitem__) == 4  # radius 5
    assert sum(power) == pytest.approx(power[4], rel=1e-6)


def test_chart_draws_what_is_there():
    lines = [
        svg.Line("a", [1, 2, 3], [1.0, 10.0, 100.0]),
        svg.Line("zero", [1, 2, 3], [0.0, 0.0, 0.0], 1),
        svg.Line("b < c", [1, 2], [math.nan, 5.0], 2, dashed=True),
    ]
    drawn = svg.chart(lines, "step", "loss", log=True)
    assert drawn.count("<polyline") == 1
    assert drawn.count("<circle") == 1  # one point is left of the third line
    assert "zero (always 0)" in drawn
    assert "b &lt; c" in drawn
    assert "nan" not in drawn
    points = re.search(r'points="([^"]+)"', drawn)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)  # a decade is a decade


@pytest.mark.parametrize("values", [[], [math.inf], [0.0]])
def test_chart_without_values_says_so(values):
    drawn = svg.chart([svg.Line("a", range(len(values)), values)], "x", "y", log=True)
    assert "No values" in drawn


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[5.0, 5.0], [1e-30, 1e30], [1.0, 1.0 + 1e-13], [2.1, 2.2], [3.0], [1e-300, 2e-300], [123456.0, 123457.0]]
)
def test_chart_ticks_are_few_and_inside(values, log):
    drawn = svg.chart([svg.Line("a", range(len(values)), values)], "x", "y", log)
    at = [float(y) for y in re.findall(r'<path class="grid" d="M\d+ ([\d.]+)H', drawn)]
    assert 1 <= len(at) <= 12
    assert all(0 <= y <= 260 for y in at)


def test_epochs_have_whole_ticks():
    drawn = svg.chart([svg.Line("a", [1, 2, 3], [1.0, 2.0, 3.0])], "epoch", "top-1")
    ticks = re.findall(r'text-anchor="middle">([\d.]+)</text>', drawn)
    assert ticks == ["1", "2", "3"]


def test_report_holds_every_section(run):
    result, folder = run
    page = (folder / "report.html").read_text()
    for anchor in ("accuracy", "quality", "images", "spectra", "losses", "layers", "ranges", "configuration"):
        assert f'<section id="{anchor}"' in page, anchor
    assert '<section id="environment"' in page
    reader = Balance()
    reader.feed(page)
    assert reader.open == []
    assert {link[1:] for link in reader.links} <= reader.anchors
    for layer in result.quality.layers:
        assert html.text(layer.site) in page
    assert page.count('class="spark"') == len(activation_quantizers(result.model)) > 0
    for term in ("hil", "bns", "kd", "kd perturbed", "cam"):
        assert f"</svg>{term}<" in page, term
    for words in (torch.__version__, "LowPass", "steps per epoch", "synq", f"{result.quality.agreement:.2f}"):
        assert words in page, words


def test_report_tells_last_and_best_apart_beside_the_teacher(run):
    result, folder = run
    other = dataclasses.replace(
        result,
        evaluations=[{"epoch": 1, "top1": 61.25}, {"epoch": 2, "top1": 58.75}],
        measure_teacher=lambda: {"top1": 70.5},
    )
    page = write(other, folder / "other", measured_on="ten images").read_text()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page[page.index('id="accuracy"') : page.index("</section>")])
    assert cells[:5] == ["teacher", "float", "70.50", "", ""]
    assert cells[6:11] == ["synq", "W4A4", "58.75", "61.25", "-11.75"]
    assert "Measured on ten images." in page


def test_report_says_how_the_network_was_quantized(run):
    result, folder = run
    own = dataclasses.replace(
        result, qconfig=dataclasses.replace(result.qconfig, edge_bits=8, sites={"0.weight": 5}), tuning="so and so"
    )
    page = write(own, folder / "how").read_text()
    assert "<h1>synq W4A4, so and so</h1>" in page
    how = "synq W4A4: so and so, placement after_relu, first and last layer 8 bits, 1 sites with bits of their own; "
    assert f'<p class="note">{how}zsq_ext, ' in page
    assert result.tuning == "fine-tuning"


def test_a_detectors_figures_have_a_table_each_and_no_epochs(run):
    result, folder = run
    other = dataclasses.replace(
        result,
        evaluations=[{"epoch": 0, "AP50": 61.0, "AP": 40.0}],
        measure_teacher=lambda: {"AP50": 62.5, "AP": 42.0},
    )
    page = write(other, folder / "detector").read_text()
    start = page.index('id="accuracy"')
    part = page[start : page.index("</section>", start)]
    assert re.findall(r"<th[^>]*>(.*?)</th>", part)[2::5] == ["AP@0.5 (%)", "AP@[.5:.95] (%)"]
    assert re.findall(r"<td[^>]*>([-+][\d.]+)</td>", part) == ["-1.50", "-2.00"]
    assert "epoch" not in part
    assert "<b>40.00 %</b><span>synq W4A4, AP@[.5:.95]</span>" in page
    assert other.best_accuracy == {}


def test_a_network_that_no_image_was_made_for_shows_none(run):
    result, folder = run
    quality = dataclasses.replace(result.quality, rewritten=True)
    other = dataclasses.replace(result, images=result.images[:0], labels=result.labels[:0], quality=quality)
    page = write(other, folder / "none").read_text()
    assert "ynthetic images<" not in page
    assert "<img" not in page
    assert "both compare with the float network as rewritten" in page
    assert "as rewritten" not in write(result, folder / "own").read_text()


def test_report_loads_nothing(run):
    page = (run[1] / "report.html").read_text()
    assert not re.findall(r"https?:|//\w+\.|<script|<link|@import|url\(", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)', page))


def test_report_without_test_data_activations_or_tuning(tmp_path):
    result = zsq.quantize(
        tiny(), "minmax", w_bits=4, a_bits=None, input_shape=(3, 16, 16), images=torch.randn(16, 3, 16, 16), tune="none"
    )
    page = write(result, tmp_path).read_text()
    assert 'id="accuracy"' not in page
    assert "Activations are not quantized" in page
    assert "Nothing was optimised" in page
    assert "after the low-pass filter" not in page


def test_report_of_several_runs_shows_shared_images_once(run, tmp_path):
    result, _ = run
    rows = [Accuracy("teacher", "float", 90.0), Accuracy("a <b>", "W4A4", 80.0, seconds=75)]
    two = {"one": result, "two": result}
    page = write_report(tmp_path, title="A & B", results=two, accuracy=rows).read_text()
    assert page.count("<img") == 1
    assert "Synthetic images: one, two" in page
    assert page.count("Sensitivity of the layers:") == 4  # two headings, two links to them
    assert "<h1>A &amp; B</h1>" in page
    assert "a &lt;b&gt;" in page
    assert "best epoch" not in page  # there was one epoch to measure
    assert "1 min 15 s" in page


def test_report_survives_what_is_not_finite(run, tmp_path):
    layers = (Layer("a", "weight", 8, math.inf, 0.0), Layer("b", "weight", 2, math.nan, math.nan))
    result = dataclasses.replace(run[0], quality=Quality(4, 50.0, math.inf, layers))
    page = write(result, tmp_path).read_text()
    assert "∞" in page
    assert "undefined" in page


def test_report_of_a_network_without_classes(run, tmp_path):
    layers = (Layer("a", "weight", 8, 30.0, math.nan, 40.0), Layer("b", "weight", 2, 10.0, math.nan, 20.0))
    outputs = {"classes.0": 31.27, "boxes.0": 18.44}
    result = dataclasses.replace(run[0], quality=Quality(4, math.nan, math.nan, layers, outputs_db=outputs))
    page = write(result, tmp_path).read_text()
    assert "<b>18.4 dB</b><span>worst output, " in page
    assert "classes.0 31.3, boxes.0 18.4" in page
    assert "output alone (dB)" in page
    assert "divergence alone" not in page


def test_report_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report(tmp_path, title="x", results={})


def test_untuned_network_is_measured_too():
    result = zsq.quantize(
        tiny(), "minmax", w_bits=8, a_bits=8, input_spec=SPEC, config=changed(
            settings(), finetune=TuneConfig(epochs=0)
        ), test=batches, progress=QUIET,
    )  # fmt: skip
    assert [row["epoch"] for row in result.evaluations] == [0]
    assert result.teacher_top1 == zsq.evaluate(tiny(), batches())
    assert result.top1_best is None  # there was no epoch


def test_a_generators_curves_are_drawn_over_training(run, tmp_path):
    result, _ = run
    rows = [{"step": n, "drift": 0.1 / n, "spread": 0.5, "gradient_norm": 1.0 / n} for n in (10, 20, 30)]
    watched = dataclasses.replace(result, histories={**result.histories, "temporal": rows})
    page = write(watched, tmp_path).read_text()
    assert page.count('<section id="temporal"') == 1
    assert page.count("feature drift by step") == 1
    reader = Balance()
    reader.feed(page)
    assert reader.open == []
    assert {link[1:] for link in reader.links} <= reader.anchors
    assert '<section id="temporal"' not in write(result, tmp_path).read_text()
