"""Who runs an op: a forced backend is honoured or raises, auto may fall back, and reasons are given."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import zsq_ext
from zsq_ext import ops
from zsq_ext.cli import app
from zsq_ext.ops import backend, fake_quant, native, reference

ARGS = torch.randn(6), torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32), -8, 7


@pytest.fixture
def fresh():
    """Forgets what was found out about the machine, before and after."""

    def forget():
        backend.missing.cache_clear()
        backend.find.cache_clear()

    forget()
    yield
    forget()


def test_required_backends_are_here():
    from os import environ

    for name in filter(None, environ.get("ZSQ_REQUIRE", "").split(",")):
        assert backend.missing(name) is None, f"ZSQ_REQUIRE names {name}, but {backend.missing(name)}"


def test_backends_lists_all_with_reasons():
    found = zsq_ext.backends()
    assert list(found) == ["reference", "cpu", "cuda", "triton"]
    assert found["reference"] is None
    assert all(reason is None or reason for reason in found.values())


def test_forced_runs_that_backend(monkeypatch, fresh):
    calls = []
    monkeypatch.setattr(reference, "fake_quant", lambda x, *grid: calls.append(1) or x.clone())
    with backend.backend("reference"):
        fake_quant(*ARGS)
    assert calls == [1]


def test_forced_never_falls_back(monkeypatch, fresh):
    monkeypatch.setattr(native, "problem", "the native module does not load (it was never built)")
    with backend.backend("cpu"), pytest.raises(NotImplementedError) as raised:
        fake_quant(*ARGS)
    assert str(raised.value) == (
        "fake_quant: no backend for float32 on cpu under 'cpu' "
        "(cpu: the native module does not load (it was never built))"
    )


def test_auto_falls_back(monkeypatch, fresh):
    monkeypatch.setattr(native, "problem", "never built")
    with backend.backend("auto"):
        assert backend.find("fake_quant", "cpu", torch.float32, "auto") is reference.fake_quant
        assert torch.equal(fake_quant(*ARGS), reference.fake_quant(*ARGS))


def test_an_op_a_backend_does_not_have(fresh):
    with pytest.raises(NotImplementedError, match="reference: has no no_such_op"):
        backend.find("no_such_op", "cpu", torch.float32, "reference")


def test_blocks_nest_and_end_with_an_error():
    outside = backend.choice()
    with backend.backend("reference"):
        with pytest.raises(NotImplementedError), backend.backend("cuda"):
            fake_quant(*ARGS)
        assert backend.choice() == "reference"
    assert backend.choice() == outside


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="must be one of auto, reference, cpu, cuda, triton, got 'tpu'"):
        backend.backend("tpu")


def _run(code, **env):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_environment_variable_forces():
    done = _run("import zsq_ext.ops.backend as b; print(b.choice())", ZSQ_BACKEND="reference")
    assert done.stdout.strip() == "reference", done.stderr
    done = _run("import zsq_ext.ops", ZSQ_BACKEND="tpu")
    assert "ZSQ_BACKEND: name must be one of" in done.stderr


def test_every_op_has_a_reference_and_a_schema():
    assert backend.OPS
    for op in backend.OPS:
        assert hasattr(reference, op)
        assert hasattr(torch.ops.zsq, op)


def test_the_command_lists_what_is_public_and_nothing_else():
    assert set(filter(None, ops.PUBLIC.values())) <= set(backend.OPS)
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    done = CliRunner().invoke(app, ["ops", "--json", "-"])
    listed = json.loads(done.stdout)["ops"]
    assert set(listed) == set(ops.PUBLIC) == functions
    for name, runs in listed.items():
        assert runs["reference"], name
        assert runs["cpu"] == (backend.missing("cpu") is None), name
    assert listed["adaround_many"] == listed["adaround"]


def test_the_native_module_counts_the_fields_of_a_struct():
    module = pytest.importorskip("zsq_ext._C")
    with pytest.raises(TypeError, match="takes 13 values, got 2"):  # 12 fields and the threads
        module.cpu_fake_quant(0, 1)
    with pytest.raises(TypeError, match="takes 12 values, got 1"):  # the struct inside, a tuple
        module.cpu_fake_quant_lsq_backward((0,), 0, 0, 1)
