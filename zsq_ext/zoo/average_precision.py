"""Average precision of detections, as COCO counts it, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zsq_ext.zoo.shape_scenes import Objects
from zsq_ext.zoo.small_detector import Detections, Heads, decode


@torch.no_grad()
def precision_of(network: Callable[[Tensor], Heads], batches: Iterable[tuple[Tensor, Objects]]) -> dict[str, float]:
    """AP of a detector, float or quantized, in eval mode, on batches such as ``ShapeScenes("test").batches(1000)``.

    Args:
        network: images (N, C, H, W) to raw heads, such as ``teachers.detector()``.
        batches: images on the network's device and in its space, and what is in them; at least one batch.

    Returns:
        As ``average_precision``.

    Raises:
        ImportError: as ``average_precision``.
        ValueError: as ``average_precision``, there is no batch, or the network returns something else.
    """
    pycocotools()  # before anything is computed for it
    found, truth = [], []
    for images, objects in batches:
        heads = network(images)
        if not isinstance(heads, dict) or heads.keys() != {"classes", "boxes"}:
            got = list(heads) if isinstance(heads, dict) else type(heads).__name__
            raise ValueError(f"precision_of: network must return a dict of 'classes' and 'boxes', got {got}")
        found += decode(heads, (images.shape[2], images.shape[3]))
        truth.append(objects)
    if not truth:
        raise ValueError("precision_of: batches must hold at least one batch, got none")
    return average_precision(found, Objects(*(torch.cat(part) for part in zip(*truth, strict=True))))


def average_precision(found: Sequence[Detections], truth: Objects) -> dict[str, float]:
    """AP at an overlap of 0.5, and averaged over the overlaps 0.50, 0.55, ... 0.95, over all classes that occur.

    Args:
        found: one entry per image; at most 100 detections of an image count, the surest.
        truth: what is in the same images, a row each.

    Returns:
        ``{"AP50": percent, "AP": percent}``.

    Raises:
        ImportError: pycocotools is not installed.
        ValueError: the numbers of images differ, or there is no object to find.
    """
    coco, coco_eval = pycocotools()
    if len(found) != len(truth.boxes):
        raise ValueError(
            f"average_precision: found must have an entry per image, got {len(found)} for {len(truth.boxes)} images"
        )
    objects = [
        {"image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for image, (boxes, labels) in enumerate(zip(truth.boxes, truth.labels, strict=True))
        for box, label in zip(_width_and_height(boxes), labels.tolist(), strict=True)
        if label >= 0
    ]
    if not objects:
        raise ValueError("average_precision: truth must hold at least one object, got none")
    results = [
        {"image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "score": score}
        for image, one in enumerate(found)
        for box, label, score in zip(
            _width_and_height(one.boxes), one.labels.tolist(), one.scores.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it narrates
        expected, got = coco(), coco()
        for data, annotations in ((expected, objects), (got, results)):
            data.dataset = {
                "images": [{"id": image} for image in range(len(found))],
                "categories": [{"id": label} for label in sorted({row["category_id"] for row in objects})],
                "annotations": [{"id": number, **row} for number, row in enumerate(annotations, 1)],
            }
            data.createIndex()
        evaluation = coco_eval(expected, got, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"AP50": 100 * float(evaluation.stats[1]), "AP": 100 * float(evaluation.stats[0])}


def pycocotools() -> tuple[Any, Any]:
    """What counts: the classes ``COCO`` and ``COCOeval``.

    Raises:
        ImportError: pycocotools is not installed, with the command that installs it.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError(
            'average_precision: pycocotools must be installed: pip install "zsq_ext[detection]"'
        ) from error
    return COCO, COCOeval


def _width_and_height(boxes: Tensor) -> list[list[float]]:
    """COCO writes a box as x, y, width, height."""
    return [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes.tolist()]
