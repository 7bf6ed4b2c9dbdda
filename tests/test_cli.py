"""The command zsq: what it prints, what it writes, and how it fails."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipes import changed
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import zsq_ext as zsq
from zsq_ext import api, methods
from zsq_ext.bench import demo as engine
from zsq_ext.bench import tasks
from zsq_ext.cli import app, inputs
from zsq_ext.core.progress import QUIET
from zsq_ext.core.steps import Diverged
from zsq_ext.methods import synq
from zsq_ext.synth.pixels import PixelConfig
from zsq_ext.tune.finetune import TuneConfig
from zsq_ext.tune.ideas import CamAlign, LowPass, SoftLabels
from zsq_ext.zoo import small_nets, teachers
from zsq_ext.zoo.datasets import cifar10_spec, imagenet_spec
from zsq_ext.zoo.textured_shapes import SPEC

RUNNER = CliRunner()

NET = """
import torch
from torch import nn

def tiny():
    torch.manual_seed(0)
    conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False)
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )

number = 7
def wrong(): return number
"""


def zsq_(*arguments):
    """Runs the command in this process."""
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def fails(*arguments):
    """The one line that a command leaves when it refuses something."""
    done = zsq_(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def fails_in_its_last_line(*arguments):
    """As `fails`, for an error that comes after progress was reported."""
    done = zsq_(*arguments)
    assert done.exit_code == 2, done.output
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def net(tmp_path):
    """A user's own network, as path.py:function."""
    path = tmp_path / "net.py"
    path.write_text(NET)
    return f"{path}:tiny"


@pytest.fixture
def cifar(tmp_path):
    """Twenty images in CIFAR-10's binary format."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (20, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(20) % 10
    (folder / "test_batch.bin").write_bytes(rows.tobytes())
    return f"cifar10:{folder}"


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Embedded teachers with weights of no value."""
    monkeypatch.setattr(teachers, "WEIGHTS", tmp_path)
    torch.manual_seed(0)
    tensors = small_nets.resnet20(40).state_dict()
    save_file(tensors, tmp_path / "resnet20.safetensors", metadata={"task": "none", "top1_test": "2.50"})
    return tmp_path


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Runs of a second, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    config = changed(
        synq.config("smoke", "repo"),
        images=12,
        held_out=4,
        pixels=PixelConfig(batch=16, iterations=2),
        finetune=TuneConfig(epochs=2, steps_per_epoch=2, batch=4, lr=1e-4),
        range_steps=2,
        range_batch=8,
    )
    monkeypatch.setitem(synq.IMAGES, "smoke", config.images)
    monkeypatch.setitem(synq.TUNING, "smoke", config.tune)


def test_teachers_are_read_from_their_files(weights):
    network = teachers.teacher("resnet20")
    assert not network.training
    expected = load_file(weights / "resnet20.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    assert teachers.facts("resnet20")["top1_test"] == "2.50"


def test_teachers_that_are_not_there(weights):
    with pytest.raises(FileNotFoundError, match=r"mobilenet_small.*train_teachers\.py"):
        teachers.teacher("mobilenet_small")
    with pytest.raises(ValueError, match="must be one of resnet20, mobilenet_small"):
        teachers.facts("alexnet")
    (weights / "mobilenet_small.safetensors").write_bytes(b"not a file of that kind")
    for ask in (teachers.teacher, teachers.facts):
        with pytest.raises(ValueError, match=r"mobilenet_small\.safetensors"):
            ask("mobilenet_small")


def test_quantize_with_test_data(net, cifar, tmp_path):
    out = tmp_path / "run"
    arguments = ("quantize", "--model", net, "--data", cifar, "--w-bits", 3, "--a-bits", 5, "--out", out)
    done = zsq_(*arguments, "--json", tmp_path / "facts" / "run.json", "--quiet", "--idea", "LowPass(d0=8)")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    facts = json.loads((tmp_path / "facts" / "run.json").read_text())
    assert facts["bits"] == "W3A5"
    assert facts["top1"]["test_images"] == 20
    assert set(facts["top1"]) == {"data", "test_images", "teacher", "last", "best"}
    assert facts["preset"] == "smoke"
    assert "top-1, last epoch" in done.stdout
    assert f"{facts['top1']['teacher']:.2f}" in done.stdout
    assert "\x1b" not in done.stdout
    page = (out / "report.html").read_text()
    assert "20 test images of cifar10" in page
    assert (
        json.loads((out / "config.json").read_text())["config"]["hyperparameters"]["tune"]["distill"]["ideas"][0]["d0"]
        == 8
    )

    # what was written can be measured again, and gives the same accuracy
    again = zsq_("evaluate", "--model", net, "--quantized", out / "model.safetensors", "--data", cifar, "--json", "-")
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)["top1"]
    assert found == {"float": facts["top1"]["teacher"], "quantized": facts["top1"]["last"]}

    wrong = fails("evaluate", "--model", net, "--quantized", out / "images.safetensors", "--data", cifar)
    assert "--quantized must be a file that quantize wrote for this --model" in wrong

    # the same run again is refused, and continued where that is asked for
    assert "resume" in fails(*arguments, "--quiet", "--idea", "LowPass(d0=8)")
    assert zsq_(*arguments, "--quiet", "--idea", "LowPass(d0=8)", "--resume").exit_code == 0


def test_quantize_without_test_data_reports_quality_alone(net):
    done = zsq_("quantize", "--model", net, "--input-shape", "3,16,16", "--a-bits", "none", "--json", "-", "--quiet")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert "top1" not in facts
    assert facts["bits"] == "W4"
    assert facts["out"].endswith("net-synq-W4-smoke-seed0")
    assert 0 <= facts["quality"]["agreement"] <= 100


def test_quantize_reports_progress_in_lines_without_a_terminal(net):
    done = zsq_("quantize", "--model", net, "--input-shape", "3,16,16", "--method", "noise")
    assert done.exit_code == 0, done.output
    assert "tuning: 4/4 in" in done.stderr
    assert "agreement" in done.stdout
    assert "top-1" not in done.stdout


def test_synthesize(net, tmp_path):
    done = zsq_("synthesize", "--model", net, "--input-shape", "3,16,16", "--out", tmp_path / "s", "--png", "--quiet")
    assert done.exit_code == 0, done.output
    assert load_file(tmp_path / "s" / "images.safetensors")["images"].shape == (12, 3, 16, 16)
    assert (tmp_path / "s" / "images.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "s" / "png").glob("*.png"))) == 12
    assert "12 images" in done.stdout

    # images made once serve any number of bits, and change nothing about the result
    made = ("--images", tmp_path / "s" / "images.safetensors")
    arguments = ("quantize", "--model", net, "--input-shape", "3,16,16", "--quiet", "--json", "-")
    apart, together = (zsq_(*arguments, *more) for more in ((*made, "--out", tmp_path / "apart"), ()))
    assert apart.exit_code == 0, apart.output
    assert json.loads(apart.stdout)["quality"] == json.loads(together.stdout)["quality"]
    save_file({"images": torch.zeros(2, 3, 16, 16)}, tmp_path / "bad.safetensors", {"info": "{}"})
    assert "--images must hold the tensors" in fails(*arguments, "--images", tmp_path / "bad.safetensors")
    assert "--images must be a file that synthesize wrote" in fails(
        *arguments, "--images", tmp_path / "none.safetensors"
    )


@pytest.fixture
def short_dgh(monkeypatch):
    """DGH with six images in two visits."""
    own = methods.METHODS["dgh"]
    recipe = own.config("smoke", "repo")
    stored = replace(recipe.images.stored, batch=8, iterations=2)
    recipe = replace(recipe, images=replace(recipe.images, images=6, held_out=2, stored=stored))
    monkeypatch.setitem(methods.METHODS, "dgh", replace(own, config=lambda preset, profile: recipe))


def test_the_embedded_detector(short_dgh, tmp_path):
    pytest.importorskip("pycocotools")
    detector, scenes = ("--model", "fpn_small"), ("--data", "shape_scenes", "--test-images", 8)
    made = zsq_("synthesize", *detector, "--method", "dgh", "--out", tmp_path / "s", "--quiet")
    assert made.exit_code == 0, made.output
    bits = ("--method", "dgh", "--tune", "none", "--w-bits", 8, "--a-bits", 8)
    images, out = tmp_path / "s" / "images.safetensors", tmp_path / "q"
    arguments = ("quantize", *detector, *bits, *scenes, "--images", images, "--out", out, "--quiet")
    done = zsq_(*arguments, "--json", tmp_path / "facts.json")
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["AP50"].keys() == {"data", "test_images", "teacher", "last", "best"}
    assert (facts["AP"]["data"], facts["AP"]["test_images"], facts["AP"]["best"]) == ("shape_scenes", 8, None)
    assert f"AP@0.5, quantized (%)       {facts['AP50']['last']:.2f}" in done.stdout
    assert "ranges alone, placement all_layers" in done.stdout
    assert "epoch" not in done.stdout
    page = (out / "report.html").read_text()
    assert "AP@[.5:.95] (%)" in page
    assert "last epoch" not in page

    again = zsq_("evaluate", *detector, *scenes, "--quantized", out / "model.safetensors", "--json", "-")
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    for figure in ("AP50", "AP"):
        assert found[figure] == {"float": facts[figure]["teacher"], "quantized": facts[figure]["last"]}

    # to look at a finished run again is no part of it
    assert zsq_(*arguments, "--resume", "--json", tmp_path / "more.json").exit_code == 0
    assert json.loads((tmp_path / "more.json").read_text()) == facts


def test_a_detector_without_what_counts_its_boxes(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    for command in (("evaluate",), ("quantize", "--out", tmp_path / "q")):
        said = fails(*command, "--model", "fpn_small", "--data", "shape_scenes")
        assert 'pycocotools must be installed: pip install "zsq_ext[detection]"' in said
    assert not (tmp_path / "q").exists()


def test_a_network_on_data_that_it_cannot_be_measured_on(weights, tmp_path):
    pytest.importorskip("pycocotools")
    ours = tmp_path / "resnet20.safetensors"
    save_file(small_nets.resnet20(8).state_dict(), ours)
    said = fails_in_its_last_line(
        "evaluate", "--model", "resnet20", "--weights", ours, "--data", "shape_scenes", "--test-images", 4
    )
    assert said == "zsq: precision_of: network must return a dict of 'classes' and 'boxes', got Tensor"


def test_a_method_without_images_synthesizes_none(net, tmp_path):
    said = fails("synthesize", "--model", net, "--input-shape", "3,8,8", "--method", "dfq", "--out", tmp_path / "run")
    assert said == "zsq: synthesize: method must be one that makes images, got 'dfq', which needs none"
    assert not (tmp_path / "run").exists()


def test_evaluate_a_float_network_alone(net, cifar):
    done = zsq_("evaluate", "--model", net, "--data", cifar, "--test-images", 10, "--json", "-")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert list(facts["top1"]) == ["float"]
    assert facts["test_images"] == 10
    assert "net, float" in zsq_("evaluate", "--model", net, "--data", cifar).stdout


def test_demo(weights, monkeypatch, tmp_path):
    torch.manual_seed(0)
    tiny = small_nets.CifarResNet(8, 40).eval()
    monkeypatch.setattr(engine, "teacher", lambda name: tiny)
    done = zsq_("demo", "--test-images", 40, "--out", tmp_path / "d", "--json", tmp_path / "demo.json", "--quiet")
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "demo.json").read_text())
    assert [(row["method"], row["bits"]) for row in facts["rows"]] == [
        ("teacher", "float"),
        *((method, bits) for bits in ("W4A4", "W3A3") for method in ("min-max", "noise", "SynQ")),
    ]
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["W4A4", "W3A3", "seconds"]
    assert [line.split()[0] for line in lines[1:5]] == ["teacher", "min-max", "noise", "SynQ"]
    assert "40 test images, seed 0" in done.stdout
    assert "making images" in done.stdout
    page = (tmp_path / "d" / "report.html").read_text()
    assert "Sensitivity of the layers: SynQ W3A3" in page
    # the saved network is the one that was measured
    again = zsq.load(tmp_path / "d" / "resnet20-synq-w4a4.safetensors", tiny)
    top1 = zsq.evaluate(again, tasks.TestSet(40)())
    assert top1 == next(row["last"] for row in facts["rows"] if (row["method"], row["bits"]) == ("SynQ", "W4A4"))


def test_demo_shows_a_control_that_diverges(weights, monkeypatch, tmp_path):
    tiny = small_nets.CifarResNet(8, 40).eval()
    monkeypatch.setattr(engine, "teacher", lambda name: tiny)
    monkeypatch.setattr(engine, "BITS", ((4, 4),))
    quantize = api.quantize

    def diverging(model, method, **options):
        if method == failing:
            raise Diverged("tuning: loss term 'ce' is not finite at step 6.")
        return quantize(model, method, **options)

    monkeypatch.setattr(api, "quantize", diverging)
    failing = "noise"
    done = zsq_("demo", "--test-images", 20, "--out", tmp_path / "d")
    assert done.exit_code == 0, done.output
    assert [line.split()[1:2] for line in done.stdout.splitlines() if line.startswith("noise")] == [["diverged"]]
    assert "not finite at step 6" in done.stderr
    assert ">diverged<" in (tmp_path / "d" / "report.html").read_text()
    failing = "synq"
    assert "not finite at step 6" in fails_in_its_last_line("demo", "--test-images", 20, "--out", tmp_path / "d")


def test_demo_without_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(teachers, "WEIGHTS", tmp_path / "nowhere")
    assert "train_teachers.py" in fails("demo")
    assert not (tmp_path / "runs").exists()
    assert "from 1 to 10000" in fails("demo", "--test-images", 10001)


def test_ops_and_env(tmp_path):
    assert "fake_quant" in zsq_("ops").stdout
    assert json.loads(zsq_("ops", "--json", "-").stdout)["ops"]["fake_quant"]["reference"] is True
    done = zsq_("env", "--json", tmp_path / "env.json")
    assert json.loads(done.stdout)["torch"] == torch.__version__
    assert json.loads((tmp_path / "env.json").read_text())["torch"] == torch.__version__


def test_bench_writes_what_it_prints(monkeypatch):
    from zsq_ext import bench

    row = dict.fromkeys(("op", "case", "dtype", "device", "backend", "pass"), "x")
    row |= {"ms": 1.0, "ms_p10": 0.5, "ms_p90": 2.0, "pct_of_floor": None, "peers": {"eager": 3.0}}
    monkeypatch.setattr(bench, "run", lambda suite, progress, **options: {"suite": suite, "rows": [row], **options})
    assert "eager 3.00x" in zsq_("bench").stdout
    assert json.loads(zsq_("bench", "--suite", "steps", "--json", "-").stdout)["suite"] == "steps"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f():\n    return {}['weights']\n", "got KeyError in line 2 of {path}: 'weights'"),
        ("import torch\n\ndef g():\n    torch.zeros(2) @ torch.zeros(3)\n\ndef f():\n    g()\n", "in line 4 of {path}"),
        ("x = 1 / 0\n", "got ZeroDivisionError in line 1 of {path}: division by zero"),
        ("def f(:\n", "got SyntaxError in line 1 of {path}"),
        ("def f(x):\n    pass\n", "got TypeError in {path}: f() missing 1 required"),
    ],
)
def test_an_error_in_the_users_file_names_its_line(tmp_path, code, said):
    path = tmp_path / "broken.py"
    path.write_text(code)
    arguments = ("quantize", "--model", f"{path}:f", "--input-shape", "3,8,8", "--out", tmp_path / "run")
    line = fails(*arguments)
    assert line.startswith("zsq: --model must name a function that runs, got ")
    assert said.format(path=path) in line
    done = zsq_("--debug", *arguments)
    assert isinstance(done.exception, ValueError)
    assert done.exception.__cause__ is not None


def test_nothing_to_resume(tmp_path, net):
    arguments = ("--model", net, "--input-shape", "3,8,8")
    line = fails("quantize", *arguments, "--out", tmp_path / "run", "--resume")
    assert "resume must find a run to go on with, got none: there is no" in line
    assert not (tmp_path / "run").exists()


def test_bench_refuses_before_it_measures(monkeypatch, tmp_path):
    from zsq_ext import bench

    monkeypatch.setattr(bench, "run", lambda *args, **options: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "x"
    assert f"--json must be a file that can be written, got {below}.json" in fails("bench", "--json", f"{below}.json")
    assert f"--plot must be a file that can be written, got {below}.svg" in fails("bench", "--plot", f"{below}.svg")
    assert "--json must be a file that can be written" in fails("bench", "--json", tmp_path)
    lacking = tmp_path / "old.json"
    names = dict.fromkeys(("op", "case", "dtype", "device", "backend", "pass"), "x")
    lacking.write_text(json.dumps({"suite": "families", "environment": {}, "rows": [{**names, "ms": 1.0}]}))
    said = "compare: old must have a time as ms_p10 in every row, got None in row 0"
    assert said in fails("bench", "--compare", lacking)


def test_a_pipe_gets_whole_lines(capsys):
    from zsq_ext.cli.common import table

    table(["one", "two"], [["x" * 150, "y" * 150], ["z", ""]])
    assert capsys.readouterr().out.splitlines()[1] == "x" * 150 + "  " + "y" * 150


def test_bench_of_an_unknown_suite():
    assert "suite must be one of families" in fails("bench", "--suite", "nothing")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet18"], "--weights must name a checkpoint for resnet18"),
        (
            ["--model", "resnet20", "--data", "cifar"],
            "--data must be one of textured_shapes, shape_scenes,",
        ),
        (["--model", "alexnet"], "--model must be path.py:function or one of resnet20"),
        (["--model", "resnet18(depth=3)", "--weights", "x.pth"], "--model must fit what resnet18 takes"),
        (["--model", "resnet18(1 + 1)", "--weights", "x.pth"], "--model must be a name, with literal arguments"),
        (["--model", "resnet18", "--weights", "x.pth"], "--weights must be an existing file"),
        (["--model", "nowhere.py:f", "--input-shape", "3,8,8"], "--model must name an existing file"),
        (["--model", "NET:none", "--input-shape", "3,8,8"], "must name a function of"),
        (["--model", "NET:number", "--input-shape", "3,8,8"], "must name a function of"),
        (["--model", "NET:wrong", "--input-shape", "3,8,8"], "returns a torch.nn.Module, got int"),
        (["--model", "NET:tiny"], "--input-shape must be given"),
        (["--model", "NET:tiny", "--input-shape", "3,x,8"], "--input-shape must be numbers"),
        (["--model", "NET:tiny", "--input-shape", "3,8"], "shape must be three positive integers"),
        (["--model", "NET:tiny", "--input-shape", "3,8,8", "--mean", "1,2"], "one value per channel"),
        (["--model", "NET:tiny", "--input-shape", "3,8,8", "--num-classes", 7], "num_classes must be the model's 10"),
        (["--model", "NET:tiny", "--input-shape", "3,8,8", "--a-bits", "x"], "--a-bits must be an integer"),
        (["--model", "NET:tiny", "--input-shape", "3,8,8", "--w-bits", 9], "w_bits must be an integer from 2 to 8"),
        (["--model", "NET:tiny", "--input-shape", "3,8,8", "--method", "x"], "method must be one of synq"),
        (["--model", "NET:tiny", "--input-shape", "3,8,8", "--preset", "x"], "preset must be one of smoke"),
        (["--model", "NET:tiny", "--input-shape", "3,8,8", "--device", "toaster"], "device must be one that torch"),
        (["--model", "NET:tiny", "--data", "textured_shapes", "--test-images", 0], "--test-images must be at least 1"),
        (["--model", "NET:tiny", "--data", "cifar10:nowhere"], "root must be or hold"),
        (["--model", "NET:tiny", "--data", "CIFAR", "--mean", "1,1,1"], "must be left out with --data"),
    ],
)
def test_quantize_says_what_is_wrong(net, cifar, arguments, words):
    arguments = [str(word).replace("NET:", net.removesuffix("tiny")).replace("CIFAR", cifar) for word in arguments]
    assert words in fails("quantize", *arguments)


def test_embedded_teacher_keeps_its_input(weights):
    assert inputs.network("resnet20", weights=None).spec == SPEC
    assert inputs.network("resnet20", weights=None, input_shape="3,32,32", num_classes=40).spec == SPEC
    for option, value in (("input_shape", "3,16,16"), ("num_classes", 10), ("mean", "0,0,0")):
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} must be"):
            inputs.network("resnet20", weights=None, **{option: value})


def test_networks_of_the_zoo_with_weights(tmp_path, cifar):
    save_file(small_nets.resnet20(10).state_dict(), tmp_path / "r20.safetensors")
    data = inputs.data_set(cifar, QUIET)
    network = inputs.network("resnet20", weights=tmp_path / "r20.safetensors", data=data)
    assert network.spec == cifar10_spec
    assert network.trained
    assert not network.model.training
    architecture = inputs.network("resnet20", weights=None, data=data, needs_weights=False)
    assert not architecture.trained
    with pytest.raises(ValueError, match="weights ship only for resnet20 and mobilenet_small on"):
        inputs.network("resnet20", weights=None, data=data)
    large = inputs.network("mobilenet_v2(expand_first=True)", weights=None, num_classes=7, needs_weights=False)
    assert large.spec == dataclasses.replace(imagenet_spec, num_classes=7)
    assert large.model.classifier[1].out_features == 7
    assert len(large.model.features[1].conv) == 4


def test_normalisation_from_options(net):
    spec = inputs.network(net, weights=None, input_shape="3,8,8", mean="0.1,0.2,0.3", std="1,2,4").spec
    assert (spec.mean, spec.std, spec.valid_range) == ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0), (0.0, 1.0))


@pytest.mark.parametrize(
    ("text", "idea"),
    [
        ("LowPass", LowPass()),
        ("LowPass(8)", LowPass(8)),
        (" LowPass(d0=8, when='once') ", LowPass(8, "once")),
        ("CamAlign(weight=0.5, clamp=False)", CamAlign(0.5, clamp=False)),
        ("SoftLabels(tau=-0.0)", SoftLabels(-0.0)),
    ],
)
def test_ideas(text, idea):
    assert inputs.idea(text) == idea


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "LowPass(",
        "LowPass(d0=open('x'))",
        "LowPass(*[1])",
        "LowPass(**{'d0': 8})",
        "LowPass(d0=8) or exit()",
        "__import__('os').system('true')",
        "ideas.LowPass(8)",
        "[LowPass(8)]",
        "LowPass(d0=" + "(" * 5000 + "8" + ")" * 5000 + ")",
        "LowPass(d0=8\0)",
        "Unknown(1)",
        "LowPass(cut=8)",
        "LowPass(1, 2, 3)",
        "LowPass(d0='x')",
        "LowPass(d0=-1)",
        "LowPass(when='never')",
    ],
)
def test_bad_ideas(text, net):
    with pytest.raises(ValueError, match=r"--idea|LowPass: "):
        inputs.idea(text)
    assert len(fails("quantize", "--model", net, "--input-shape", "3,8,8", "--idea", text)) < 400


def test_stopping_says_how_to_go_on(net, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "quantize", interrupted)
    done = zsq_("quantize", "--model", net, "--input-shape", "3,8,8", "--out", tmp_path / "run")
    assert done.exit_code == 130
    assert done.stderr == "zsq: stopped before the run began; nothing was kept\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    done = zsq_("quantize", "--model", net, "--input-shape", "3,8,8", "--out", tmp_path / "run")
    assert f"--resume goes on from where {tmp_path / 'run'} stands" in done.stderr
    assert str(tmp_path / "run") in done.stderr


@pytest.mark.parametrize("error", [Diverged("loss 'kd'\nis not finite"), NotImplementedError("a"), TypeError("b")])
def test_errors_of_the_library_are_one_line(net, monkeypatch, error):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(api, "quantize", failing)
    arguments = ("quantize", "--model", net, "--input-shape", "3,8,8")
    assert fails(*arguments) == "zsq: " + " ".join(str(error).split())
    assert zsq_("--debug", *arguments).exception is error


def test_defects_keep_their_traceback(net, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(api, "quantize", broken)
    done = zsq_("quantize", "--model", net, "--input-shape", "3,8,8")
    assert isinstance(done.exception, RuntimeError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize"], "Missing option '--model'"),
        (["nothing"], "No such command 'nothing'"),
        (["--nothing"], "No such option: --nothing"),
        (["quantize", "--model", "x", "--nothing"], "No such option: --nothing"),
        (["quantize", "--model", "x", "--seed", "one"], "Invalid value for '--seed'"),
        (["quantize", "--model", "x", "--w-bits", "four"], "--w-bits must be an integer from 2 to 8, got 'four'"),
    ],
)
def test_usage_errors_are_one_line(arguments, words):
    assert words in fails(*arguments)
    assert zsq_().exit_code == 2
    assert "Usage: " in zsq_().output


def test_help_names_every_command():
    done = zsq_("--help")
    assert all(name in done.stdout for name in ("demo", "quantize", "synthesize", "evaluate", "bench", "ops", "env"))


def test_as_a_process(tmp_path):
    command = [sys.executable, "-m", "zsq_ext.cli"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"zsq_ext {zsq.__version__}\n")
    wrong = [*command, "quantize", "--model", "resnet18"]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("zsq: --weights must name a checkpoint")
    code = "import sys, zsq_ext.cli; assert 'torch' not in sys.modules"  # so that --help is quick
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)
