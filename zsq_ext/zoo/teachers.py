"""The teachers that ship with the package: small networks trained on the embedded task, textured shapes."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from zsq_ext.zoo import small_nets
from zsq_ext.zoo.adapters import load_checkpoint
from zsq_ext.zoo.textured_shapes import CLASSES

NAMES = ("resnet20", "mobilenet_small")
WEIGHTS = Path(__file__).parent / "weights"


def teacher(name: str) -> nn.Module:
    """A trained network for the embedded task.

    Args:
        name: ``"resnet20"`` or ``"mobilenet_small"``.

    Returns:
        The network in eval mode: images in the space of ``textured_shapes.SPEC`` (N, 3, 32, 32) to logits (N, 40).

    Raises:
        ValueError: the name is unknown, or the weight file is damaged.
        FileNotFoundError: the weight file is not installed.
    """
    path = _weights(name)
    return load_checkpoint(getattr(small_nets, name)(len(CLASSES)), path, source="native").eval()


def facts(name: str) -> dict[str, str]:
    """How a teacher was trained and how good it is, from the header of its weight file.

    Args:
        name: as for ``teacher``.

    Returns:
        ``task``, ``recipe``, and top-1 accuracies in percent, ``top1_val`` and ``top1_test``, all as text.

    Raises:
        ValueError: the name is unknown, or the weight file is damaged.
        FileNotFoundError: the weight file is not installed.
    """
    path = _weights(name)
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"facts: {path} must be a complete safetensors file, but: {error}") from error


def _weights(name: str) -> Path:
    if name not in NAMES:
        raise ValueError(f"teacher: name must be one of {', '.join(NAMES)}, got {name!r}")
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"teacher: the weights of {name!r} must be at {path}, got no such file; scripts/train_teachers.py makes it"
        )
    return path
