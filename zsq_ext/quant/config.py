"""What is quantized, to how many bits, and how ranges are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PLACEMENTS = ("after_relu", "all_layers", "academic")
ACTIVATION_RANGES = ("ema", "legacy_ema", "minmax", "lp")
WEIGHT_RANGES = ("minmax", "lp")


@dataclass(frozen=True)
class QConfig:
    """Bits per site and the rules that place the sites.

    Args:
        w_bits: bits of the weights, 2 to 8.
        a_bits: bits of the activations, 2 to 8; None quantizes weights only.
        placement: ``"after_relu"``: behind every activation function and nowhere else (the ZeroQ, GDFQ, SynQ lineage:
            the image, the pooled features and linear bottlenecks stay float). ``"all_layers"``: what leaves every
            layer, the additions and the outputs, as integer hardware needs it, and the image, which comes as bytes, to
            8 bits. ``"academic"``: what leaves a layer or an addition and enters another layer, neither the image nor
            the outputs, nor a branch before the addition that ends it, nor averages: with 8 ``edge_bits`` the setting
            of BRECQ's and Genie's tables.
        edge_bits: bits of the first and last layer (weights, the last layer's input, with ``"all_layers"`` the
            outputs, and with ``"academic"`` the first layer's output); None gives them the same bits as all others. A
            last layer is one that no other layer follows: in a network with several heads each head has its own.
        sites: bits of single sites by name, over everything above. Names as ``prepare`` reports them.
        a_range: how an activation's range follows the batches. ``"ema"``: bias-corrected moving average of the
            extremes; ``"legacy_ema"``: the released recursion, for parity; ``"minmax"``: running extremes (ZeroQ);
            ``"lp"``: moving average of the range with the smallest L2.4 error.
        w_range: ``"minmax"``: live extremes per output channel at every forward; ``"lp"``: the range with the smallest
            L2.4 error, searched once when the network is prepared.
        beta: memory of the moving average per batch, in [0, 1).

    Raises:
        ValueError: a field is out of its range, naming it.
    """

    w_bits: int
    a_bits: int | None
    placement: str = "after_relu"
    edge_bits: int | None = None
    sites: Mapping[str, int] = field(default_factory=dict)
    a_range: str = "ema"
    w_range: str = "minmax"
    beta: float = 0.9

    def __post_init__(self) -> None:
        _check_bits("w_bits", self.w_bits)
        if self.a_bits is not None:
            _check_bits("a_bits", self.a_bits)
        if self.edge_bits is not None:
            _check_bits("edge_bits", self.edge_bits)
        if not isinstance(self.sites, Mapping):
            raise ValueError(f"QConfig: sites must map names to bits, got {self.sites!r}")
        for name, bits in self.sites.items():
            _check_bits(f"sites[{name!r}]", bits)
        for name, allowed in (
            ("placement", PLACEMENTS),
            ("a_range", ACTIVATION_RANGES),
            ("w_range", WEIGHT_RANGES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"QConfig: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not isinstance(self.beta, (int, float)) or not 0 <= self.beta < 1:
            raise ValueError(f"QConfig: beta must be in [0, 1), got {self.beta!r}")
        object.__setattr__(self, "sites", dict(self.sites))

    @property
    def label(self) -> str:
        """Such as ``"W4A4"`` or ``"W4"``."""
        return f"W{self.w_bits}" + (f"A{self.a_bits}" if self.a_bits is not None else "")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QConfig:
        return cls(**values)


def _check_bits(name: str, bits: object) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"QConfig: {name} must be an integer from 2 to 8, got {bits!r}")
