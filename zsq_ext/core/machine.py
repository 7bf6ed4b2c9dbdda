"""What a result depends on besides its configuration: versions, processor, threads, device."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe(device: torch.device | str = "cpu") -> dict[str, str]:
    """The machine and the versions a result was made with, as text; takes no measurable time.

    Args:
        device: where the networks ran.
    """
    device = torch.device(device)
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = {
        "zsq_ext": _version("zsq_ext"),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "safetensors": _version("safetensors"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device.type} ({accelerator})" if accelerator else device.type,
        "processor": cpu_name(),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
    return found


def cpu_name() -> str:
    """The processor's name as it gives it itself, or what the platform knows."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
