"""Calls that go past torch's dispatcher are those in which it would do nothing, and nothing that it does is lost.

What each test caught when its condition was taken out of `_is_direct`: the fake tensors' and the compiler's modes (a
kernel on tensors without memory), the mode of functions (nothing seen), the transforms (a wrapper's memory), the
profiler (no event), a subclass (its own __torch_dispatch__ not asked), a negated view (the sign lost), zeros without
memory (a null pointer read), autograd (no warning), tangents (none, and no error).
"""

import warnings

import pytest
import torch
from parity import compiled, ours
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zsq_ext import ops
from zsq_ext.ops import backend
from zsq_ext.ops.fake_quant import _op

# torch's own, where it loads what forward-mode AD and tracing need.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

STEP, ZERO = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32)
GRID = STEP, ZERO, -8, 7, None
X = torch.randn(2, 3, 4, 4)


def quantized(x):
    return ops.fake_quant(x, STEP, ZERO, -8, 7)


EXPECTED = quantized(X)


@pytest.fixture
def dispatched(monkeypatch):
    """The ops that go through the dispatcher, in order."""
    seen = []
    is_direct = backend._is_direct

    def look(args):
        direct = is_direct(args)
        if not direct:
            seen.append(args)
        return direct

    monkeypatch.setattr(backend, "_is_direct", look)
    return seen


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_plain_calls_are_direct(dispatched, context):
    with context():
        assert torch.equal(quantized(X), EXPECTED)
        assert torch.equal(quantized(torch.nn.Parameter(X, requires_grad=False)), EXPECTED)
    leaf = X.clone().requires_grad_()
    quantized(leaf).sum().backward()  # within autograd's functions too, both ways
    assert leaf.grad is not None
    assert not dispatched


def test_autocast_changes_nothing(dispatched):
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantized(X), EXPECTED)
    assert not dispatched


def test_a_direct_result_has_the_version_and_the_views_of_any_other():
    out = torch.empty_like(X)
    before = out._version
    ops.fake_quant(X, STEP, ZERO, -8, 7, out=out)
    assert out._version == before + 1
    saved = torch.ones(3, requires_grad=True)
    held = torch.rand(3)
    loss = (saved * held).sum()
    ops.fake_quant(held, STEP, ZERO, -8, 7, out=held)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_modes_see_the_op(mode):
    with mode() as seen:
        assert torch.equal(quantized(X), EXPECTED)
    assert "zsq.fake_quant.default" in seen.ops


def test_a_subclass_is_asked():
    seen = []

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    found = quantized(X.as_subclass(Tagged))
    assert type(found) is Tagged
    assert "zsq.fake_quant.default" in seen


def test_fake_tensors_are_fake():
    with FakeTensorMode() as mode:
        grid = *(mode.from_tensor(t) for t in GRID[:2]), *GRID[2:]
        inside = _op(torch.empty(5), *grid)
    outside = _op(mode.from_tensor(X), *grid)
    assert inside.shape == (5,)
    assert type(outside) is type(inside)
    assert outside.shape == X.shape


def test_tracers_keep_the_op():
    assert "zsq.fake_quant.default" in str(make_fx(quantized)(X).graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the checks, whose results the trace takes for constants
        traced = torch.jit.trace(lambda x: _op(x, *GRID), (X,))
    assert "zsq::fake_quant" in str(traced.graph)


def test_a_compiler_keeps_the_op():
    with backend.backend("reference"):  # forced, so that nothing decomposes
        found, graphs = compiled(quantized, X)
    assert torch.equal(found, EXPECTED)
    assert ours(graphs[0]) == ["zsq.fake_quant.default"]


def test_functions_transforms():
    assert torch.equal(torch.func.functionalize(quantized)(X), EXPECTED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no rule for batches: one call for each
        assert torch.equal(torch.func.vmap(quantized)(X), EXPECTED)


def test_the_profiler_sees_the_op():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        quantized(X)
    assert "zsq::fake_quant" in {event.key for event in profiler.key_averages()}


def test_views_that_are_not_their_memory():
    negated = torch._neg_view(X)  # as the imaginary part of a conjugate is, though dense
    assert negated.is_neg()
    assert torch.equal(quantized(negated), quantized(-X))
    zeros = torch._efficientzerotensor(X.shape)
    assert torch.equal(_op(zeros, *GRID), torch.zeros_like(X))


def test_what_autograd_follows_says_so():
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        _op(X.clone().requires_grad_(), *GRID).sum().backward()


# forward-mode AD

BASE = torch.zeros(3, 4, dtype=torch.int16)
UNKNOWN = {
    "fake_quant": lambda x: ops.fake_quant(x, STEP, ZERO, -8, 7, grad="lsq"),
    "fake_quant_many": lambda x: ops.fake_quant_many([torch.ones(3), x], [STEP] * 2, [ZERO] * 2, -8, 7)[1],
    "fake_quant_minmax": lambda x: ops.fake_quant_minmax([x], 4)[0],
    "adaround": lambda x: ops.adaround(x, BASE, STEP, ZERO, -8, 7),
    "adaround_many": lambda x: ops.adaround_many([x], [BASE], [STEP], [ZERO], -8, 7, hard=True)[0],
    "bn_act": lambda x: ops.bn_act(x, torch.zeros(4), torch.ones(4), None, None, 1e-5),
    "channel_sums": lambda x: ops.channel_sums(x, torch.zeros(4))[0],
    "qdrop": lambda x: ops.qdrop(torch.zeros(3, 4), x, 0.5, torch.tensor([1, 2])),
}


@pytest.mark.parametrize("op", UNKNOWN)
def test_a_tangent_is_refused_rather_than_lost(op):
    x = torch.rand(3, 4)
    refusal = f"{op}: a gradient must be taken backward, got a tangent of forward-mode AD"
    with forward_ad.dual_level():
        UNKNOWN[op](x)  # a level alone is none
        with pytest.raises(NotImplementedError, match=refusal):
            UNKNOWN[op](forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match=refusal):
        torch.func.jvp(UNKNOWN[op], (x,), (x,))


def test_plain_pytorch_takes_tangents():
    s1, s2, mean = torch.rand(3, 4)
    _, (data_mean, _) = torch.func.jvp(lambda s: ops.statistics_of(s, s2, 2, mean), (s1,), (torch.ones(4),))
    assert torch.equal(data_mean, torch.full((4,), 0.5))
