"""Labelled images that somebody has: what all readers of them give.

Shape letters: N images, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from zsq_ext.core.spec import InputSpec


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
