"""A run's folder: configuration, checkpoints and results, written so that a kill at any point loses nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG = "config.json"
SECONDS = "seconds.json"

CHECKPOINT_SECONDS = 15.0
"""The least time between two checkpoints of a stage; the environment variable ZSQ_CHECKPOINT_SECONDS overrides it."""


class Run:
    """Where a run keeps what it must not lose.

    Files are safetensors and JSON. Each is written beside its place and moved there in one step, so that a reader
    finds the old file or the new one.

    Args:
        out: the folder, made if missing; None keeps nothing (and nothing can be resumed then).
        config: everything that decides the result, as JSON values. A folder belongs to one configuration.
        resume: continue the run that the folder holds. Without it the folder must not hold one.
        checkpoint_seconds: the least time between two checkpoints of a stage; None takes ``ZSQ_CHECKPOINT_SECONDS``
            from the environment, or 15.
        since: when this call's clock began, by ``time.perf_counter``; now if left out.

    Raises:
        ValueError: the folder cannot be written, holds files but no run, holds a run and ``resume`` is off, holds none
            and it is on, or holds the run of another configuration (naming what differs).
    """

    def __init__(
        self,
        out: str | os.PathLike[str] | None,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        checkpoint_seconds: float | None = None,
        since: float | None = None,
    ) -> None:
        self._since, self._before = time.perf_counter() if since is None else since, 0.0
        self._finished = False
        self.config = json.loads(json.dumps(config, sort_keys=True))
        self.digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]
        self.checkpoint_seconds = _seconds_of_environment() if checkpoint_seconds is None else checkpoint_seconds
        self.folder = Path(out) if out is not None else None
        if self.folder is None:
            if resume:
                raise ValueError("run: resume must come with an out folder, got out=None")
            return
        held = self.folder / CONFIG
        if resume and not held.exists():
            raise ValueError(f"run: resume must find a run to go on with, got none: there is no {held}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(f"run: out must be a folder that can be written, got {self.folder}: {error}") from error
        if held.exists():
            self._check_same(held, resume)
            self._before, self._finished = self._seconds_before()
        else:
            self._check_empty()
            self.write_json(CONFIG, {"digest": self.digest, "config": self.config})

    def _check_empty(self) -> None:
        """A run writes files of fixed names: where there is no run, there must be nothing that they could replace."""
        folder = self.folder or Path()
        others = sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(".partial"))
        if others:
            raise ValueError(
                f"run: out must be a new or empty folder, or hold a run, got {folder} with {', '.join(others[:3])}"
                + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            )

    def _check_same(self, held: Path, resume: bool) -> None:
        try:
            before = json.loads(held.read_text())["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"run: out must hold a readable {CONFIG} or none, got {held}: {error}") from error
        if before != self.config:
            differing = "; ".join(_differences(before, self.config)[:4])
            raise ValueError(
                f"run: out must be a new folder or hold this run, got {self.folder} with another one: {differing}"
            )
        if not resume:
            raise ValueError(
                f"run: out must be a new folder unless the run in it is to go on (resume=True, --resume), "
                f"got {self.folder}"
            )

    @property
    def seconds(self) -> float:
        """The time this run took so far: of this call, and of those before it as far as their work was kept.

        Of a finished run, what it took until it was: to look at it again is no part of it.
        """
        return self._before + (0.0 if self._finished else time.perf_counter() - self._since)

    def finish(self, seconds: float) -> None:
        """Everything is kept, after so many seconds; nothing without a folder."""
        self._before, self._finished = seconds, True
        self.write_json(SECONDS, {"seconds": seconds, "finished": True})

    def _seconds_before(self) -> tuple[float, bool]:
        try:
            kept = json.loads((self.folder or Path()).joinpath(SECONDS).read_text())
            found, finished = float(kept["seconds"]), kept.get("finished") is True
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return 0.0, False  # of a run that was killed before it kept anything
        return (found, finished) if math.isfinite(found) else (0.0, False)

    def path(self, name: str) -> Path | None:
        """The path of a file in the folder, or None without a folder."""
        return None if self.folder is None else self.folder / name

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file, with null for what is not finite; nothing without a folder."""
        if self.folder is not None:
            text = json.dumps(_finite(value), indent=1, allow_nan=False)
            write_atomically(self.folder / name, (text + "\n").encode())

    def save(self, name: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
        """Writes ``<name>.safetensors`` with ``info`` in its header; nothing without a folder."""
        if self.folder is not None:
            save_tensors(self.folder / f"{name}.safetensors", tensors, {"digest": self.digest, **(info or {})})
            if not self._finished:
                self.write_json(SECONDS, {"seconds": self.seconds})

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What ``save`` wrote under that name, or None if there is nothing.

        Raises:
            ValueError: the file is damaged or belongs to another run.
        """
        path = self.path(f"{name}.safetensors")
        if path is None or not path.exists():
            return None
        tensors, info = load_tensors(path)
        if info.get("digest") != self.digest:
            raise ValueError(f"run: {path} must belong to this run, got one of another configuration")
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
    except FileNotFoundError:
        raise ValueError(f"load: path must be an existing file, got {path}") from None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"load: {path} must be a complete safetensors file, but: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"load: {path} is a safetensors file, but not one of zsq_ext's (no header of ours)")
    return tensors, info


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file by new contents such that a kill leaves the old or the new one."""
    # one name per file: what a kill leaves there is overwritten by the next write instead of piling up
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
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


def _seconds_of_environment() -> float:
    text = os.environ.get("ZSQ_CHECKPOINT_SECONDS", "")
    try:
        seconds = float(text) if text else CHECKPOINT_SECONDS
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ValueError(f"run: ZSQ_CHECKPOINT_SECONDS must be a number >= 0, got {text!r}")
    return seconds


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; a reader that follows the standard would refuse the whole file."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            found += _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if before == now else [f"{path} is {before!r} there and {now!r} here"]
