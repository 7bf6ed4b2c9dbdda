"""CIFAR-10 and CIFAR-100 as distributed: a folder or an archive, in the python format or the binary one.

The python format is pickles, which are read as what they may hold and never as what they ask for.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq_ext.core.spec import InputSpec
from zsq_ext.zoo.image_set import ImageSet

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
