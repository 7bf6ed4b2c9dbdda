"""The command zsq: what it prints and what it writes."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace

import cli_runs
import pytest
import torch
from cli_runs import fails, fails_in_its_last_line, zsq_
from safetensors.torch import load_file, save_file

import zsq_ext as zsq
from zsq_ext import api, methods
from zsq_ext.bench import demo as engine
from zsq_ext.bench import tasks
from zsq_ext.cli import inputs
from zsq_ext.core.progress import QUIET
from zsq_ext.core.steps import Diverged
from zsq_ext.tune.ideas import CamAlign, LowPass, SoftLabels
from zsq_ext.zoo import small_nets, teachers
from zsq_ext.zoo.datasets import cifar10_spec, imagenet_spec
from zsq_ext.zoo.textured_shapes import SPEC

cifar = cli_runs.cifar
net = cli_runs.net
small = cli_runs.small
weights = cli_runs.weights


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


def test_a_pipe_gets_whole_lines(capsys):
    from zsq_ext.cli.common import table

    table(["one", "two"], [["x" * 150, "y" * 150], ["z", ""]])
    assert capsys.readouterr().out.splitlines()[1] == "x" * 150 + "  " + "y" * 150


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
