"""What a network expects at its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class InputSpec:
    """Shape, normalisation and label count of a network's input.

    A network sees ``(pixels - mean) / std`` with pixels in ``valid_range``. Normalisation belongs to the input, so
    that limits in image space, PNG files and data loaders all agree.

    Args:
        shape: (channels, height, width), each >= 1.
        mean: per-channel mean in pixel units, one value per channel. Default: zeros.
        std: per-channel standard deviation in pixel units, > 0, one value per channel. Default: ones.
        valid_range: (lowest, highest) pixel value, or None if unknown (nothing is clipped or scaled then).
        num_classes: number of labels, or None to read it off the network's output.

    Raises:
        ValueError: a field is out of its range, naming it.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    valid_range: tuple[float, float] | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.shape)
        if len(shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in shape):
            raise ValueError(f"InputSpec: shape must be three positive integers (C, H, W), got {self.shape!r}")
        set_ = object.__setattr__
        set_(self, "shape", shape)
        set_(self, "mean", _per_channel("mean", self.mean, shape[0], 0.0))
        set_(self, "std", _per_channel("std", self.std, shape[0], 1.0))
        if min(self.std) <= 0:
            raise ValueError(f"InputSpec: std must be > 0 in every channel, got {self.std!r}")
        if self.valid_range is not None:
            low, high = map(float, self.valid_range)
            if not low < high:
                raise ValueError(
                    f"InputSpec: valid_range must be (low, high) with low < high, got {self.valid_range!r}"
                )
            set_(self, "valid_range", (low, high))
        if self.num_classes is not None and (not isinstance(self.num_classes, int) or self.num_classes < 2):
            raise ValueError(f"InputSpec: num_classes must be an integer >= 2, got {self.num_classes!r}")

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (N, C, H, W), float, in ``valid_range`` units, to the space the network sees."""
        mean, std = self._constants(pixels)
        return (pixels - mean) / std

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`normalise`."""
        mean, std = self._constants(x)
        return x * std + mean

    def _constants(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.tensor(self.mean, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
        return mean, std

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputSpec:
        fields = dict(values)
        for name in ("shape", "mean", "std", "valid_range"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        return cls(**fields)


def _per_channel(name: str, values: Sequence[float], channels: int, default: float) -> tuple[float, ...]:
    values = tuple(float(v) for v in values) or (default,) * channels
    if len(values) != channels:
        raise ValueError(f"InputSpec: {name} must have one value per channel ({channels}), got {values!r}")
    return values
