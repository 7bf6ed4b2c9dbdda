"""The house's rules: imports point down, torch stops at zsq_ext/, and the ops load alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# room of zsq_ext -> its floor. A room imports from itself and from lower floors.
FLOOR = {
    "core": 0,
    "ops": 0,
    "_C": -1,
    "kernels": -1,
    "zoo": 1,
    "quant": 1,
    "synth": 2,
    "tune": 3,
    "methods": 4,
    "export": 5,
    "report": 5,
    "api": 6,
    "bench": 7,
    "cli": 8,
}
# Rooms that may see less than everything below them.
ONLY = {"core": set(), "ops": {"_C", "kernels"}, "zoo": {"core"}}
# Only the ops know device code.
BELOW = {"_C", "kernels"}


def imports_of(source, package):
    """The full names of all modules a source imports, inside functions too and relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            names |= {f"{base}.{alias.name}" for alias in node.names} | {base}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def room_of(name):
    """The room a full module name belongs to, or None outside zsq_ext."""
    parts = name.split(".")
    return parts[1] if parts[0] == "zsq_ext" and len(parts) > 1 else None


def violations(room, source, package):
    for name in sorted(imports_of(source, package)):
        other = room_of(name)
        if other is None or other == room or other not in FLOOR:
            continue
        allowed = other in ONLY[room] if room in ONLY else FLOOR[other] < FLOOR[room] and other not in BELOW
        if not allowed:
            yield f"{room} imports {name}"


def test_imports_point_down():
    found = []
    for path in sorted((ROOT / "zsq_ext").rglob("*.py")):
        parts = path.relative_to(ROOT / "zsq_ext").with_suffix("").parts
        if parts == ("__init__",):
            continue  # the lobby: it names every room and enters none
        assert parts[0] in FLOOR, f"{path} is in no room of this table"
        package = ".".join(["zsq_ext", *parts[:-1]])
        found += [f"{path.relative_to(ROOT)}: {text}" for text in violations(parts[0], path.read_text(), package)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("quant", "import zsq_ext.synth.pixels"),
        ("quant", "def f():\n    from zsq_ext import methods"),
        ("tune", "from ..methods import synq"),
        ("zoo", "from zsq_ext.ops import fake_quant"),
        ("ops", "from zsq_ext.core import rng"),
        ("synth", "import zsq_ext._C"),
        ("methods", "import importlib\nimportlib.import_module('zsq_ext.api')"),
    ],
)
def test_the_rule_sees_a_violation(room, source):
    assert list(violations(room, source, f"zsq_ext.{room}"))


def test_device_code_never_imports_torch():
    for path in (ROOT / "kernels").rglob("*.py"):
        names = imports_of(path.read_text(), "zsq_ext.kernels")
        assert not [name for name in names if name.split(".")[0] == "torch"], path
        assert not [name for name in names if room_of(name) not in (None, "kernels")], path
    native = [*(ROOT / "csrc").rglob("*"), *(ROOT / "kernels").rglob("*")]
    for path in native:
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
            assert not [line for line in includes if "torch" in line or "ATen" in line or "c10" in line], path


@pytest.mark.parametrize("module", ["zsq_ext", "zsq_ext.ops"])
def test_ops_need_only_torch_and_numpy(module):
    code = f"""
import sys
import {module}
heavy = {{"rich", "typer", "safetensors", "triton", "matplotlib", "onnx"}} & set(sys.modules)
assert not heavy, heavy
if {module!r} == "zsq_ext":
    assert "torch" not in sys.modules
    assert "zsq_ext.ops" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_one_call_needs_only_torch_and_numpy():
    code = """
import sys, torch, zsq_ext
zsq_ext.ops.fake_quant(torch.randn(4), torch.ones(1), torch.zeros(1, dtype=torch.int32), -8, 7)
heavy = {"rich", "typer", "safetensors", "triton", "matplotlib", "onnx"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_resolve_or_are_unknown():
    import zsq_ext

    assert zsq_ext.backend.__module__ == "zsq_ext.ops.backend"
    assert {"quantize", "load", "evaluate", "synthesize", "InputSpec", "Result", "ops"} <= set(dir(zsq_ext))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zsq_ext.nothing
