"""Everything that the front door refuses: one line that names the argument, before any work begins."""

import copy

import api_runs
import pytest
import torch
from api_runs import QUICK, X, Y, halves, quantize
from recipes import changed
from torch import nn

import zsq_ext as zsq
from zsq_ext.ops import backend
from zsq_ext.tune.ideas import FeatureAlign

model = api_runs.model
result = api_runs.result


def test_a_damaged_checkpoint_is_an_error(model, tmp_path):
    out = tmp_path / "run"
    quantize(model, out=out)
    path = out / "images-0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"images-0.safetensors must be a complete safetensors file, but: "):
        quantize(model, out=out, resume=True)
    path.write_bytes(whole.replace(b"digest", b"digesu"))
    with pytest.raises(ValueError, match=r"images-0.safetensors must belong to this run, got one of another"):
        quantize(model, out=out, resume=True)


class Picky(nn.Module):
    """Wants 8 x 8 images."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(192, 5)

    def forward(self, x):
        return self.fc(self.norm(x).flatten(1))


def poisoned(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.norms[1].running_var[3] = float("nan")
    return model


REFUSED = {
    "method": ({"method": "magic"}, ValueError, "method must be one of synq, hast, .*, got 'magic'"),
    "preset": ({"preset": "huge"}, ValueError, "preset must be one of smoke, cifar, imagenet, got 'huge'"),
    "profile": ({"preset": "smoke", "profile": "mct"}, ValueError, "profile must be one of repo, paper, got 'mct'"),
    "profile of another method": (
        {"method": "hast", "preset": "smoke", "profile": "paper"},
        ValueError,
        "profile must be one of repo, got 'paper'",
    ),
    "tune": ({"tune": "brecq2"}, ValueError, "tune must be one of qat, brecq, .*, none, got 'brecq2'"),
    "nothing to tune": (
        {"method": "minmax", "preset": "smoke", "tune": "qat"},
        ValueError,
        "tune must be left out or 'none' where the method tunes nothing, got 'qat'",
    ),
    "a_range": ({"a_range": "max"}, ValueError, "a_range must be one of ema, legacy_ema, minmax, lp, got 'max'"),
    "ideas by name": ({"ideas": "LowPass"}, TypeError, r"ideas must be a tuple of ideas such as .*, got 'LowPass'"),
    "config empty": ({"config": {}}, TypeError, "config must be a Recipe, got dict"),
    "config": ({"config": {"images": 3}}, TypeError, "config must be a Recipe, got dict"),
    "w_bits low": ({"w_bits": 1}, ValueError, "w_bits must be an integer from 2 to 8, got 1"),
    "w_bits high": ({"w_bits": 9}, ValueError, "w_bits must be an integer from 2 to 8, got 9"),
    "w_bits none": ({"w_bits": None}, ValueError, "w_bits must be an integer from 2 to 8, got None"),
    "a_bits float": ({"a_bits": 4.0}, ValueError, "a_bits must be an integer from 2 to 8, got 4.0"),
    "a_bits true": ({"a_bits": True}, ValueError, "a_bits must be an integer from 2 to 8, got True"),
    "edge_bits": ({"edge_bits": 16}, ValueError, "edge_bits must be an integer from 2 to 8, got 16"),
    "placement": ({"placement": "all"}, ValueError, "placement must be one of .*, got 'all'"),
    "sites": (
        {"sites": {"convs.0": 8}},
        ValueError,
        r"sites must name sites of the network, got 'convs.0'; close to it: convs.0.weight",
    ),
    "sites without a clue": (
        {"sites": {"?": 8}},
        ValueError,
        r"sites must name sites of the network, got '\?'; they are convs.0.weight, .*\(\d+ in all\)",
    ),
    "num_classes": ({"num_classes": 10}, ValueError, "num_classes must be the model's 5 outputs, got 10"),
    "no shape": ({"shape": None}, ValueError, r"input_shape must be three .* unless input_spec is given, got None"),
    "two axes": ({"shape": (8, 8)}, ValueError, r"input_shape must be three positive integers .*, got \(8, 8\)"),
    "zero": ({"shape": (3, 0, 8)}, ValueError, r"input_shape must be three positive integers .*, got \(3, 0, 8\)"),
    "a number": ({"shape": 8}, ValueError, r"input_shape must be three positive integers .*, got 8"),
    "both shapes": (
        {"input_spec": zsq.InputSpec((3, 8, 8))},
        ValueError,
        "input_shape must be left out where input_spec is given, got both",
    ),
    "input_spec": ({"shape": None, "input_spec": (3, 8, 8)}, TypeError, "input_spec must be an InputSpec, got tuple"),
    "channels": (
        {"shape": (4, 8, 8)},
        ValueError,
        r"the model rejects an input of shape \(2, 4, 8, 8\) in module 'convs.0' \(Conv2d\): ",
    ),
    "seed": ({"seed": "0"}, TypeError, "seed must be an integer, got '0'"),
    "labels alone": ({"labels": Y}, ValueError, "labels must come with images, got labels alone"),
    "images shape": (
        {"images": X[0]},
        ValueError,
        r"images must have shape \(N, 3, 8, 8\) .*, got \(3, 8, 8\)",
    ),
    "images size": ({"images": X[..., :4]}, ValueError, r"images must have shape .*, got \(8, 3, 8, 4\)"),
    "no images": ({"images": X[:0]}, ValueError, r"images must have shape .*, got \(0, 3, 8, 8\)"),
    "images dtype": ({"images": X.byte()}, TypeError, "images must be a float32 tensor .*, got torch.uint8"),
    "images array": ({"images": X.numpy()}, TypeError, "images must be a float32 tensor .*, got ndarray"),
    "images nan": ({"images": X * float("nan")}, ValueError, "images must be finite, got NaN or infinity"),
    "labels dtype": (
        {"images": X, "labels": Y.float()},
        TypeError,
        "labels must be an int64 .*, got torch.float32",
    ),
    "labels list": ({"images": X, "labels": [0] * 8}, TypeError, "labels must be an int64 tensor, got list"),
    "labels shape": ({"images": X, "labels": Y[:7]}, ValueError, r"labels must have shape \(8,\), got \(7,\)"),
    "labels range": ({"images": X, "labels": Y + 5}, ValueError, r"labels must be in \[0, 5\), got 5 to 5"),
    "labels negative": ({"images": X, "labels": Y - 1}, ValueError, r"labels must be in \[0, 5\), got -1 to -1"),
    "test no function": ({"test": [(X, Y)]}, TypeError, "test must be a function that gives batches, got list"),
    "test empty": ({"test": list}, ValueError, "test must give at least one batch at every call, got none"),
    "test no pairs": ({"test": lambda: [X]}, TypeError, "batches must give pairs of tensors .*, got Tensor"),
    "test shape": (
        {"test": lambda: [(X[..., :4], Y)]},
        ValueError,
        r"test must give images of shape \(3, 8, 8\), got \(3, 8, 4\)",
    ),
    "measure alone": ({"measure": halves}, ValueError, "measure must come with test, got measure alone"),
    "measure by name": ({"measure": "AP"}, TypeError, "measure must be a function of a network and batches, got str"),
    "resume": ({"resume": True}, ValueError, "resume must come with an out folder, got out=None"),
    "nothing to resume": (
        {"resume": True, "out": "runs/nowhere"},
        ValueError,
        "resume must find a run to go on with, got none: there is no runs/nowhere/config.json",
    ),
    "resume by name": ({"resume": "no"}, TypeError, "resume must be True or False, got 'no'"),
    "out": ({"out": 3}, TypeError, "out must be a path, got 3"),
    "device": ({"device": 1.5}, TypeError, "device must be a device, got 1.5"),
    "progress": ({"progress": True}, TypeError, "progress must be a Progress, got True"),
    "profile in a list": ({"profile": []}, TypeError, r"profile must be a name, got \[\]"),
    "sites in a list": ({"sites": ["a"]}, TypeError, "sites must be a mapping of sites to bits, got list"),
    "num_classes by name": ({"num_classes": "5"}, TypeError, "num_classes must be an integer, got '5'"),
    "method in a list": ({"method": ["synq"]}, ValueError, r"method must be one of synq, hast, .*, got \['synq'\]"),
}


@pytest.mark.parametrize("case", REFUSED, ids=list(REFUSED))
def test_bad_arguments_are_one_line(model, case):
    more, kind, message = REFUSED[case]
    with pytest.raises(kind, match=f"^quantize: {message}") as caught:
        quantize(model, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda nets: nets.vgg(norm=False), ValueError, "the model must have batch norms with running statistics"),
        (
            lambda nets: poisoned(nets.residual()),
            ValueError,
            "model must have finite weights, .* 'norms.1.run",
        ),
        (
            lambda nets: nets.residual().double(),
            TypeError,
            "model must have float32 weights, got torch.float64",
        ),
        (lambda nets: nets.residual, TypeError, "model must be a torch.nn.Module, got function"),
        (lambda nets: nn.ReLU(), ValueError, "model must have parameters to quantize, got none"),
        (lambda nets: nets.residual().norms, ValueError, "the model rejects an input .* in the model: "),
    ],
    ids=["no batch norm", "nan", "double", "no module", "no parameters", "no forward"],
)
def test_models_that_are_refused(nets, tmp_path, make, kind, message):
    with pytest.raises(kind, match=f"^quantize: {message}") as caught:
        quantize(make(nets), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # a refused run leaves no folder that a corrected one would trip over


def test_a_forced_backend_that_is_missing_is_refused_at_the_door(model, tmp_path, monkeypatch):
    monkeypatch.setattr(backend.module("cuda"), "missing", lambda: "no CUDA device is visible")
    backend.missing.cache_clear()
    try:
        with backend.backend("cuda"), pytest.raises(NotImplementedError) as caught:
            quantize(model, out=tmp_path / "run")
    finally:
        backend.missing.cache_clear()
    said = "quantize: backend must be one that runs here, got 'cuda': no CUDA device is visible"
    assert str(caught.value) == said
    assert not (tmp_path / "run").exists()


def test_the_other_calls_refuse_what_is_no_model(tmp_path):
    with pytest.raises(TypeError, match=r"^evaluate: model must be a torch.nn.Module, got int$"):
        zsq.evaluate(3, [])
    with pytest.raises(TypeError, match=r"^evaluate: batches must give pairs of tensors .*, got int$"):
        zsq.evaluate(nn.Linear(1, 1), 3)
    with pytest.raises(TypeError, match=r"^load: model must be a torch.nn.Module, got NoneType$"):
        zsq.load(tmp_path / "x.safetensors", None)


def test_shapes_the_model_rejects_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^quantize: the model rejects an input .*3, 9, 9\) in module 'fc'"):
        quantize(Picky().eval(), shape=(3, 9, 9), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_would_fail_late_is_refused_before_any_work(nets, tmp_path):
    odd = nets.residual((3, 10, 10))
    with pytest.raises(ValueError, match=r"^quantize: input_shape must have height and width divisible by 4 where"):
        quantize(odd, shape=(3, 10, 10), config=changed(QUICK, ranges="generator"), out=tmp_path / "run")
    flat = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with pytest.raises(ValueError, match=r"^quantize: the model must have a convolution with a map larger than 1 x 1"):
        quantize(flat, shape=(3, 2, 2), ideas=FeatureAlign(0), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"^synthesize: the model must have batch norms"):
        zsq.synthesize(nets.vgg(norm=False), "synq", input_shape=(3, 8, 8), config=QUICK)


def test_an_out_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"^quantize: out must be a folder that can be written, got"):
            quantize(model, out=out)


def test_saving_and_loading_refuse_what_does_not_fit(model, result, nets, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"^save: path must be in a folder that can be written, got .*nowhere"):
        result.save(tmp_path / "nowhere" / "m.safetensors")
    result.save(path)
    with pytest.raises(ValueError, match=r"^load: model must be the saved architecture; '.*' is .* there, .* here"):
        zsq.load(path, nets.residual(classes=4))
    with pytest.raises(ValueError, match=r"^load: model must be the saved architecture|^load: the model rejects"):
        zsq.load(path, nets.vgg())
    whole = path.read_bytes()
    for old, new, message in (
        (b"zsq_ext.quantized", b"zsq_ext.quantizer", "must be a quantized model of zsq_ext, got format"),
        (b'format_version\\": 1', b'format_version\\": 2', "must have format version 1, got 2"),
        (b'\\"w_bits\\": 4', b'\\"w_bits\\": 0', "must have a complete header, but: QConfig: w_bits must be"),
        (b'\\"qconfig\\"', b'\\"qconfih\\"', "must have a complete header, but: 'qconfig'"),
        (b'\\"num_classes\\"', b'\\"num_klasses\\"', "must have a complete header, but: .*num_klasses"),
    ):
        changed = whole.replace(old, new)
        assert changed != whole
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"^load: .*m.safetensors {message}"):
            zsq.load(path, model)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^load: .*m.safetensors must be a complete safetensors file"):
        zsq.load(path, model)


def test_evaluate_refuses_what_is_not_a_batch(result):
    images, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    for batches, kind, message in (
        ([images], TypeError, r"batches must give pairs of tensors \(images, labels\), got Tensor"),
        ([(images, labels, labels)], TypeError, "pairs of tensors .*, got .'Tensor', 'Tensor', 'Tensor'"),
        ([{"image": images}], TypeError, "pairs of tensors .*, got dict"),
        ([(images, [0] * 4)], TypeError, "pairs of tensors .*, got .'Tensor', 'list'"),
        ([(images, labels[:3])], ValueError, r"\(N, C, H, W\) and \(N,\), got \(4, 3, 8, 8\) and \(3,\)"),
        ([], ValueError, "must hold at least one image"),
    ):
        with pytest.raises(kind, match=f"^evaluate: .*{message}"):
            zsq.evaluate(result.model, batches)
    assert zsq.evaluate(nn.Flatten(), [(torch.eye(4).view(4, 4, 1, 1), torch.arange(4))]) == 100.0
