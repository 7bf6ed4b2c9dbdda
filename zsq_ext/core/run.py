"""A run's folder: configuration, checkpoints and results, written so that a kill at any point loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG = "config.json"


class Run:
    """Where a run keeps what it must not lose.

    Files are safetensors and JSON. Each is written beside its place and moved there in one step, so that a reader
    finds the old file or the new one.

    Args:
        out: the folder, made if missing; None keeps nothing (and nothing can be resumed then).
        config: everything that decides the result, as JSON values. A folder belongs to one configuration.
        resume: continue what the folder holds. Without it the folder must not hold a run.
        checkpoint_seconds: the least time between two checkpoints of a stage.

    Raises:
        ValueError: the folder cannot be written, holds a run and ``resume`` is off, or holds the run of another
            configuration (naming what differs).
    """

    def __init__(
        self,
        out: str | os.PathLike[str] | None,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        checkpoint_seconds: float = 15.0,
    ) -> None:
        self.config = json.loads(json.dumps(config, sort_keys=True))
        self.digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]
        self.checkpoint_seconds = checkpoint_seconds
        self.folder = Path(out) if out is not None else None
        if self.folder is None:
            if resume:
                raise ValueError("run: resume needs an out folder, got out=None")
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(f"run: out must be a folder that can be written, got {self.folder}: {error}") from error
        held = self.folder / CONFIG
        if held.exists():
            self._check_same(held, resume)
        else:
            self.write_json(CONFIG, {"digest": self.digest, "config": self.config})

    def _check_same(self, held: Path, resume: bool) -> None:
        try:
            before = json.loads(held.read_text())["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"run: {held} must be a run's configuration, but cannot be read: {error}") from error
        if before != self.config:
            differing = sorted(_differences(before, self.config))
            raise ValueError(f"run: {self.folder} holds a run of another configuration; {'; '.join(differing[:4])}")
        if not resume:
            raise ValueError(f"run: {self.folder} already holds this run; pass resume=True to continue it")

    def path(self, name: str) -> Path | None:
        """The path of a file in the folder, or None without a folder."""
        return None if self.folder is None else self.folder / name

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file; nothing without a folder."""
        if self.folder is not None:
            write_atomically(self.folder / name, (json.dumps(value, indent=1) + "\n").encode())

    def save(self, name: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
        """Writes ``<name>.safetensors`` with ``info`` in its header; nothing without a folder."""
        if self.folder is not None:
            save_tensors(self.folder / f"{name}.safetensors", tensors, {"digest": self.digest, **(info or {})})

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What ``save`` wrote under that name, or None if there is nothing."""
        path = self.path(f"{name}.safetensors")
        if path is None or not path.exists():
            return None
        tensors, info = load_tensors(path)
        if info.get("digest") != self.digest:
            raise ValueError(f"run: {path} belongs to another configuration")
        return tensors, info

    def remove(self, name: str) -> None:
        """Removes what ``save`` wrote under that name, if anything."""
        path = self.path(f"{name}.safetensors")
        if path is not None:
            path.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON header as one safetensors file, atomically."""
    from safetensors.torch import save

    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(plain, metadata={"info": json.dumps(info)}))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what ``save_tensors`` wrote.

    Raises:
        ValueError: the file is missing, truncated or not ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            info = json.loads((file.metadata() or {}).get("info", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"load: {path} must be a complete safetensors file, but: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"load: {path} is a safetensors file, but not one of zsq_ext's (no header of ours)")
    return tensors, info


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file by new contents such that a kill leaves the old or the new one."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short digest of names, shapes and values: the same weights give the same word."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if value.numel():
            digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            found += _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if before == now else [f"{path} is {before!r} there and {now!r} here"]
