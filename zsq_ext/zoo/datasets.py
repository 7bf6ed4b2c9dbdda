"""Readers for real test images that a user already has: CIFAR-10 and CIFAR-100 as distributed, ImageNet as a folder.

Nothing here downloads. Images come out normalised as the networks of the literature expect them; they serve to measure
accuracy and never to select or tune anything.

Shape letters: N images, C channels, H W pixels.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq_ext.core.spec import InputSpec

__all__ = ["ImageSet", "cifar10", "cifar10_spec", "cifar100", "cifar100_spec", "imagenet_folder", "imagenet_spec"]

# Mean and standard deviation of the CIFAR training sets as the published teachers used them, to their last digit.
cifar10_spec = InputSpec(
    shape=(3, 32, 32),
    mean=(0.49139968, 0.48215827, 0.44653124),
    std=(0.24703233, 0.24348505, 0.26158768),
    valid_range=(0.0, 1.0),
    num_classes=10,
)
cifar100_spec = InputSpec(
    shape=(3, 32, 32),
    mean=(0.50705882, 0.48666667, 0.44078431),
    std=(0.26745098, 0.25568627, 0.27607843),
    valid_range=(0.0, 1.0),
    num_classes=100,
)
imagenet_spec = InputSpec(
    shape=(3, 224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    valid_range=(0.0, 1.0),
    num_classes=1000,
)


class ImageSet:
    """Labelled images, normalised when they are asked for.

    Attributes:
        labels: int64 [N], each in [0, spec.num_classes).
        spec: shape and normalisation of what `images` returns.
        classes: names of the classes in label order, or empty if unknown.
    """

    def __init__(self, labels: Tensor, spec: InputSpec, classes: Sequence[str] = ()):
        self.labels = labels
        self.spec = spec
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, which: slice | Sequence[int] | Tensor) -> Tensor:
        """Selected images.

        Args:
            which: a slice or a sequence of indices in [-N, N), in any order, with repetitions if wanted.

        Returns:
            float32 [n, C, H, W], normalised by `spec`.

        Raises:
            TypeError: an index is not an integer (a mask of booleans is refused too).
            ValueError: an index is outside [-N, N).
        """
        return self._normalise(self._pixels(self._indices(which)))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the set once, in order; the last batch may be smaller.

        Args:
            batch_size: images per batch, at least 1.

        Returns:
            Iterator of (float32 [n, C, H, W], int64 [n]).

        Raises:
            ValueError: batch_size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batches: batch_size must be at least 1, got {batch_size}")
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield self.images(rows), self.labels[rows]

    def _pixels(self, indices: list[int]) -> Tensor:
        """uint8 [n, C, H, W]."""
        raise NotImplementedError

    def _indices(self, which: slice | Sequence[int] | Tensor) -> list[int]:
        if isinstance(which, slice):
            return list(range(len(self))[which])
        indices = which.tolist() if isinstance(which, Tensor | np.ndarray) else list(which)
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int | np.integer):
                raise TypeError(f"images: which must be a slice or hold integers, got {index!r}")
            if not -len(self) <= index < len(self):
                raise ValueError(f"images: which must hold indices in [-{len(self)}, {len(self)}), got {index}")
        return [int(index) % len(self) for index in indices]

    def _normalise(self, pixels: Tensor) -> Tensor:
        return self.spec.normalise(pixels.float().div_(255))


class _ArrayImages(ImageSet):
    """Images held in memory as bytes."""

    def __init__(self, pixels: Tensor, labels: Tensor, spec: InputSpec, classes: Sequence[str] = ()):
        super().__init__(labels, spec, classes)
        self._array = pixels  # uint8 [N, C, H, W]

    def _pixels(self, indices: list[int]) -> Tensor:
        return self._array[indices]


def cifar10(root: str | Path, split: str = "test") -> ImageSet:
    """CIFAR-10 as distributed, in the python or the binary format.

    Args:
        root: `cifar-10-python.tar.gz` or `cifar-10-binary.tar.gz`, the folder unpacked from one of them, or a folder
            that holds any of these.
        split: "test" (test_batch) or "train" (data_batch_1 to 5, in this order).

    Returns:
        The images in memory as bytes, in file order, with `cifar10_spec`.

    Raises:
        FileNotFoundError: root holds none of the known files, or one of the batches is absent.
        ValueError: split is unknown; a file is damaged, or is a pickle that asks for more than arrays.

    Example:
        test = cifar10("data/cifar-10-python.tar.gz")
        for images, labels in test.batches(256): ...

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; file layout as on its home page.
    """
    names = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
    return _cifar("cifar10", Path(root), split, names, label_bytes=1, label_key=b"labels", spec=cifar10_spec)


def cifar100(root: str | Path, split: str = "test") -> ImageSet:
    """CIFAR-100 with its 100 fine labels, as distributed, in the python or the binary format.

    Args:
        root: `cifar-100-python.tar.gz` or `cifar-100-binary.tar.gz`, the folder unpacked from one of them, or a folder
            that holds any of these.
        split: "test" or "train".

    Returns:
        The images in memory as bytes, in file order, with `cifar100_spec`.

    Raises:
        FileNotFoundError: root holds none of the known files.
        ValueError: split is unknown; a file is damaged, or is a pickle that asks for more than arrays.

    Source: as `cifar10`.
    """
    names = {"train": ["train"], "test": ["test"]}
    return _cifar("cifar100", Path(root), split, names, label_bytes=2, label_key=b"fine_labels", spec=cifar100_spec)


def _cifar(
    function: str,
    root: Path,
    split: str,
    names: dict[str, list[str]],
    label_bytes: int,
    label_key: bytes,
    spec: InputSpec,
) -> ImageSet:
    if split not in names:
        raise ValueError(f"{function}: split must be 'test' or 'train', got {split!r}")
    images, labels = [], []
    for file_name, content in _cifar_files(function, root, names[split]).items():
        try:
            if file_name.endswith(".bin"):
                pixels, fine = _parse_binary(content, label_bytes)
            else:
                pixels, fine = _parse_python(content, label_key)
            if len(fine) and not (fine.min() >= 0 and fine.max() < spec.num_classes):
                raise ValueError(f"labels must be in [0, {spec.num_classes}), got {fine.min()} to {fine.max()}")
        except ValueError as error:
            message = f"{function}: root must hold CIFAR batches, got '{file_name}' in '{root}': {error}"
            raise ValueError(message) from error
        images.append(pixels.reshape(-1, *spec.shape))
        labels.append(fine)
    return _ArrayImages(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)), spec)


def _cifar_files(function: str, root: Path, names: list[str]) -> dict[str, bytes]:
    """The bytes of the named batches, python format or binary (".bin"), from a folder or an archive."""
    stem = function.replace("cifar", "cifar-")
    folders = [root, *sorted(root.glob(f"{stem}-*"))] if root.is_dir() else [root]
    for place in folders:
        for wanted in (names, [f"{name}.bin" for name in names]):
            if place.is_dir() and all((place / name).is_file() for name in wanted):
                return {name: (place / name).read_bytes() for name in wanted}
        if place.is_file():
            found = _from_archive(function, place, names)
            if found:
                return found
    raise FileNotFoundError(
        f"{function}: root must be or hold the folder or archive of {stem} with {', '.join(names)} "
        f"(python format, or .bin), got '{root}'"
    )


def _from_archive(function: str, path: Path, names: list[str]) -> dict[str, bytes] | None:
    """Read the named batches out of a tar without unpacking it, so that no path in it is ever written to."""
    largest = 1 << 28  # bytes; the largest real member, CIFAR-100's training batch, has 1.55e8
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isreg() and name.removesuffix(".bin") in names:
                    if not 0 <= member.size <= largest:
                        raise ValueError(f"'{name}' claims {member.size} bytes")
                    if stream := archive.extractfile(member):
                        found[name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        raise ValueError(f"{function}: root must be a whole CIFAR archive, got '{path}': {error}") from error
    for wanted in (names, [f"{name}.bin" for name in names]):
        if all(name in found for name in wanted):
            return {name: found[name] for name in wanted}
    return None


def _parse_binary(content: bytes, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of label bytes (the fine one last) and 3072 pixels -> uint8 [n, 3072], int64 [n]."""
    record = label_bytes + 3072
    if not content or len(content) % record:
        raise ValueError(f"its size must be a positive multiple of {record} bytes, got {len(content)}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    return rows[:, label_bytes:].copy(), rows[:, label_bytes - 1].astype(np.int64)


def _parse_python(content: bytes, label_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A pickled {b"data": uint8 [n, 3072], label_key: list} -> uint8 [n, 3072], int64 [n]."""
    batch = _unpickle(content)
    if not isinstance(batch, dict):
        raise ValueError(f"it must hold a dict, got {type(batch).__name__}")
    # Python 2 wrote byte strings; a file saved again by Python 3 has text
    batch = {key.encode() if isinstance(key, str) else key: value for key, value in batch.items()}
    data, labels = batch.get(b"data"), batch.get(label_key)
    if not isinstance(data, _PickledArray) or not isinstance(labels, list):
        raise ValueError(f"it must hold the array 'data' and the list '{label_key.decode()}'")
    if not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise ValueError(f"'{label_key.decode()}' must be integers from 0 to 255")
    if not labels:
        raise ValueError("it must hold at least one image")
    pixels = data.to_numpy()
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or len(pixels) != len(labels):
        raise ValueError(f"'data' must have shape ({len(labels)}, 3072), got {pixels.shape}")
    return pixels, np.array(labels, np.int64)


class _PickledDtype:
    """Stands in for numpy.dtype in a pickle: bytes are the only type a CIFAR file needs."""

    def __init__(self, code: Any, *flags: Any):
        if code not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"only uint8 arrays are read, got dtype {code!r}")

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment say nothing about single bytes."""


class _PickledArray:
    """Stands in for numpy.ndarray in a pickle, so that numpy never meets what a hostile file says."""

    def __init__(self, *arguments: Any):
        """The pickle's arguments are those of an empty array; `__setstate__` brings the content."""
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        match self.state:
            case (int(), tuple(shape), _PickledDtype(), bool() | int() as fortran, bytes() | bytearray() as buffer):
                # reshape refuses sizes that do not match the bytes present
                if all(type(size) is int and 0 <= size <= len(buffer) for size in shape):
                    return np.frombuffer(buffer, np.uint8).reshape(shape, order="F" if fortran else "C").copy()
        raise ValueError("its array is not in the form numpy writes")


class _PickledBuffer(_PickledArray):
    """Stands in for numpy's _frombuffer, with which pickle protocol 5 writes arrays."""

    def __init__(self, buffer: Any, dtype: Any, shape: Any, order: Any):
        self.state = (1, shape, dtype, order == "F", buffer)


class _PickledBytes(bytes):
    """Stands in for _codecs.encode, with which Python 3 writes bytes into old pickle protocols."""

    def __new__(cls, text: Any, encoding: Any) -> _PickledBytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError(f"only latin1 byte strings are read, got {encoding!r}")
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, state: Any) -> None:
        """Never reached by a real file; without it a pickle could set attributes on this class."""


# Classes with __setstate__ and no functions: a pickle may assign attributes to whatever else it is given.
_ADMITTED = {
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.numeric", "_frombuffer"): _PickledBuffer,
    ("numpy._core.numeric", "_frombuffer"): _PickledBuffer,
    ("_codecs", "encode"): _PickledBytes,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers and byte arrays; every other global is refused, so nothing can be executed."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; only numpy byte arrays are admitted")
        return _ADMITTED[module, name]


def _unpickle(content: bytes) -> Any:
    """Containers, numbers, strings and byte arrays from a pickle that may be hostile; ValueError for anything else."""
    try:
        memo = 0
        for opcode, argument, _ in pickletools.genops(content):
            memo += "PUT" in opcode.name or opcode.name == "MEMOIZE"
            # a slot far beyond the entries so far would make the reader allocate memory up to that slot
            if opcode.name.endswith("PUT") and int(argument or 0) > memo:
                raise pickle.UnpicklingError(f"memo slot {argument} is out of order")
        return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except (
        *(pickle.UnpicklingError, ValueError, EOFError, TypeError, LookupError, AttributeError),
        *(struct.error, OverflowError, MemoryError, RecursionError),
    ) as error:
        raise ValueError(f"not a pickle of arrays ({error})") from error


def imagenet_folder(
    root: str | Path, classes: Sequence[str] | None = None, resize: int = 256, workers: int = 4
) -> ImageSet:
    """ImageNet-style validation images, one folder per class, decoded when they are asked for. Needs Pillow.

    Each image becomes RGB, its shorter side `resize` pixels (bilinear), and the 224 x 224 centre is cut out.

    Args:
        root: folder with `val/<class>/<image>`, or that `val` folder itself. Images end in .jpeg, .jpg or .png.
        classes: all class names in label order. Default: the sorted folder names, which for the 1000 wnids is the
            order of all public checkpoints. Give it where only some of the classes are present.
        resize: length of the shorter side before the crop, in pixels, at least 224.
        workers: decoding threads, at least 1.

    Returns:
        A set in sorted order of class folder and file name, with `imagenet_spec` (num_classes as in `classes`).

    Raises:
        FileNotFoundError: root has no class folders with images.
        ImportError: Pillow is not installed.
        ValueError: a folder is not among `classes`, fewer than two classes, a size is too small; while reading: a file
            is not an image.

    Source: evaluation of the literature, resize 256 and centre crop 224, as in torchvision's references.
    """
    _pillow()
    if resize < imagenet_spec.shape[1]:
        raise ValueError(f"imagenet_folder: resize must be at least {imagenet_spec.shape[1]}, got {resize}")
    if workers < 1:
        raise ValueError(f"imagenet_folder: workers must be at least 1, got {workers}")
    root = Path(root)
    folder = root / "val" if (root / "val").is_dir() else root
    if not folder.is_dir():
        raise FileNotFoundError(f"imagenet_folder: root must be an existing folder, got '{root}'")
    present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    classes = present if classes is None else list(classes)
    number = {name: label for label, name in enumerate(classes)}
    if strange := [name for name in present if name not in number]:
        raise ValueError(f"imagenet_folder: classes must name every folder of '{folder}', got none for {strange[0]!r}")
    paths, labels = [], []
    for name in present:
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
        paths += files
        labels += [number[name]] * len(files)
    if not paths:
        raise FileNotFoundError(f"imagenet_folder: root must hold val/<class>/<image>, got '{root}' without images")
    if len(classes) < 2:
        raise ValueError(f"imagenet_folder: classes must be at least two, got {classes!r}")
    spec = replace(imagenet_spec, num_classes=len(classes))
    return _FolderImages(paths, torch.tensor(labels), spec, classes, resize, workers)


class _FolderImages(ImageSet):
    """Image files, decoded by a few threads (Pillow's decoders release the interpreter lock)."""

    def __init__(
        self, paths: list[Path], labels: Tensor, spec: InputSpec, classes: Sequence[str], resize: int, workers: int
    ):
        super().__init__(labels, spec, classes)
        self.paths = paths
        self._resize = resize
        self._workers = workers

    def _pixels(self, indices: list[int]) -> Tensor:
        if not indices:
            return torch.empty((0, *self.spec.shape), dtype=torch.uint8)
        with ThreadPoolExecutor(self._workers) as pool:
            return torch.stack(list(pool.map(self._decode, indices)))

    def _batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As for every set, but the next batch is decoded while the caller works on this one."""
        chunks = [range(len(self))[start : start + batch_size] for start in range(0, len(self), batch_size)]
        pool = ThreadPoolExecutor(self._workers)
        try:
            pending = [pool.submit(self._decode, index) for index in chunks[0]]
            for rows, following in zip(chunks, [*chunks[1:], range(0)], strict=True):
                futures, pending = pending, [pool.submit(self._decode, index) for index in following]
                pixels = torch.stack([future.result() for future in futures])
                yield self._normalise(pixels), self.labels[rows.start : rows.stop]
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, index: int) -> Tensor:
        """One image as uint8 [3, H, W]."""
        image_module, path = _pillow(), self.paths[index]
        try:
            with image_module.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, zlib.error, image_module.DecompressionBombError) as error:
            raise ValueError(f"images: every file must be a readable image, got '{path}': {error}") from error
        width, height = image.size
        short, size = min(width, height), self.spec.shape[1]
        # the longer side is cut to an integer and the crop rounded half to even, as in torchvision
        width, height = self._resize * width // short, self._resize * height // short
        image = image.resize((width, height), image_module.Resampling.BILINEAR)
        left, top = round((width - size) / 2), round((height - size) / 2)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _pillow() -> Any:
    """The module PIL.Image; it is imported here so that everything else works without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("imagenet_folder: Pillow must be installed (pip install pillow), got no PIL") from error
    return Image
