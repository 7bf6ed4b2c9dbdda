"""The networks that ship with the package: teachers trained on textured shapes, a detector on scenes of them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from zsq_ext.zoo import shape_scenes, small_detector, small_nets
from zsq_ext.zoo.adapters import load_checkpoint
from zsq_ext.zoo.textured_shapes import CLASSES

NAMES = ("resnet20", "mobilenet_small")
DETECTORS = ("fpn_small",)
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
    path = _weights("teacher", name, NAMES)
    return load_checkpoint(getattr(small_nets, name)(len(CLASSES)), path, source="native").eval()


def detector(name: str = "fpn_small") -> nn.Module:
    """A trained detector for the embedded scenes; ``small_detector.decode`` makes boxes of what it returns.

    Args:
        name: ``"fpn_small"``.

    Returns:
        The network in eval mode: images in the space of ``shape_scenes.SPEC`` (N, 3, 64, 64) to raw ``Heads``.

    Raises:
        ValueError: the name is unknown, or the weight file is damaged.
        FileNotFoundError: the weight file is not installed.
    """
    path = _weights("detector", name, DETECTORS)
    return load_checkpoint(getattr(small_detector, name)(len(shape_scenes.CLASSES)), path, source="native").eval()


def facts(name: str) -> dict[str, str]:
    """How a teacher or detector was trained and how good it is, from the header of its weight file.

    Args:
        name: as for ``teacher`` or ``detector``.

    Returns:
        ``task``, ``recipe``, and in percent a teacher's top-1 accuracies, ``top1_val`` and ``top1_test``, or a
        detector's ``ap50_val``, ``ap_val``, ``ap50_test`` and ``ap_test``, all as text.

    Raises:
        ValueError: the name is unknown, or the weight file is damaged.
        FileNotFoundError: the weight file is not installed.
    """
    path = _weights("facts", name, NAMES + DETECTORS)
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"facts: {path} must be a complete safetensors file, but: {error}") from error


def _weights(caller: str, name: str, names: tuple[str, ...]) -> Path:
    if name not in names:
        raise ValueError(f"{caller}: name must be one of {', '.join(names)}, got {name!r}")
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        script = "train_detector.py" if name in DETECTORS else "train_teachers.py"
        raise FileNotFoundError(
            f"{caller}: the weights of {name!r} must be at {path}, got no such file; scripts/{script} makes it"
        )
    return path
