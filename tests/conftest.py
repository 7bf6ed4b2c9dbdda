"""What all tests share: how a missing backend is treated, and the devices and backends there are."""

import os

import pytest
import torch

# Without a GPU the Triton kernels run interpreted, on CPU tensors. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from zsq_ext.ops import backend

REQUIRED = [name for name in os.environ.get("ZSQ_REQUIRE", "").split(",") if name]

# Where each backend's tests run: the CUDA device if there is one, except for the CPU's own backend.
_GPU_OR_CPU = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE_OF = {"reference": _GPU_OR_CPU, "cpu": "cpu", "cuda": "cuda", "triton": _GPU_OR_CPU}


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


@pytest.fixture(params=[name for name in backend.NAMES if name != "reference"])
def fast(request):
    """(backend, device) for each backend but the reference. A missing one is skipped, unless ZSQ_REQUIRE names it."""
    name = request.param
    reason = backend.missing(name)
    if reason is not None:
        if name in REQUIRED:
            pytest.fail(f"ZSQ_REQUIRE names {name}, but {reason}")
        pytest.skip(f"{name}: {reason}")
    return name, DEVICE_OF[name]


@pytest.fixture
def poison():
    """Fills uninitialised memory with NaN, in C++ too, so that an element a kernel forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
