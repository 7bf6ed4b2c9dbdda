"""Readers of real image sets, on tiny files in the distributed formats that the tests write themselves."""

import io
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsq_ext.zoo import cifar
from zsq_ext.zoo.datasets import cifar10, cifar10_spec, cifar100, cifar100_spec, imagenet_folder, imagenet_spec

READERS = {"cifar10": cifar10, "cifar100": cifar100}


class _Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 did, in which the distributed files were made."""

    def _save_bytes(self, obj):
        if len(obj) < 256:
            self.write(pickle.SHORT_BINSTRING + struct.pack("<B", len(obj)) + obj)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch = pickle._Pickler.dispatch | {bytes: _save_bytes}


def python2_dumps(value) -> bytes:
    out = io.BytesIO()
    _Python2Pickler(out, protocol=2).dump(value)
    return out.getvalue().replace(b"numpy._core", b"numpy.core")


def records(name: str, split: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """File name -> uint8 [n, 3072] and labels [n]: two or three images per file."""
    rng = np.random.default_rng(len(name + split))
    files = {
        ("cifar10", "train"): [f"data_batch_{n}" for n in range(1, 6)],
        ("cifar10", "test"): ["test_batch"],
        ("cifar100", "train"): ["train"],
        ("cifar100", "test"): ["test"],
    }[name, split]
    classes = 10 if name == "cifar10" else 100
    return {
        file: (rng.integers(0, 256, (2 + i % 2, 3072), dtype=np.uint8), rng.integers(0, classes, 2 + i % 2))
        for i, file in enumerate(files)
    }


def python_batch(name: str, data: np.ndarray, labels: np.ndarray) -> dict:
    batch = {b"data": data, b"batch_label": b"a batch", b"filenames": [b"x.png"] * len(data)}
    if name == "cifar10":
        return {**batch, b"labels": labels.tolist()}
    return {**batch, b"fine_labels": labels.tolist(), b"coarse_labels": [0] * len(labels)}


def binary_batch(name: str, data: np.ndarray, labels: np.ndarray) -> bytes:
    coarse = [] if name == "cifar10" else [np.full((len(data), 1), 7, np.uint8)]
    return np.concatenate([*coarse, labels[:, None].astype(np.uint8), data], axis=1).tobytes()


def write_set(root: Path, name: str, form: str) -> Path:
    """Both splits in the folder that unpacking the distributed archive gives."""
    names = {
        ("cifar10", "python"): "cifar-10-batches-py",
        ("cifar10", "binary"): "cifar-10-batches-bin",
        ("cifar100", "python"): "cifar-100-python",
        ("cifar100", "binary"): "cifar-100-binary",
    }
    folder = root / names[name, form]
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        for file, (data, labels) in records(name, split).items():
            if form == "python":
                (folder / file).write_bytes(python2_dumps(python_batch(name, data, labels)))
            else:
                (folder / f"{file}.bin").write_bytes(binary_batch(name, data, labels))
    return folder


def pack(folder: Path) -> Path:
    archive = folder.parent / f"{folder.name.replace('batches-py', 'python').replace('batches-bin', 'binary')}.tar.gz"
    with tarfile.open(archive, "w:gz") as out:
        out.add(folder, folder.name)
    return archive


def expected(name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    spec = cifar10_spec if name == "cifar10" else cifar100_spec
    data = np.concatenate([data for data, _ in records(name, split).values()]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([labels for _, labels in records(name, split).values()])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    return (torch.from_numpy(data).float() / 255 - mean) / std, torch.from_numpy(labels)


# CIFAR


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("place", ["folder", "parent", "archive", "parent of archive"])
@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("name", READERS)
def test_cifar(tmp_path, name, form, place, split):
    folder = write_set(tmp_path / "made", name, form)
    root = {"folder": folder, "parent": folder.parent}.get(place)
    if root is None:
        archive = pack(folder)
        root = tmp_path / "only" / archive.name
        root.parent.mkdir()
        archive.rename(root)
        root = root if place == "archive" else root.parent
    found = READERS[name](root, split)
    images, labels = expected(name, split)
    assert len(found) == len(labels)
    assert found.labels.dtype == torch.int64
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.images(slice(None)), images)
    assert found.spec.num_classes == (10 if name == "cifar10" else 100)


def test_default_split_is_test(tmp_path):
    assert torch.equal(cifar10(write_set(tmp_path, "cifar10", "binary")).labels, expected("cifar10", "test")[1])


def test_images_and_batches(tmp_path):
    found = cifar10(write_set(tmp_path, "cifar10", "python"), "train")
    images, labels = expected("cifar10", "train")
    assert len(labels) == 12
    order = [3, 0, -1, 3]
    for which in (order, tuple(order), torch.tensor(order), np.array(order)):
        assert torch.equal(found.images(which), images[order])
    assert found.images([]).shape == (0, 3, 32, 32)
    got = list(found.batches(5))
    assert [len(y) for _, y in got] == [5, 5, 2]
    assert torch.equal(torch.cat([x for x, _ in got]), images)
    assert torch.equal(torch.cat([y for _, y in got]), labels)
    with pytest.raises(ValueError, match=r"which must hold indices in \[-12, 12\), got 12"):
        found.images([12])
    for wrong in ([1.0], torch.ones(12, dtype=torch.bool)):
        with pytest.raises(TypeError, match="which must be a slice or hold integers"):
            found.images(wrong)
    with pytest.raises(ValueError, match="batches: batch_size must be at least 1, got 0"):
        found.batches(0)


def test_normalisation_constants():
    assert cifar10_spec.mean == (0.49139968, 0.48215827, 0.44653124)
    assert cifar10_spec.std == (0.24703233, 0.24348505, 0.26158768)
    assert cifar100_spec.mean == (0.50705882, 0.48666667, 0.44078431)
    assert cifar100_spec.std == (0.26745098, 0.25568627, 0.27607843)
    assert (imagenet_spec.mean, imagenet_spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert [spec.valid_range for spec in (cifar10_spec, cifar100_spec, imagenet_spec)] == [(0.0, 1.0)] * 3


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_files_saved_again_by_python3(tmp_path, protocol, order):
    data, labels = records("cifar10", "test")["test_batch"]
    batch = python_batch("cifar10", np.array(data, order=order), labels)
    batch = {key.decode(): value for key, value in batch.items()}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol))
    assert torch.equal(cifar10(tmp_path).images(slice(None)), expected("cifar10", "test")[0])


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def good_batch() -> dict:
    return python_batch("cifar10", *records("cifar10", "test")["test_batch"])


@pytest.mark.parametrize("form", ["folder", "archive"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickle_is_not_executed(tmp_path, protocol, form):
    proof = tmp_path / "executed"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    hostile = {**good_batch(), b"extra": Call(Path.touch, proof)}
    (folder / "test_batch").write_bytes(pickle.dumps(hostile, protocol))
    with pytest.raises(ValueError, match=r"cifar10: .*'test_batch'.*only numpy byte arrays are admitted"):
        cifar10(folder if form == "folder" else pack(folder))
    assert not proof.exists()


HOSTILE = {
    "eval": (lambda: pickle.dumps(Call(eval, "1")), "asks for builtins.eval"),
    "numpy function": (lambda: pickle.dumps(Call(np.zeros, (3,))), "asks for numpy"),
    "object array": (lambda: pickle.dumps({b"data": np.array([None], object)}), "only uint8 arrays"),
    "float array": (lambda: pickle.dumps({b"data": np.zeros(3)}), "only uint8 arrays"),
    "attribute of a stand-in": (lambda: b"cnumpy\nndarray\n}U\x01xI1\nsb.", "not a pickle of arrays"),
    "attribute of bytes": (lambda: b"c_codecs\nencode\n}U\x01xI1\nsb.", "not a pickle of arrays"),
    "codec": (lambda: b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x94tR.", "latin1"),
    "huge memo": (lambda: b"\x80\x02]r\xff\xff\xff\x7f.", "memo slot"),
    "persistent id": (lambda: b"\x80\x02U\x01xQ.", "not a pickle of arrays"),
    "nothing": (lambda: b"", "not a pickle of arrays"),
    "text": (lambda: b"this is no pickle", "not a pickle of arrays"),
    "list": (lambda: pickle.dumps([1, 2]), "must hold a dict, got list"),
    "no data": (lambda: pickle.dumps({b"labels": [1]}), "must hold the array 'data'"),
    "no labels": (lambda: pickle.dumps({**good_batch(), b"labels": None}), "and the list 'labels'"),
    "labels of text": (lambda: pickle.dumps({**good_batch(), b"labels": ["1", "2"]}), "integers from 0 to 255"),
    "label 10": (
        lambda: pickle.dumps({**good_batch(), b"labels": [0, 10]}),
        r"labels must be in \[0, 10\), got 0 to 10",
    ),
    "too few labels": (lambda: pickle.dumps({**good_batch(), b"labels": [1]}), r"shape \(1, 3072\), got \(2, 3072\)"),
    "flat data": (lambda: pickle.dumps({**good_batch(), b"data": np.zeros(6144, np.uint8)}), r"got \(6144,\)"),
    "no images": (
        lambda: pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}),
        "at least one image",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_or_foreign_batch(tmp_path, case):
    make, message = HOSTILE[case]
    (tmp_path / "test_batch").write_bytes(make())
    with pytest.raises(ValueError, match=f"cifar10: .*'test_batch'.*{message}"):
        cifar10(tmp_path)
    assert not hasattr(cifar._PickledArray, "x")
    assert not hasattr(cifar._PickledBytes, "x")


def test_array_that_claims_more_than_it_has(tmp_path):
    content = pickle.dumps(good_batch(), 2)
    assert content.count(b"M\x00\x0c") == 1  # the 3072 of the shape
    (tmp_path / "test_batch").write_bytes(content.replace(b"M\x00\x0c", b"J\xff\xff\xff\x7f"))
    with pytest.raises(ValueError, match="not in the form numpy writes"):
        cifar10(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_pickles_are_read_or_an_error(tmp_path, data):
    content = bytearray(python2_dumps(good_batch()))
    # the pixels are most of the file and cannot be wrong: alter what stands around them
    ends = [*range(200), *range(len(content) - 200, len(content))]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.sampled_from(ends))] = data.draw(st.integers(0, 255))
    (tmp_path / "test_batch").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    said = expected_error = "cifar10: root must hold CIFAR batches, got 'test_batch'"
    try:
        cifar10(tmp_path)
    except ValueError as error:
        said = str(error)
    assert said.startswith(expected_error)


@pytest.mark.parametrize(("name", "record"), [("cifar10", 3073), ("cifar100", 3074)])
@pytest.mark.parametrize("size", [0, 1, 3072, 6000])
def test_binary_of_wrong_size(tmp_path, name, record, size):
    file = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}[name]
    (tmp_path / file).write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"'{file}'.*positive multiple of {record} bytes, got {size}"):
        READERS[name](tmp_path)


def test_binary_label_out_of_range(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\), got 10 to 10"):
        cifar10(tmp_path)


def test_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar10: root must be or hold"):
        cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match="cifar100: root must be or hold"):
        cifar100(tmp_path / "nowhere")
    folder = write_set(tmp_path, "cifar10", "binary")
    (folder / "data_batch_3.bin").unlink()
    assert len(cifar10(folder, "test")) == 2
    for root in (folder, pack(folder)):
        with pytest.raises(FileNotFoundError, match="data_batch_3"):
            cifar10(root, "train")
    with pytest.raises(ValueError, match="cifar10: split must be 'test' or 'train', got 'val'"):
        cifar10(folder, "val")


def test_cifar100_is_not_taken_for_cifar10(tmp_path):
    write_set(tmp_path, "cifar100", "python")
    with pytest.raises(FileNotFoundError):
        cifar10(tmp_path)


def test_damaged_archives(tmp_path):
    archive = pack(write_set(tmp_path, "cifar10", "binary"))
    content = archive.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 40):
        archive.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"whole CIFAR archive, got .*cifar-10-binary.tar.gz"):
            cifar10(archive, "train")


def test_archive_links_and_oversized_members(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(3073))
    linked = tmp_path / "linked.tar.gz"
    with tarfile.open(linked, "w:gz") as out:
        link = tarfile.TarInfo("test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        out.addfile(link)
    with pytest.raises(FileNotFoundError):
        cifar10(linked)
    big = tmp_path / "big.tar"
    claim = tarfile.TarInfo("test_batch.bin")
    claim.size = 1 << 40
    big.write_bytes(claim.tobuf())
    with pytest.raises(ValueError, match=r"claims 1099511627776 bytes"):
        cifar10(big)


# ImageNet folders


def write_folder(root: Path, sizes: dict[str, tuple[int, int]], suffix: str = ".png") -> dict[str, np.ndarray]:
    """One picture per "class/name" with (width, height); smooth, so that a shift of the crop shows."""
    image = pytest.importorskip("PIL.Image")
    made = {}
    for number, (name, (width, height)) in enumerate(sizes.items()):
        y, x = np.mgrid[0:height, 0:width]
        pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 40 * number)], axis=-1).astype(np.uint8)
        path = root / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(path)
        made[name] = pixels
    return made


def test_imagenet_folder(tmp_path):
    sizes = {"n02/b": (256, 256), "n02/a": (300, 256), "n01/z": (256, 301), "n03/c": (256, 256), "n03/d": (256, 256)}
    made = write_folder(tmp_path / "val", sizes)
    (tmp_path / "val" / "n02" / "notes.txt").write_text("not an image")
    (tmp_path / "val" / "readme.md").write_text("not a class")
    for root in (tmp_path, tmp_path / "val"):
        found = imagenet_folder(root)
        assert found.labels.tolist() == [0, 1, 1, 2, 2]
        assert found.classes == ("n01", "n02", "n03")
        assert (found.spec.num_classes, found.spec.shape) == (3, (3, 224, 224))
    # the shorter side is 256 already, so only the crop and the normalisation act
    crops = {"n01/z": (38, 16), "n02/a": (16, 38), "n02/b": (16, 16), "n03/c": (16, 16), "n03/d": (16, 16)}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (imagenet_spec.mean, imagenet_spec.std))
    wanted = []
    for name, (top, left) in crops.items():
        crop = made[name][top : top + 224, left : left + 224].transpose(2, 0, 1).copy()
        wanted.append((torch.from_numpy(crop).float() / 255 - mean) / std)
    wanted = torch.stack(wanted)
    assert torch.equal(found.images(slice(None)), wanted)
    assert torch.equal(found.images([4, 0]), wanted[[4, 0]])
    assert found.images([]).shape == (0, 3, 224, 224)
    for batch_size in (1, 2, 5, 9):
        batches = list(found.batches(batch_size))
        assert torch.equal(torch.cat([x for x, _ in batches]), wanted)
        assert torch.equal(torch.cat([y for _, y in batches]), found.labels)
    assert len(next(iter(found.batches(2)))[0]) == 2  # leaving early closes the pool


@pytest.mark.parametrize("size", [(60, 40), (40, 61), (700, 333), (512, 512)])
def test_imagenet_resize(tmp_path, size):
    write_folder(tmp_path, {"a/x": size, "b/x": size}, ".JPEG")
    found = imagenet_folder(tmp_path)
    pixels = found.images([0])[0] * torch.tensor(imagenet_spec.std).view(3, 1, 1)
    pixels = (pixels + torch.tensor(imagenet_spec.mean).view(3, 1, 1)) * 255
    assert pixels.shape == (3, 224, 224)
    # red grows to the right by 255 over the resized width; its mean is that of the centre
    scale = 256 / min(size)
    slope = (pixels[0, :, 200] - pixels[0, :, 20]).mean() / 180
    assert abs(slope - 255 / (size[0] * scale)) < 0.02
    assert abs(pixels[0].mean() - 127) < 4
    assert abs(pixels[1].mean() - 127) < 4


def test_imagenet_grey_and_transparent(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, mode in (("a", "L"), ("b", "RGBA"), ("c", "CMYK")):
        (tmp_path / name).mkdir()
        image.new(mode, (300, 260)).save(tmp_path / name / ("x.jpg" if mode == "CMYK" else "x.png"))
    assert imagenet_folder(tmp_path).images(slice(None)).shape == (3, 3, 224, 224)


def test_imagenet_part_of_the_classes(tmp_path):
    write_folder(tmp_path, {"n07/x": (256, 256), "n03/x": (256, 256)})
    found = imagenet_folder(tmp_path, classes=[f"n{n:02}" for n in range(10)])
    assert found.labels.tolist() == [3, 7]
    assert found.spec.num_classes == 10
    with pytest.raises(ValueError, match=r"classes must name every folder.*'n07'"):
        imagenet_folder(tmp_path, classes=["n03", "n04"])


def test_imagenet_errors(tmp_path):
    write_folder(tmp_path, {"a/x": (230, 230), "b/x": (230, 230)})
    with pytest.raises(ValueError, match="resize must be at least 224, got 200"):
        imagenet_folder(tmp_path, resize=200)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        imagenet_folder(tmp_path, workers=0)
    with pytest.raises(FileNotFoundError, match="existing folder"):
        imagenet_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="without images"):
        imagenet_folder(tmp_path / "a")
    whole = (tmp_path / "b" / "x.png").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:20], b"", b"no image"):
        (tmp_path / "b" / "x.png").write_bytes(content)
        found = imagenet_folder(tmp_path)
        assert found.images([0]).shape == (1, 3, 224, 224)
        with pytest.raises(ValueError, match=r"readable image, got .*x.png"):
            found.images([1])
        with pytest.raises(ValueError, match=r"readable image, got .*x.png"):
            list(found.batches(1))


def test_imagenet_one_class(tmp_path):
    write_folder(tmp_path, {"a/x": (230, 230)})
    with pytest.raises(ValueError, match=r"classes must be at least two, got \['a'\]"):
        imagenet_folder(tmp_path)


def test_pillow_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="Pillow must be installed"):
        imagenet_folder(tmp_path)
    assert len(cifar10(write_set(tmp_path, "cifar10", "binary"))) == 2
