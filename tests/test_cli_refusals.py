"""How the command zsq fails: in one line that names the option, and Ctrl-C in one that says how to go on."""

import json
import sys

import cli_runs
import pytest
from cli_runs import fails, fails_in_its_last_line, zsq_
from safetensors.torch import save_file

from zsq_ext import api
from zsq_ext.cli import inputs
from zsq_ext.core.steps import Diverged
from zsq_ext.zoo import small_nets, teachers

cifar = cli_runs.cifar
net = cli_runs.net
small = cli_runs.small
weights = cli_runs.weights


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


def test_demo_without_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(teachers, "WEIGHTS", tmp_path / "nowhere")
    assert "train_teachers.py" in fails("demo")
    assert not (tmp_path / "runs").exists()
    assert "from 1 to 10000" in fails("demo", "--test-images", 10001)


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
