"""Loading checkpoints: every format and naming, and what must be refused."""

import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from zsq_ext.zoo.adapters import load_checkpoint
from zsq_ext.zoo.small_nets import resnet20
from zsq_ext.zoo.torchvision_nets import Bottleneck, ResNet, mobilenet_v2, resnet18, resnet50


def randomised(net: nn.Module) -> nn.Module:
    """Every value of every tensor its own, so that an entry in the wrong place is noticed."""
    for index, (name, tensor) in enumerate(net.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            tensor.fill_(index)
        else:
            tensor.copy_(torch.linspace(index, index + 1, tensor.numel()).view_as(tensor))
    return net


def blank(build, *args, **flags) -> nn.Module:
    """A network of zeros, without the time that initialising large ones takes."""
    with torch.device("meta"):
        net = build(*args, **flags)
    net.to_empty(device="cpu")
    for tensor in net.state_dict().values():
        tensor.zero_()
    return net


def equal(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def copy(state: dict) -> dict:
    return {name: tensor.clone() for name, tensor in state.items()}


class Tiny(nn.Module):
    """The smallest thing with a weight, a BN buffer and a counter."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)


@pytest.fixture
def state() -> dict:
    return randomised(Tiny()).state_dict()


def pytorchcv_resnet(state: dict) -> dict:
    """torchvision's names turned into pytorchcv's, written independently of the adapter."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] in ("conv1", "bn1"):
            new = f"features.init_block.conv.{parts[0][:-1]}.{parts[1]}"
        elif parts[0] == "fc":
            new = f"output.{parts[1]}"
        else:
            unit = f"features.stage{parts[0][-1]}.unit{int(parts[1]) + 1}"
            if parts[2] == "downsample":
                new = f"{unit}.identity_conv.{['conv', 'bn'][int(parts[3])]}.{parts[4]}"
            else:
                new = f"{unit}.body.conv{parts[2][-1]}.{parts[2][:-1]}.{parts[3]}"
        renamed[new] = tensor
    return renamed


def pytorchcv_mobilenet_v2(state: dict, first_expands: bool) -> dict:
    renamed = {}
    units = [(stage, unit) for stage, n in enumerate((1, 2, 3, 7, 4), 1) for unit in range(1, n + 1)]
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "classifier":
            if parts[2] == "weight":
                renamed["output.weight"] = tensor[:, :, None, None]
            continue
        block = int(parts[1])
        if block in (0, 18):
            edge = "init" if block == 0 else "final"
            renamed[f"features.{edge}_block.{['conv', 'bn'][int(parts[2])]}.{parts[3]}"] = tensor
            continue
        stage, unit = units[block - 1]
        depth = 3 if block > 1 or first_expands else 2
        position = int(parts[3])
        if position < depth - 1:
            conv, part, leaf = position + 1 + (3 - depth), int(parts[4]), parts[5]
        else:
            conv, part, leaf = 3, position - (depth - 1), parts[4]
        renamed[f"features.stage{stage}.unit{unit}.conv{conv}.{['conv', 'bn'][part]}.{leaf}"] = tensor
    return renamed


def layered_cifar(state: dict, shortcut: str, classifier: str) -> dict:
    """pytorchcv's CIFAR names turned into `layer1.0.conv1` names."""
    renamed = {}
    for name, tensor in state.items():
        found = re.fullmatch(
            r"features\.stage(\d)\.unit(\d+)\.(?:body\.conv(\d)|identity_conv)\.(conv|bn)\.(\w+)", name
        )
        if found:
            stage, unit, number, part, leaf = found.groups()
            tail = f"{part}{number}" if number else f"{shortcut}.{int(part == 'bn')}"
            new = f"layer{stage}.{int(unit) - 1}.{tail}.{leaf}"
        elif name.startswith("output."):
            new = name.replace("output", classifier)
        else:
            part, leaf = name.removeprefix("features.init_block.").split(".")
            new = f"{part}1.{leaf}"
        renamed[new] = tensor
    return renamed


# formats and wrappers


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_file_formats_are_told_by_content(tmp_path, state, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    net = Tiny()
    assert load_checkpoint(net, path) is net
    assert equal(net.state_dict(), state)
    assert equal(load_checkpoint(Tiny(), str(path)).state_dict(), state)


@pytest.mark.parametrize("wrap", ["state_dict", "model", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_wrappers_and_prefixes(tmp_path, state, wrap, prefix):
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, wrap: {prefix + name: tensor for name, tensor in state.items()}}, path)
    assert equal(load_checkpoint(Tiny(), path).state_dict(), state)


def test_a_prefix_of_the_model_itself_stays(state):
    wrapped = nn.ModuleDict({"model": Tiny()})
    load_checkpoint(wrapped, {f"module.model.{name}": tensor for name, tensor in state.items()})
    assert equal(wrapped["model"].state_dict(), state)


def test_absent_counters_and_other_float_types(state):
    half = {name: tensor.half() for name, tensor in state.items() if tensor.is_floating_point()}
    net = load_checkpoint(Tiny(), half)
    assert net.conv.weight.dtype == torch.float32
    assert torch.equal(net.conv.weight, state["conv.weight"].half().float())
    assert net.bn.num_batches_tracked == 0


# adapters


@pytest.mark.parametrize("source", ["auto", "pytorchcv"])
@pytest.mark.parametrize(("build", "flags"), [(resnet18, {}), (resnet50, {"stride_in_1x1": True})])
def test_pytorchcv_resnets(build, flags, source):
    theirs = randomised(blank(build, 3, **flags)).state_dict()
    renamed = pytorchcv_resnet(theirs)
    assert "features.stage4.unit2.body.conv2.bn.running_mean" in renamed
    assert equal(load_checkpoint(blank(build, 3, **flags), renamed, source).state_dict(), theirs)


@pytest.mark.parametrize("expand_first", [True, False])
def test_pytorchcv_mobilenet_v2(expand_first):
    theirs = randomised(blank(mobilenet_v2, 3, expand_first=expand_first)).state_dict()
    theirs["classifier.1.bias"].zero_()
    renamed = pytorchcv_mobilenet_v2(theirs, expand_first)
    assert renamed["features.stage5.unit4.conv3.conv.weight"].shape == (320, 960, 1, 1)
    assert len(renamed) == (319 if expand_first else 313)
    ours = load_checkpoint(randomised(blank(mobilenet_v2, 3, expand_first=expand_first)), renamed)
    assert equal(ours.state_dict(), theirs)
    with pytest.raises(ValueError, match=rf"mobilenet_v2\(expand_first={expand_first}\)"):
        load_checkpoint(blank(mobilenet_v2, 3, expand_first=not expand_first), renamed)


@pytest.mark.parametrize("source", ["auto", "akamaster"])
@pytest.mark.parametrize(("shortcut", "classifier"), [("shortcut", "linear"), ("downsample", "fc")])
def test_layered_cifar_resnet(shortcut, classifier, source):
    theirs = randomised(resnet20(10)).state_dict()
    renamed = layered_cifar(theirs, shortcut, classifier)
    assert f"layer3.0.{shortcut}.1.running_var" in renamed
    assert equal(load_checkpoint(resnet20(10), renamed, source).state_dict(), theirs)


def test_option_a_shortcuts_are_refused():
    renamed = layered_cifar(resnet20(10).state_dict(), "shortcut", "linear")
    renamed = {name: tensor for name, tensor in renamed.items() if "shortcut" not in name}
    with pytest.raises(ValueError, match=r"1x1 projection shortcuts.*option A"):
        load_checkpoint(resnet20(10), renamed)


def test_pytorchcv_names_are_the_own_names_of_cifar_resnets():
    theirs = randomised(resnet20(10)).state_dict()
    for source in ("auto", "native", "pytorchcv"):
        assert equal(load_checkpoint(resnet20(10), theirs, source).state_dict(), theirs)


def test_stride_is_checked_where_names_cannot_tell():
    short = (ResNet, Bottleneck, (1, 1, 1, 1), 3)
    early, late = blank(*short, stride_in_1x1=True), blank(*short, stride_in_1x1=False)
    torchvision, pytorchcv = copy(late.state_dict()), pytorchcv_resnet(early.state_dict())
    for source in ("auto", "torchvision"):
        with pytest.raises(ValueError, match="stride in the 3x3"):
            load_checkpoint(early, torchvision, source)
        load_checkpoint(late, torchvision, source)
    load_checkpoint(early, torchvision, "native")
    for source in ("auto", "pytorchcv"):
        with pytest.raises(ValueError, match=r"stride in the first 1x1.*resnet50\(stride_in_1x1=True\)"):
            load_checkpoint(late, pytorchcv, source)
    load_checkpoint(late, pytorchcv, "pytorchcv_b")
    with pytest.raises(ValueError, match="stride in the 3x3"):
        load_checkpoint(early, pytorchcv, "pytorchcv_b")


# refusals


def damaged(state: dict, **changes) -> dict:
    return {**state, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}


REFUSED = {
    "shape": (lambda s: damaged(s, conv__weight=torch.zeros(9, 2, 1, 1)), r"'conv.weight'.*\(3, 2, 1, 1\), got \(9, 2"),
    "integers": (
        lambda s: damaged(s, conv__weight=torch.zeros(3, 2, 1, 1).int()),
        "dense torch.float32, got torch.int",
    ),
    "float count": (
        lambda s: damaged(s, bn__num_batches_tracked=torch.zeros(())),
        "dense torch.int64, got torch.float",
    ),
    "complex": (lambda s: damaged(s, conv__bias=torch.zeros(3, dtype=torch.cfloat)), "got torch.complex64"),
    "sparse": (lambda s: damaged(s, conv__bias=torch.zeros(3).to_sparse()), "torch.sparse_coo"),
    "meta": (lambda s: damaged(s, conv__bias=torch.zeros(3, device="meta")), "on meta"),
    "nan": (lambda s: damaged(s, conv__bias=torch.full((3,), torch.nan)), "'conv.bias'.*must be finite"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "bn.weight"}, r"1 missing \(bn.weight\) and 0 unexp"),
    "unexpected": (lambda s: damaged(s, extra=torch.zeros(1)), r"0 missing \(none\) and 1 unexpected \(extra\)"),
    "not a tensor": (lambda s: damaged(s, epoch=3), "only tensors under names, got int at 'epoch'"),
    "empty": (lambda s: {}, "an empty mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_model_untouched(state, case):
    change, message = REFUSED[case]
    net = randomised(Tiny())
    before = copy(net.state_dict())
    with pytest.raises(ValueError, match=f"load_checkpoint: .*{message}"):
        load_checkpoint(net, change(state))
    assert equal(net.state_dict(), before)


def test_long_lists_of_names_are_cut():
    with pytest.raises(ValueError, match=r"got 102 missing \(conv1.weight, bn1.weight, bn1.bias, \.\.\.\)") as caught:
        load_checkpoint(blank(resnet18, 3), {"a": torch.zeros(1)})
    assert len(str(caught.value)) < 400


def test_bad_arguments(tmp_path, state):
    with pytest.raises(ValueError, match=r"source must be one of auto, .*got 'timm'"):
        load_checkpoint(Tiny(), state, "timm")
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        load_checkpoint(Tiny(), tmp_path / "no.pth")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(Tiny(), tmp_path)
    with pytest.raises(ValueError, match="model must hold real tensors"):
        load_checkpoint(Tiny().to("meta"), state)
    with pytest.raises(ValueError, match="akamaster names"):
        load_checkpoint(Tiny(), {"other": torch.zeros(1)}, "akamaster")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_no_object_is_executed(tmp_path, kind):
    proof, path = tmp_path / "executed", tmp_path / "evil.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Bomb(proof)}))
    else:
        torch.save({"state_dict": Bomb(proof)}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"evil\.pth"):
        load_checkpoint(Tiny(), path)
    assert not proof.exists()


def test_whole_modules_are_refused(tmp_path):
    torch.save(Tiny(), tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"m\.pth"):
        load_checkpoint(Tiny(), tmp_path / "m.pth")


def test_inflating_archive_is_refused(tmp_path, state):
    torch.save({**state, "zeros": torch.zeros(1 << 16)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
    with pytest.raises(ValueError, match=r"packed.pth.*unpacks to"):
        load_checkpoint(Tiny(), tmp_path / "packed.pth")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x80\x02", b"\x89PNG\r\n\x1a\n0000", b"\x10" + bytes(7) + b"{"]
)
def test_foreign_files(tmp_path, content):
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign\.pth"):
        load_checkpoint(Tiny(), path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_every_truncation_is_an_error(tmp_path, state, kind):
    path = tmp_path / "cut.pth"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            load_checkpoint(Tiny(), path)


@pytest.mark.filterwarnings("ignore")  # torch warns about odd pickles before it refuses them
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_bytes_load_or_are_an_error(tmp_path, data):
    torch.manual_seed(0)
    kind = data.draw(st.sampled_from(["safetensors", "zip", "legacy"]))
    path = tmp_path / "altered.pth"
    if kind == "safetensors":
        save_file(Tiny().state_dict(), path)
    else:
        torch.save(Tiny().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    said = "altered.pth"
    try:
        load_checkpoint(Tiny(), path)
    except ValueError as error:
        said = str(error)
    assert "altered.pth" in said
