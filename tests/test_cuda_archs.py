"""Every architecture the CUDA kernels are written for compiles without a warning or a spill: no GPU needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="needs nvcc")
def test_every_architecture_compiles_and_has_the_same_machine_code_facts():
    done = subprocess.run(
        [ROOT / "scripts/cuda_archs.sh"], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "without a warning or a spill" in done.stdout
    assert " passed" in done.stdout
