"""What the ops' tests share: comparing by bits, the CPU backend's paths, and what torch's machinery made of a call."""

import contextlib

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves

from zsq_ext.ops import backend


def every(cases):
    """A test's parameter `case`: each of a table, under its name."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# comparing


def bits(t, nan_bits=False):
    """The tensor as integers, so that 0 and -0 differ. Every NaN is one value, since only its place is promised, unless
    `nan_bits` asks for its own bits: those of a value that was copied."""
    t = t.detach().cpu().contiguous()
    if not t.is_floating_point():
        return t
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.view(kind) if nan_bits else t.view(kind).masked_fill(t.isnan(), -1)


def assert_same(got, expected, nan_bits=False):
    """Equal in dtype, shape and bits, wherever they are: two tensors, or two sequences of them."""
    if not torch.is_tensor(got):
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b, nan_bits)
        return
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    wrong = bits(got, nan_bits) != bits(expected, nan_bits)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} differ"


def assert_within(got, expected, slack, what="values"):
    """NaN and infinities in the same places, and elsewhere no further apart than slack."""
    assert got.shape == expected.shape, what
    got, expected = (t.detach().cpu().double() for t in (got, expected))
    finite = expected.isfinite()
    assert_same(got.masked_fill(finite, 0), expected.masked_fill(finite, 0))
    excess = (got - expected).abs() - torch.as_tensor(slack).cpu().double().nan_to_num(torch.inf)
    assert (excess[finite] <= 0).all(), f"{what} beyond the tolerance by up to {excess[finite].max()}"


@contextlib.contextmanager
def unchanged(*args):
    """Nothing within the block may write to a tensor among args, or in the lists and dictionaries among them."""
    tensors = [t for t in tree_leaves(args) if torch.is_tensor(t)]
    before = [t.clone() for t in tensors]
    yield
    for was, t in zip(before, tensors, strict=True):
        assert torch.equal(bits(was), bits(t)), "an input was modified"


def strides_like(x, size=None):
    """The strides of a result (N, C, ...) that is ordered as x is: channels last where x's are, else by its shape.

    size: of what follows N and C, where it is not x's.
    """
    shape = x.shape if size is None else (*x.shape[:2], *size)
    last = x.dim() > 2 and x.stride(1) == 1 and not x.is_contiguous()
    dense = torch.empty(shape, device="meta")
    return (dense.movedim(1, -1).contiguous().movedim(-1, 1) if last else dense).stride()


# backends; `fast` is conftest.py's pair of a backend's name and its device


def by(name, op):
    """A registered op on one backend, as a function of the op's own arguments."""

    def run(*args):
        with backend.backend(name):
            return getattr(torch.ops.zsq, op)(*args)

    return run


def refused(fast, op, dtype, call):
    """Whether the backend has no op for the dtype; it is then seen that `call`, under that backend, says so."""
    name, device = fast
    reason = backend.reason_against(name, op, device, dtype)
    if reason is None:
        return False
    with backend.backend(name), pytest.raises(NotImplementedError, match=reason):
        call()
    return True


def skip_refused(fast, op, dtype):
    """For the tests that need not see again what the forward's has seen by `refused`."""
    name, device = fast
    if backend.reason_against(name, op, device, dtype) is not None:
        pytest.skip(f"{name} takes no {dtype}: the forward's test says so")


def interpreted(fast):
    """Whether the backend is Triton on the CPU, where everything takes long and programs run one after the other."""
    return fast == ("triton", "cpu")


@contextlib.contextmanager
def path(simd=None, threads=None):
    """The CPU backend with SIMD or without, PyTorch and it on so many threads. None leaves a choice as it is."""
    native = None if simd is None else pytest.importorskip("zsq_ext._C")
    simd_before = None if native is None else native.set_simd(simd)
    threads_before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if native is not None:
            native.set_simd(simd_before)


@pytest.fixture
def scalar():
    """The CPU backend's scalar path."""
    with path(simd=False):
        yield


def on_every_path(call, nan_bits=False):
    """What call, of the CPU backend, returns: the same bits with SIMD and without, and on any number of threads."""
    found = []
    for threads, simd in ((1, True), (2, True), (5, True), (2, False)):
        with path(simd, threads):
            found.append(call())
        assert_same(found[-1], found[0], nan_bits)
    return found[0]


# torch's machinery


def compiled(function, *args):
    """(what function returns when compiled, without a break and without generating code; its graphs' operators).

    The operators are a list for each graph: the forward's, and once a gradient was taken the backward's.
    """
    seen = []

    def look(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    both = aot_autograd(fw_compiler=look, bw_compiler=look)
    return torch.compile(function, backend=both, fullgraph=True)(*args), seen


def ours(operators):
    """Those of the operators that are this package's."""
    return [op for op in operators if "zsq" in op]


def assert_exports(module, inputs, more, *ops):
    """Exported with a free batch size, the module keeps the ops as nodes and gives the same bits for a larger batch."""
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(module, inputs, dynamic_shapes=(batch,) * len(inputs))
    for op in ops:
        assert f"zsq.{op}" in str(program.graph)
    assert_same(program.module()(*more), module(*more))


def assert_raises(case, function, good):
    """A case of a table of errors: the good arguments are taken, and changed they give its error and message."""
    function(**good)
    with pytest.raises(case.error) as raised:
        function(**{**good, **case.change})
    assert str(raised.value) == case.message


def replayed(call, change):
    """What call returns, captured in a CUDA graph and replayed after `change` gave its inputs new contents."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    change()
    graph.replay()
    return found


@contextlib.contextmanager
def other_stream():
    """A stream of its own that is busy for a while: a kernel on any other would read what is yet to be written."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        yield
    stream.synchronize()
