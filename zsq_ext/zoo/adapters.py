"""Loading trained weights that somebody else saved: safe readers, and renaming where another library's names differ."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["SOURCES", "load_checkpoint"]

SOURCES = ("auto", "native", "torchvision", "pytorchcv", "pytorchcv_b", "akamaster")

State = dict[str, Tensor]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 3  # names quoted in an error: enough to recognise an architecture, few enough to read

# What torch.load(weights_only=True) raises on truncated or altered files: many more kinds than it documents.
_TORCH_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, AssertionError, MemoryError, OSError, ImportError, struct.error, zipfile.BadZipFile),
)


def load_checkpoint(
    model: nn.Module, path_or_state_dict: str | Path | Mapping[str, Any], source: str = "auto"
) -> nn.Module:
    """Copy trained weights into a model, whatever library saved them.

    Everything is checked before the first value is copied: after an error the model is what it was. Files are read as
    safetensors or with `torch.load(weights_only=True)`, by their content and not by their suffix; no object in a file
    is ever executed. Values are converted to the model's dtypes and devices.

    Args:
        model: the network to fill, in place.
        path_or_state_dict: a .safetensors, .pth or .pt file, or a mapping of names to tensors. A mapping may be wrapped
            (`state_dict`, `model_state_dict`, `model`, `net`) and its names may all carry `module.`, `_orig_mod.` or
            `model.` in front.
        source: where the checkpoint comes from.
            "auto": the model's own names, else the first adapter below that knows the checkpoint's names. Own names
            that are torchvision's count as torchvision's.
            "native": the model's own names, nothing else is checked.
            "torchvision": the model's own names, and bottlenecks must have their stride in the 3x3.
            "pytorchcv": resnet18, resnet50 (stride in the first 1x1) and mobilenetv2_w1 (`expand_first=True`), into the
            networks with torchvision's names. The classifier of mobilenetv2_w1 has no bias: zeros are filled in.
            "pytorchcv_b": the same names where the stride is in the 3x3 (pytorchcv's resnet50b).
            "akamaster": CIFAR ResNets named `conv1`, `layer1.0.conv1`, `linear` or `fc`, into the networks with
            pytorchcv's names. Their shortcuts must be 1x1 projections.

    Returns:
        The same model.

    Raises:
        ValueError: the source is unknown; the file is damaged, foreign or holds more than tensors; names, shapes,
            dtypes or strides do not fit the model; a value is not finite. The message names the file.
        FileNotFoundError: there is no such file.

    Example:
        >>> from zsq_ext.zoo.torchvision_nets import resnet18
        >>> net = load_checkpoint(resnet18(10), {"state_dict": resnet18(10).state_dict()})

    Source: names as in torchvision 0.2x and pytorchcv 0.0.67.
    """
    if source not in SOURCES:
        raise ValueError(f"load_checkpoint: source must be one of {', '.join(SOURCES)}, got {source!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model must be a torch.nn.Module, got {type(model).__name__}")
    target = model.state_dict()
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("load_checkpoint: model must hold real tensors, got one on the meta device")
    if not isinstance(path_or_state_dict, (str, os.PathLike, Mapping)):
        got = type(path_or_state_dict).__name__
        raise TypeError(
            f"load_checkpoint: path_or_state_dict must be a path or a mapping of names to tensors, got {got}"
        )
    if isinstance(path_or_state_dict, Mapping):
        where, content = "the given mapping", path_or_state_dict
    else:
        where, content = f"'{path_or_state_dict}'", _read(Path(path_or_state_dict))
    state = _strip_prefixes(_unwrap(content, where), target)
    state = _adapt(state, model, target, source, where)
    model.load_state_dict(_fit(state, target, type(model).__name__, where))
    return model


def _read(path: Path) -> Any:
    """The content of a safetensors or torch file; which of the two is seen from its first bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: path_or_state_dict must be an existing file, got '{path}'")
    with path.open("rb") as file:
        head = file.read(9)
    # safetensors: the length of the JSON header (8 bytes, little endian), then that header
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        try:
            return load_file(path)
        except (SafetensorError, ValueError, LookupError, RuntimeError, OSError) as error:
            raise _unreadable(path, "safetensors", error) from error
    if head.startswith((b"PK\x03\x04", b"\x80")):
        try:
            _refuse_inflation(path, head)
            with path.open("rb") as file:  # given a name, torch.load would go by its suffix
                return torch.load(file, map_location="cpu", weights_only=True)
        except _TORCH_ERRORS as error:
            raise _unreadable(path, "torch", error) from error
    raise ValueError(
        "load_checkpoint: path_or_state_dict must be a safetensors file or one written by torch.save, "
        f"got '{path}', which begins with {head!r}"
    )


def _refuse_inflation(path: Path, head: bytes) -> None:
    """torch.save stores without compression, so an archive larger inside than outside is not one of its own."""
    if head.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            inside = sum(member.file_size for member in archive.infolist())
        if inside > path.stat().st_size:
            raise ValueError(f"the archive unpacks to {inside} bytes, more than the file has")


def _unreadable(path: Path, kind: str, error: BaseException) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ValueError(
        f"load_checkpoint: path_or_state_dict must be a whole {kind} file that holds only tensors (a state_dict), "
        f"got '{path}': {reason}"
    )


def _unwrap(content: Any, where: str) -> State:
    """Descend through {"state_dict": ...} and its relatives to a mapping of names to tensors."""
    for _ in _WRAPPERS:
        inner = [content[key] for key in _WRAPPERS if isinstance(content, Mapping) and key in content]
        inner = [value for value in inner if isinstance(value, Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not content:
        got = "an empty mapping" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"load_checkpoint: {where} must hold a mapping of names to tensors, got {got}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"load_checkpoint: {where} must hold only tensors under names, got {type(tensor).__name__} at {name!r}"
            )
    return dict(content)


def _strip_prefixes(state: State, target: State) -> State:
    """Remove what a wrapper put in front of every name, unless the model's own names begin like that."""
    found = True
    while found:
        found = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in target):
                state, found = {name.removeprefix(prefix): tensor for name, tensor in state.items()}, True
    return state


def _layout(names: Iterable[str]) -> str | None:
    """Which family of names this is, judged by names that only that family has together."""
    names = set(names)
    signs = {
        "torchvision resnet": ("conv1.weight", "layer1.0.conv1.weight"),
        "torchvision mobilenet_v2": ("features.0.0.weight", "features.1.conv.0.0.weight"),
        "pytorchcv resnet": ("features.init_block.conv.conv.weight", "features.stage1.unit1.body.conv1.conv.weight"),
        "pytorchcv cifar resnet": ("features.init_block.conv.weight", "features.stage1.unit1.body.conv1.conv.weight"),
        "pytorchcv mobilenet_v2": ("features.init_block.conv.weight", "features.stage1.unit1.conv2.conv.weight"),
    }
    return next((layout for layout, needed in signs.items() if names.issuperset(needed)), None)


def _adapt(state: State, model: nn.Module, target: State, source: str, where: str) -> State:
    """Rename the checkpoint to the model's names, and refuse what names and shapes alone would let through."""
    theirs, ours = _layout(state), _layout(target)
    if source == "native":
        return state
    if _without_counters(state) == _without_counters(target):
        if theirs == "torchvision resnet" and source in ("auto", "torchvision") and _strides_in_1x1(model):
            hint = "resnet50() for torchvision's weights, or pass source='native' if these were saved from this model"
            raise ValueError(_stride_message("3x3", hint, where))
        return state
    rename, origin = _RENAMERS.get((theirs, ours), (None, None))
    if rename is None or source not in ("auto", origin, f"{origin}_b"):
        if source in ("auto", "torchvision"):
            return state  # the comparison of names in _fit says what is wrong
        raise ValueError(
            f"load_checkpoint: {where} must have {source} names that {type(model).__name__} can take, "
            f"got {_some(state)} for {_some(target)}"
        )
    if (theirs, ours) == ("pytorchcv resnet", "torchvision resnet") and "layer1.0.conv3.weight" in target:
        if source == "pytorchcv_b" and _strides_in_1x1(model):
            raise ValueError(_stride_message("3x3", "resnet50()", where))
        if source != "pytorchcv_b" and not _strides_in_1x1(model):
            hint = "resnet50(stride_in_1x1=True), or pass source='pytorchcv_b' if this is pytorchcv's resnet50b"
            raise ValueError(_stride_message("first 1x1", hint, where))
    return rename(state, target, where)


def _stride_message(place: str, remedy: str, where: str) -> str:
    return f"load_checkpoint: model must have its stride in the {place} of a bottleneck for {where}; use {remedy}"


def _strides_in_1x1(model: nn.Module) -> bool:
    """Whether the first bottleneck with a stride has it in conv1; also right for torchvision's and timm's classes."""
    modules = dict(model.named_modules())
    first = modules.get("layer2.0.conv1")
    return "layer2.0.conv3" in modules and isinstance(first, nn.Conv2d) and first.stride[0] > 1


def _resnet_from_pytorchcv(state: State, target: State, where: str) -> State:
    stem = {"conv": "conv1", "bn": "bn1"}

    def rename(name: str) -> str:
        if found := re.fullmatch(r"features\.init_block\.conv\.(conv|bn)\.(\w+)", name):
            return f"{stem[found[1]]}.{found[2]}"
        if found := re.fullmatch(r"features\.stage(\d+)\.unit(\d+)\.body\.conv(\d)\.(conv|bn)\.(\w+)", name):
            return f"layer{found[1]}.{int(found[2]) - 1}.{found[4]}{found[3]}.{found[5]}"
        if found := re.fullmatch(r"features\.stage(\d+)\.unit(\d+)\.identity_conv\.(conv|bn)\.(\w+)", name):
            part = {"conv": 0, "bn": 1}[found[3]]
            return f"layer{found[1]}.{int(found[2]) - 1}.downsample.{part}.{found[4]}"
        return re.sub(r"^output\.", "fc.", name)

    return {rename(name): tensor for name, tensor in state.items()}


def _mobilenet_v2_from_pytorchcv(state: State, target: State, where: str) -> State:
    unit_name = re.compile(r"features\.stage(\d+)\.unit(\d+)\.conv([123])\.(conv|bn)\.(\w+)")
    units = sorted({(int(m[1]), int(m[2])) for m in map(unit_name.fullmatch, state) if m})
    number = {unit: index for index, unit in enumerate(units, start=1)}
    expands = "features.stage1.unit1.conv1.conv.weight" in state
    if expands != ("features.1.conv.3.weight" in target):
        raise ValueError(
            f"load_checkpoint: model must be built with mobilenet_v2(expand_first={expands}) for {where}, "
            f"whose first block has {'a' if expands else 'no'} 1x1 expansion"
        )
    edges = {"features.init_block": "features.0", "features.final_block": f"features.{len(units) + 1}"}

    def rename(name: str) -> str:
        if found := unit_name.fullmatch(name):
            unit, layer, part = (int(found[1]), int(found[2])), int(found[3]), {"conv": 0, "bn": 1}[found[4]]
            has_conv1 = number[unit] > 1 or expands
            # conv1 and conv2 are (conv, BN, ReLU6) triples; conv3 is a bare conv and a bare BN
            position = layer - 1 if has_conv1 else layer - 2
            tail = f"{position + part}" if layer == 3 else f"{position}.{part}"
            return f"features.{number[unit]}.conv.{tail}.{found[5]}"
        if found := re.fullmatch(r"(features\.(?:init|final)_block)\.(conv|bn)\.(\w+)", name):
            return f"{edges[found[1]]}.{({'conv': 0, 'bn': 1})[found[2]]}.{found[3]}"
        return re.sub(r"^output\.", "classifier.1.", name)

    renamed = {rename(name): tensor for name, tensor in state.items()}
    weight = renamed.get("classifier.1.weight")
    if weight is not None and weight.shape[2:] == (1, 1):
        # the classifier is a 1x1 convolution without bias on the pooled 1x1 map: a linear layer with bias 0
        renamed["classifier.1.weight"] = weight.flatten(1)
        renamed.setdefault("classifier.1.bias", weight.new_zeros(weight.shape[0]))
    return renamed


def _cifar_resnet_from_akamaster(state: State, target: State, where: str) -> State:
    if not any(".shortcut." in name or ".downsample." in name for name in state):
        raise ValueError(
            f"load_checkpoint: {where} must have 1x1 projection shortcuts (`shortcut.0.weight` or "
            "`downsample.0.weight`), got none: its shortcuts subsample and pad with zeros (option A), "
            "another network than this one"
        )
    edges = {"conv1": "features.init_block.conv", "bn1": "features.init_block.bn", "fc": "output", "linear": "output"}

    def rename(name: str) -> str:
        if found := re.fullmatch(r"layer(\d+)\.(\d+)\.(conv|bn)(\d)\.(\w+)", name):
            unit = f"features.stage{found[1]}.unit{int(found[2]) + 1}"
            return f"{unit}.body.conv{found[4]}.{found[3]}.{found[5]}"
        if found := re.fullmatch(r"layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.([01])\.(\w+)", name):
            unit = f"features.stage{found[1]}.unit{int(found[2]) + 1}"
            return f"{unit}.identity_conv.{('conv', 'bn')[int(found[3])]}.{found[4]}"
        head, _, tail = name.partition(".")
        return f"{edges.get(head, head)}.{tail}"

    return {rename(name): tensor for name, tensor in state.items()}


# (names of the checkpoint, names of the model) -> (how to rename, which `source` that is)
_RENAMERS: dict[tuple[str | None, str | None], tuple[Callable[[State, State, str], State], str]] = {
    ("pytorchcv resnet", "torchvision resnet"): (_resnet_from_pytorchcv, "pytorchcv"),
    ("pytorchcv mobilenet_v2", "torchvision mobilenet_v2"): (_mobilenet_v2_from_pytorchcv, "pytorchcv"),
    ("torchvision resnet", "pytorchcv cifar resnet"): (_cifar_resnet_from_akamaster, "akamaster"),
}


def _fit(state: State, target: State, model_name: str, where: str) -> State:
    """The checkpoint in the model's dtypes, or a ValueError that says what does not fit."""
    missing = [name for name in target if name not in state and not _is_counter(name)]
    unexpected = [name for name in state if name not in target and not _is_counter(name)]
    if missing or unexpected:
        wanted_names = f"the {len(_without_counters(target))} names of {model_name} (or those of a known source)"
        raise ValueError(
            f"load_checkpoint: {where} must have {wanted_names}, got {len(missing)} missing ({_some(missing)}) "
            f"and {len(unexpected)} unexpected ({_some(unexpected)})"
        )
    fitted = {}
    for name, wanted in target.items():
        tensor = state.get(name, wanted)  # only BN's batch counter can be absent; old files lack it
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"load_checkpoint: '{name}' in {where} must have shape {tuple(wanted.shape)}, got {tuple(tensor.shape)}"
            )
        plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not plain or tensor.is_floating_point() != wanted.is_floating_point() or tensor.is_complex():
            kind = tensor.dtype if plain else f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise ValueError(f"load_checkpoint: '{name}' in {where} must be dense {wanted.dtype}, got {kind}")
        fitted[name] = tensor.detach().to(device=wanted.device, dtype=wanted.dtype)
        if wanted.is_floating_point() and not torch.isfinite(fitted[name]).all():
            raise ValueError(f"load_checkpoint: '{name}' in {where} must be finite, got infinity or NaN")
    return fitted


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _without_counters(names: Iterable[str]) -> set[str]:
    return {name for name in names if not _is_counter(name)}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") if names else "none"
