"""How good a network is on labelled data: top-1 of a classifier, or whatever else is to be measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zsq_ext.quant.graph import leaves

Batches = Callable[[], Iterable[tuple[Tensor, Any]]]
"""Gives an iterable of (images in normalised space (N, C, H, W), what is true of them), afresh at every call."""

Measure = Callable[[nn.Module, Iterable[tuple[Tensor, Any]]], dict[str, float]]
"""From a network and such an iterable to figures in percent by name, such as ``{"AP50": 81.2, "AP": 55.0}``."""


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 accuracy in percent.

    Args:
        model: any image classifier; it is run in eval mode, and has its own modes again afterwards.
        batches: pairs of images (N, C, H, W) in the model's input space and labels (N,).

    Raises:
        TypeError: a batch is not a pair of tensors.
        ValueError: there is no image, a batch does not have one label per image, or the model is no classifier.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"evaluate: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"evaluate: batches must give pairs of tensors (images, labels), got {type(batches).__name__}")
    return measured(model, batches, top1)["top1"]


def top1(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The measure of classifiers: ``{"top1": percent}``."""
    right = total = 0
    for batch in batches:
        images, labels = pair_of(batch)
        logits = model(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"evaluate: model must be a classifier that returns logits (N, K), got {got}")
        right += int((logits.argmax(1) == labels.to(logits.device)).sum())
        total += len(labels)
    if total == 0:
        raise ValueError("evaluate: batches must hold at least one image, got none")
    return {"top1": 100 * right / total}


@torch.no_grad()
def measured(model: nn.Module, batches: Iterable[tuple[Tensor, Any]], measure: Measure = top1) -> dict[str, float]:
    """What a measure finds: the model in eval mode, the images where it is; its modes are its own again afterwards."""
    parameter = next(iter(model.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device

    def there() -> Iterator[tuple[Tensor, Any]]:
        for batch in batches:
            images, truth = images_and_truth(batch)
            yield images.to(device, memory_format=torch.channels_last), truth

    with _in_eval_mode(model):
        return measure(model, there())


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


class Evaluator:
    """Measures a student; a record says on which truth, so that a resumed run mixes no two test sets."""

    def __init__(self, test: Batches, measure: Measure) -> None:
        self._test, self._measure, self.used = test, measure, False

    def __call__(self, student: nn.Module) -> dict[str, Any]:
        self.used = True
        digest = hashlib.sha256()

        def watched() -> Iterator[tuple[Tensor, Any]]:
            for batch in self._test():
                images, truth = images_and_truth(batch)
                for part in leaves(truth).values():
                    digest.update(part.cpu().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
                yield images, truth

        return {**measured(student, watched(), self._measure), "test": digest.hexdigest()[:16]}


def images_and_truth(batch: object) -> tuple[Tensor, Any]:
    """A batch of test data, checked: images (N, C, H, W), and whatever a measure compares the outputs with."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        got = [type(part).__name__ for part in batch] if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"evaluate: batches must give pairs of tensors (images, labels), got {got}")
    if batch[0].ndim != 4:
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in batch]
        raise ValueError(f"evaluate: batches must have shapes (N, C, H, W) and (N,), got {shapes[0]} and {shapes[1]}")
    return batch[0], batch[1]


def pair_of(batch: object) -> tuple[Tensor, Tensor]:
    """A batch of a classifier's test data, checked: images (N, C, H, W) and labels (N,)."""
    images, labels = images_and_truth(batch)
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"evaluate: batches must give pairs of tensors (images, labels), got ['Tensor', {type(labels).__name__!r}]"
        )
    if labels.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"evaluate: batches must have shapes (N, C, H, W) and (N,), got {shapes}")
    return images, labels
