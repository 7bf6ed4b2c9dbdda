"""ImageNet-style validation images as a folder of folders, decoded when they are asked for."""

from __future__ import annotations

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
from zsq_ext.zoo.image_set import ImageSet

imagenet_spec = InputSpec(
    shape=(3, 224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    valid_range=(0.0, 1.0),
    num_classes=1000,
)


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
