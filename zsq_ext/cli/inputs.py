"""What the options of a command name: a network, its input, test data, ideas."""

from __future__ import annotations

import ast
import importlib.util
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq_ext import api
from zsq_ext.bench.tasks import TASKS, Task, TestSet, task_of
from zsq_ext.core.progress import Progress
from zsq_ext.core.run import load_tensors
from zsq_ext.core.spec import InputSpec
from zsq_ext.methods.job import Images
from zsq_ext.tune.ideas import BY_NAME, Idea
from zsq_ext.zoo import small_detector, small_nets, torchvision_nets
from zsq_ext.zoo.adapters import load_checkpoint
from zsq_ext.zoo.datasets import ImageSet, cifar10, cifar100, imagenet_folder, imagenet_spec

BATCH = 250
"""Test images per forward."""

SMALL: dict[str, Callable[..., nn.Module]] = {
    "resnet20": small_nets.resnet20,
    "resnet56": small_nets.resnet56,
    "mobilenet_small": small_nets.mobilenet_small,
}
"""Networks for 32 x 32 images."""
LARGE: dict[str, Callable[..., nn.Module]] = {
    "resnet18": torchvision_nets.resnet18,
    "resnet50": torchvision_nets.resnet50,
    "mobilenet_v2": torchvision_nets.mobilenet_v2,
    "vgg11_bn": torchvision_nets.vgg11_bn,
    "vgg13_bn": torchvision_nets.vgg13_bn,
    "vgg16_bn": torchvision_nets.vgg16_bn,
}
"""Networks for ImageNet's 224 x 224 images."""
DETECTORS: dict[str, Callable[..., nn.Module]] = {"fpn_small": small_detector.fpn_small}
"""Networks for 64 x 64 images that return raw heads."""
ZOO = {**SMALL, **LARGE, **DETECTORS}


@dataclass(frozen=True)
class Network:
    """A network and what it expects at its input; ``trained`` unless its values are those it was initialised with."""

    name: str
    model: nn.Module
    spec: InputSpec
    trained: bool = True


@dataclass(frozen=True)
class Data:
    """Images to measure on, afresh at every call, and how that is done."""

    name: str
    spec: InputSpec
    count: int
    batches: Callable[[], Iterator[tuple[Tensor, Any]]]
    measure: api.Measure = api.top1


def network(
    text: str,
    *,
    weights: Path | None,
    data: Data | None = None,
    input_shape: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    num_classes: int | None = None,
    needs_weights: bool = True,
) -> Network:
    """The network that ``--model`` and its companions name.

    Args:
        text: an embedded teacher or detector, a network of the zoo, with arguments if it takes any
            (``resnet50(stride_in_1x1=True)``), or ``path.py:function``, a function without arguments that builds one.
        weights: a checkpoint; an embedded teacher comes with its own.
        data: test data; its normalisation is the network's.
        input_shape, mean, std: comma-separated numbers, where no test data says them.
        num_classes: labels; otherwise those of the data, or what the network's own default is.
        needs_weights: refuse a network of the zoo without weights.

    Raises:
        ValueError: an option is missing, malformed or does not fit the others.
    """
    task = task_of(text)
    if weights is None and task is not None and (data is None or data.spec == task.spec):
        _refuse_another_input(text, task, input_shape, mean, std, num_classes)
        return Network(text, task.network(text), task.spec)
    found = re.fullmatch(r"(.+\.py):(\w+)", text)
    name, positional, named = (Path(found[1]).stem, [], {}) if found else parse_call(text, "--model")
    if not found and name not in ZOO:
        raise ValueError(f"--model must be path.py:function or one of {', '.join(ZOO)}, got {text!r}")
    spec = _spec(None if found else name, data, input_shape, mean, std, num_classes)
    if found:
        model = _from_file(Path(found[1]), found[2])
    else:
        if weights is None and needs_weights:
            shipped = ", ".join(f"{' and '.join(own.networks)} on {own.name}" for own in TASKS.values())
            raise ValueError(f"--weights must name a checkpoint for {name}; weights ship only for {shipped}")
        if spec.num_classes is not None:
            named.setdefault("num_classes", spec.num_classes)
        try:
            model = ZOO[name](*positional, **named)
        except TypeError as error:
            raise ValueError(f"--model must fit what {name} takes, got {text!r}: {error}") from error
    if weights is not None:
        try:
            load_checkpoint(model, weights)
        except (ValueError, OSError) as error:
            said = str(error).replace("load_checkpoint: path_or_state_dict", "--weights")
            raise type(error)(said.removeprefix("load_checkpoint: ")) from error
    return Network(name, model.eval(), spec, trained=found is not None or weights is not None)


def data_set(text: str, progress: Progress, limit: int | None = None) -> Data:
    """The test images that ``--data`` names: an embedded task, cifar10:DIR, cifar100:DIR or imagenet:DIR.

    Args:
        text: the option's value.
        progress: where to report, since drawing or reading takes seconds.
        limit: take only the first so many images.

    Raises:
        ValueError: no such data set, or the option is malformed.
        FileNotFoundError: the folder does not hold it.
        ImportError: what measuring on it needs is not installed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--test-images must be at least 1, got {limit}")
    name, _, place = text.partition(":")
    readers: dict[str, Callable[[str], ImageSet]]
    readers = {"cifar10": cifar10, "cifar100": cifar100, "imagenet": imagenet_folder}
    if name in TASKS and not place:
        task = TASKS[name]
        task.require()
        count = min(limit or task.test_images, task.test_images)
        test = TestSet(count, batch=BATCH, on_draw=lambda: progress.say(f"drawing {count} test images"), task=name)
        return Data(name, task.spec, count, test, task.measure)
    if name not in readers or not place:
        known = ", ".join([*TASKS, *(f"{n}:DIR" for n in readers)])
        raise ValueError(f"--data must be one of {known}, got {text!r}")
    images = readers[name](place)
    count = min(limit or len(images), len(images))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, count, BATCH):
            rows = slice(start, min(start + BATCH, count))
            yield images.images(rows), images.labels[rows]

    return Data(name, images.spec, count, batches if count < len(images) else lambda: images.batches(BATCH))


def images(path: Path) -> Images:
    """The image set that ``--images`` names, as ``synthesize`` wrote it.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    try:
        tensors, _ = load_tensors(path)
    except ValueError as error:
        raise ValueError(
            f"--images must be a file that synthesize wrote: {str(error).removeprefix('load: ')}"
        ) from error
    wanted = ["held_out", "held_out_labels", "images", "labels"]
    if sorted(tensors) not in (wanted, ["held_out", "images"]):  # a detector's images have no labels
        raise ValueError(f"--images must hold the tensors {', '.join(wanted)}, got {', '.join(tensors)} in {path}")
    labels, held_out_labels = tensors.get("labels"), tensors.get("held_out_labels")
    return Images(tensors["images"], labels, tensors["held_out"], held_out_labels)


def quantized(path: Path, model: nn.Module) -> nn.Module:
    """The network that ``--quantized`` names, as ``quantize`` wrote it.

    Raises:
        ValueError: the file is missing, damaged, or holds something else, or was made from another architecture.
    """
    try:
        return api.load(path, model)
    except ValueError as error:
        raise ValueError(
            f"--quantized must be a file that quantize wrote for this --model: {str(error).removeprefix('load: ')}"
        ) from error


def watched(data: Data, title: str, progress: Progress) -> Iterator[tuple[Tensor, Any]]:
    """The test batches once, with a progress bar."""
    with progress.stage(title, data.count) as stage:
        for images, truth in data.batches():
            yield images, truth
            stage.advance(len(images))


def idea(text: str) -> Idea:
    """An idea as people write it, ``LowPass(d0=8)``: a known name and literal arguments, nothing is executed.

    Raises:
        ValueError: it is something else, or its arguments are not that idea's.
    """
    name, positional, named = parse_call(text, "--idea")
    if name not in BY_NAME:
        raise ValueError(f"--idea must be one of {', '.join(BY_NAME)}, got {text!r}")
    kind: Callable[..., Idea] = BY_NAME[name]
    try:
        return kind(*positional, **named)
    except TypeError as error:
        fields = ", ".join(BY_NAME[name].__dataclass_fields__)
        raise ValueError(f"--idea {name} must get {fields} in their types, got {text!r}: {error}") from error


def parse_call(text: str, option: str) -> tuple[str, list[Any], dict[str, Any]]:
    """``Name`` or ``Name(1, key=2)`` as (name, arguments, named arguments); arguments are literals.

    Raises:
        ValueError: the text is anything else, naming the option.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, [], {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            named = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords if word.arg is not None}
            if len(named) == len(node.keywords):
                return node.func.id, [ast.literal_eval(argument) for argument in node.args], named
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ast gives up on nesting with the last two
        pass
    raise ValueError(f"{option} must be a name, with literal arguments in parentheses if any, got {text[:80]!r}")


def bits(text: str, option: str) -> int:
    """A number of bits; that it is one of 2 to 8 is for ``QConfig`` to say."""
    try:
        return int(text)
    except ValueError:
        or_none = " or none" if option == "--a-bits" else ""
        raise ValueError(f"{option} must be an integer from 2 to 8{or_none}, got {text!r}") from None


def device(text: str | None) -> torch.device:
    """A device that works here: the GPU if one is visible, unless another is named.

    Raises:
        ValueError: torch cannot use it, with the reason.
    """
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a device
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be one that torch can use here, got {text!r}: {reason}") from error


def _refuse_another_input(
    name: str, task: Task, input_shape: str | None, mean: str | None, std: str | None, num_classes: int | None
) -> None:
    """An embedded network's input is known; options may repeat it, not change it."""
    spec = task.spec
    wanted = {
        "--input-shape": (input_shape, spec.shape),
        "--mean": (mean, spec.mean),
        "--std": (std, spec.std),
        "--num-classes": (None if num_classes is None else str(num_classes), (spec.num_classes,)),
    }
    for option, (given, known) in wanted.items():
        if given is not None and _numbers(given, option, float) != known:
            expected = ",".join(map(str, known))
            raise ValueError(f"{option} must be {expected} for the embedded {name}, got {given}")


def _spec(
    name: str | None,
    data: Data | None,
    input_shape: str | None,
    mean: str | None,
    std: str | None,
    num_classes: int | None,
) -> InputSpec:
    given = input_shape is not None or mean is not None or std is not None
    if data is not None:
        if given:
            raise ValueError(f"--input-shape, --mean and --std must be left out with --data, which is {data.name}'s")
        spec = data.spec
    elif input_shape is None and name in LARGE and not given:
        spec = imagenet_spec
        num_classes = num_classes or spec.num_classes
    else:
        side = 32 if name in SMALL else 64 if name in DETECTORS else None
        if input_shape is None and side is None:
            raise ValueError("--input-shape must be given where no --data says it, such as 3,32,32")
        shape = (3, side, side) if input_shape is None else _numbers(input_shape, "--input-shape", int)
        spec = InputSpec(
            shape,
            mean=_numbers(mean, "--mean", float) if mean is not None else (),
            std=_numbers(std, "--std", float) if std is not None else (),
            valid_range=(0.0, 1.0) if mean is not None or std is not None else None,
        )
    classes = num_classes if num_classes is not None else spec.num_classes
    return InputSpec(spec.shape, spec.mean, spec.std, spec.valid_range, classes)


def _numbers(text: str, option: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        example = "3,32,32" if kind is int else "0.5,0.5,0.5"
        raise ValueError(f"{option} must be numbers such as {example}, got {text!r}") from None


@contextmanager
def _users_code(path: Path) -> Iterator[None]:
    """An error in the user's own file is one line that says where in it; `zsq --debug` shows the traceback."""
    try:
        yield
    except Exception as error:  # whatever the user's code raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        at = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = path if at is None else f"line {at} of {path}"
        raise ValueError(
            f"--model must name a function that runs, got {type(error).__name__} in {where}: {error} "
            "(zsq --debug shows all of it)"
        ) from error


def _from_file(path: Path, function: str) -> nn.Module:
    """What a function in the user's own file builds; the file is run, as it would be by importing it."""
    if not path.is_file():
        raise FileNotFoundError(f"--model must name an existing file, got {path}")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"--model must name a Python file, got {path}")
    module = importlib.util.module_from_spec(module_spec)
    with _users_code(path):
        module_spec.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        raise ValueError(f"--model must name a function of {path}, got {function!r}")
    with _users_code(path):
        model = build()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model must name a function that returns a torch.nn.Module, got {type(model).__name__}")
    return model
