"""What the wheel and the source archive hold, and that the wheel works on its own."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a commit of the working tree would hold, so that building leaves no trace in it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    copy = tmp_path_factory.mktemp("tree")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    """(wheel, sdist). Without CUDA and unoptimised: neither says anything about contents, and both take a minute."""
    out = tmp_path_factory.mktemp("dist")
    compiler = out.parent / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    code = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    env = {**os.environ, "ZSQ_CUDA": "OFF", "CXX": str(compiler)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_wheel_contents(built, tree):
    names = set(zipfile.ZipFile(built[0]).namelist())
    for path in tree.glob("kernels/*.py"):
        assert f"zsq_ext/kernels/{path.name}" in names
    for path in tree.glob("zsq_ext/**/*"):
        if path.suffix in (".py", ".safetensors", ".typed"):
            assert str(path.relative_to(tree)) in names
    assert [name for name in names if name.startswith("zsq_ext/_C.") and name.endswith(".so")]
    assert [name for name in names if name.endswith("LICENSE")]
    tops = {name.split("/")[0] for name in names}
    assert all(top == "zsq_ext" or top.endswith(".dist-info") for top in tops), tops


def test_sdist_contents(built, tree):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ["CMakeLists.txt", "setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md"]
    for pattern in ("csrc/**/*.*", "kernels/*.*", "zsq_ext/**/*.py", "tests/*.py"):
        needed += [str(path.relative_to(tree)) for path in tree.glob(pattern)]
    missing = [name for name in needed if name not in names and "__pycache__" not in name]
    assert not missing, missing
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def test_the_wheel_works_alone(built, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, str(built[0])], check=True, timeout=120)
    code = f"""
import torch, zsq_ext, zsq_ext.kernels
assert zsq_ext.__file__.startswith({str(tmp_path)!r}), zsq_ext.__file__
assert zsq_ext.kernels.__file__.startswith({str(tmp_path)!r})
with zsq_ext.backend("cpu"):
    out = zsq_ext.ops.fake_quant(torch.tensor([0.3, 9.0]), torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, 7)
assert out.tolist() == [0.0, 7.0]
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path, timeout=120)
