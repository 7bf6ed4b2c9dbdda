"""One tensor per image, for a whole image set: in memory while there is room, else in a file that is mapped."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


class Rows:
    """What one node of a network yields for every image, in the order of the images.

    Images come and go in channels-last memory, as the networks want them.

    Args:
        data: (N, ...), the values; kept, not copied.
        device: where batches are handed out.
    """

    def __init__(self, data: Tensor, device: torch.device) -> None:
        self.image = data.ndim == 4
        self._data = data.permute(0, 2, 3, 1) if self.image else data
        self.device = device

    def __len__(self) -> int:
        return len(self._data)

    @property
    def nbytes(self) -> int:
        return self._data.numel() * self._data.element_size()

    @property
    def mapped(self) -> bool:
        """Whether the values are in a file."""
        return self._data.untyped_storage().is_shared() and self._data.device.type == "cpu"

    def __getitem__(self, chosen: Tensor | slice) -> Tensor:
        """The rows of some images, chosen by a range or by indices (B,) on the host, on the device."""
        if isinstance(chosen, Tensor):
            chosen = chosen.to(self._data.device, non_blocking=True)
        found = self._data[chosen].to(self.device, non_blocking=True)
        return found.permute(0, 3, 1, 2) if self.image else found

    def __setitem__(self, chosen: slice, values: Tensor) -> None:
        self._data[chosen] = values.permute(0, 2, 3, 1) if self.image else values

    def chunks(self, size: int) -> Iterator[slice]:
        """The ranges of all images, ``size`` at a time."""
        return (slice(begin, min(begin + size, len(self))) for begin in range(0, len(self), size))


class Room:
    """Makes ``Rows`` within a budget of memory, and beyond it in files.

    A file loses its name as soon as it is mapped, so that nothing is left behind, whatever ends the process.

    Args:
        budget: bytes that all living rows of this room together may take on the device.
        folder: where files go; None for the system's folder of temporary files.
    """

    def __init__(self, budget: int, folder: Path | None) -> None:
        self.budget, self.folder = budget, folder
        self._living: weakref.WeakSet[Rows] = weakref.WeakSet()

    def like(self, count: int, sample: Tensor) -> Rows:
        """Rows for ``count`` images, each shaped as a row of ``sample``, not yet written.

        Raises:
            OSError: there is no room for the file either.
        """
        shape = count, *sample.shape[1:]
        needed = count * sample[0].numel() * sample.element_size()
        taken = sum(rows.nbytes for rows in self._living)
        if taken + needed <= self.budget:
            layout = torch.channels_last if sample.ndim == 4 else torch.contiguous_format
            rows = Rows(
                torch.empty(shape, dtype=sample.dtype, device=sample.device, memory_format=layout), sample.device
            )
            self._living.add(rows)
            return rows
        flat = self._file(needed, sample.dtype)
        if sample.ndim == 4:
            n, c, h, w = shape
            return Rows(flat.view(n, h, w, c).permute(0, 3, 1, 2), sample.device)
        return Rows(flat.view(shape), sample.device)

    def _file(self, size: int, dtype: torch.dtype) -> Tensor:
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="activations-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))  # a full disk says so here, not by a signal later
            except OSError as error:
                raise OSError(
                    f"reconstruct: {Path(file.name).parent} must have room for {size / 2**20:.0f} MiB of activations, "
                    f"or cache_bytes be larger: {error.strerror}"
                ) from error
            return torch.from_file(file.name, shared=True, size=size // dtype.itemsize, dtype=dtype)
