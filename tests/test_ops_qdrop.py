"""qdrop: what it draws, that every backend draws the same, and how it behaves under torch's machinery.

Broken on purpose on the CPU, each seen red: nine rounds (plain), a draw equal to the probability kept (exactly at a
draw), the upper half of key or offset ignored (negative_key), blocks of eight not put back in order (plain), the
place in memory taken for the place in the shape (threads_channels_last), one word for all where a map is of odd size
(channels_last_odd), the gradient not masked (plain), the scalar path's words in the wrong order (documented example).
"""

import functools
import importlib.util

import parity
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    assert_exports,
    assert_raises,
    compiled,
    every,
    on_every_path,
    ours,
    path,
    refused,
    skip_refused,
    strides_like,
    unchanged,
)

from zsq_ext.ops import backend, cpu, qdrop, reference
from zsq_ext.ops.cases import qdrop as cases
from zsq_ext.ops.reference.qdrop import philox

ALL = every(cases.QDROP)
CASE = {case.name: case for case in cases.QDROP}

pytestmark = pytest.mark.usefixtures("poison")

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
    from zsq_ext.kernels.qdrop import draws

    @triton.jit
    def words_kernel(out_ptr, block_ptr, key_ptr):
        at = tl.arange(0, 4)
        w0, w1, w2, w3 = draws(tl.load(block_ptr + at), key_ptr)
        word = tl.where(at == 0, w0, tl.where(at == 1, w1, tl.where(at == 2, w2, w3)))
        tl.store(out_ptr + at, word.to(tl.int64))


WORD = 2**32 - 1


# Values are copied, so that even a NaN's bits are the same.
assert_same = functools.partial(parity.assert_same, nan_bits=True)


# the generator

# (counter, key, words) of Random123's known answers for philox4x32-10, least significant word first
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_reference_has_the_published_words(counter, key, words):
    counter, key = ([torch.tensor(w) for w in ws] for ws in (counter, key))
    assert tuple(int(w) for w in philox(counter, key)) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_native_module_has_the_published_words(counter, key, words):
    native = pytest.importorskip("zsq_ext._C")
    c, k = ([ws[i] | ws[i + 1] << 32 for i in range(0, len(ws), 2)] for ws in (counter, key))
    assert native.philox(*c, *k) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_triton_has_the_published_words(counter, key, words, fast):
    name, device = fast
    if name != "triton":
        pytest.skip("about Triton")

    def signed(low, high):
        value = low | high << 32
        return value - 2**64 if value >= 2**63 else value

    block = torch.full((4,), signed(*counter[:2]), device=device)
    out = torch.empty(4, dtype=torch.int64, device=device)
    words_kernel[(1,)](out, block, torch.tensor([signed(*key), signed(*counter[2:])], device=device))
    assert tuple(out.tolist()) == words


def python_draws(n, key, offset):
    """The upper 24 bits of n elements' draws, in Python's own integers."""
    found = []
    for block in range((n + 3) // 4):
        c, k = [block & WORD, block >> 32, offset & WORD, offset >> 32 & WORD], [key & WORD, key >> 32 & WORD]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [b >> 32 ^ c[1] ^ k[0], b & WORD, a >> 32 ^ c[3] ^ k[1], a & WORD]
            k = [k[0] + 0x9E3779B9 & WORD, k[1] + 0xBB67AE85 & WORD]
        found += [w >> 8 for w in c]
    return torch.tensor(found[:n])


# meaning


@pytest.mark.parametrize("name", ["plain", "tail", "mostly", "negative_key", "wide_key", "never", "always"])
def test_the_reference_is_the_formula(name):
    x, x_hat, probability, key = CASE[name].args()
    keep = (python_draws(x.numel(), *key.tolist()) < probability * 2**24).view(x.shape)
    assert_same(reference.qdrop(*CASE[name].op_args()), torch.where(keep, x, x_hat))
    grad, zero = x_hat, torch.zeros(())
    dx, dx_hat = reference.qdrop_backward(grad, *CASE[name].op_args()[2:], True, True)
    assert_same(dx, torch.where(keep, grad, zero))
    assert_same(dx_hat, torch.where(keep, zero, grad))


def test_documented_example():
    key = torch.tensor([42, 0])
    draws = []
    for _ in range(2):
        draws.append(qdrop(torch.ones(8), torch.zeros(8), 0.5, key).int().tolist())
        key[1] += 1
    assert draws == [[0, 1, 1, 1, 0, 1, 0, 1], [1, 1, 1, 0, 1, 0, 1, 1]]


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_that_is_kept(probability):
    n = 1 << 20
    kept = qdrop(torch.ones(n), torch.zeros(n), probability, torch.tensor([7, 3])).mean().item()
    assert abs(kept - probability) < 5 * (probability * (1 - probability) / n) ** 0.5  # five standard deviations


def test_keys_and_offsets_draw_apart():
    n = 1 << 16
    drawn = torch.stack([qdrop(torch.ones(n), torch.zeros(n), 0.5, torch.tensor(k)) for k in ((0, 0), (0, 1), (1, 0))])
    together = torch.corrcoef(drawn)[[0, 0, 1], [1, 2, 2]]
    assert (together.abs() < 5 / n**0.5).all()


@pytest.mark.parametrize("simd", [True, False])
@pytest.mark.parametrize("last", [False, True])
def test_exactly_at_a_draw(fast, simd, last):
    name, device = fast
    one, key = torch.ones(2, 12, 4, 2, device=device), torch.tensor([42, 7], device=device)
    one = one.to(memory_format=torch.channels_last) if last else one
    with path(simd), backend.backend(name):
        for i, draw in enumerate(python_draws(8, 42, 7).tolist()):
            kept = [qdrop(one, 0 * one, p / 2**24, key).flatten()[i].item() for p in (draw, draw + 1)]
            assert kept == [0, 1]


# parity


@ALL
def test_forward_has_the_reference_bits(case, fast):
    name, device = fast
    args = case.args(device)
    if refused(fast, "qdrop", case.dtype, lambda: qdrop(*args)):
        return
    with backend.backend(name), unchanged(args):
        got = qdrop(*args)
    assert_same(got, reference.qdrop(*case.op_args()))
    assert got.stride() == strides_like(args[0])


@ALL
def test_backward_has_the_reference_bits(case, fast):
    name, device = fast
    skip_refused(fast, "qdrop_backward", case.dtype)
    grad, _, *rest = case.op_args(device)
    expected = reference.qdrop_backward(case.op_args()[0], *case.op_args()[2:], True, True)
    with backend.backend(name):
        for wanted in ((True, True), (True, False), (False, True)):
            found = torch.ops.zsq.qdrop_backward(grad, *rest, *wanted)
            for got, want, is_wanted in zip(found, expected, wanted, strict=True):
                if is_wanted:
                    assert_same(got, want)
                    assert got.stride() == strides_like(grad)
                else:
                    assert got.numel() == 0


@ALL
def test_neither_path_nor_threads_change_a_bit(case):
    x, _, *rest = case.op_args()
    found = on_every_path(lambda: (cpu.qdrop(*case.op_args()), cpu.qdrop_backward(x, *rest, True, True)), nan_bits=True)
    assert_same(found, (reference.qdrop(*case.op_args()), reference.qdrop_backward(x, *rest, True, True)))


# gradients


def test_the_backward_repeats_the_draws(fast):
    name, device = fast
    x, x_hat, *rest = CASE["channels_last_of_one"].args(device)
    leaves = x.requires_grad_(), x_hat.requires_grad_()
    with backend.backend(name):
        out = qdrop(x, x_hat, *rest)
        dx, dx_hat = torch.autograd.grad(out.sum(), leaves)
    assert torch.equal(out, torch.where(dx == 1, x, x_hat))
    assert torch.equal(dx + dx_hat, torch.ones_like(dx))
    assert 0.4 < dx.mean() < 0.6


def test_gradcheck():
    case = cases.QDropCase("fp64", shape=(2, 3, 2, 2), dtype=torch.float64)
    x, x_hat, *rest = case.args()
    leaves = x.requires_grad_(), x_hat.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, x_hat: qdrop(x, x_hat, *rest), leaves)


def test_what_is_saved():
    x, x_hat, probability, key = CASE["plain"].args()
    out = qdrop(x.requires_grad_(), x_hat, probability, key)
    assert [t is key for t in out.grad_fn.saved_tensors] == [True]
    key[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_only_where_they_are_wanted():
    x, x_hat, *rest = CASE["plain"].args()
    assert not qdrop(x, x_hat, *rest).requires_grad
    (dx_hat,) = torch.autograd.grad(qdrop(x, x_hat.requires_grad_(), *rest).sum(), x_hat)
    assert set(dx_hat.unique().tolist()) == {0, 1}
    upstream = torch.ones_like(x).requires_grad_()
    (first,) = torch.autograd.grad(qdrop(x, x_hat, *rest), x_hat, upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="a gradient must be taken once"):
        first.sum().backward()


def test_autocast_keeps_the_dtype():
    args = CASE["plain"].args()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(qdrop(*args), reference.qdrop(*CASE["plain"].op_args()))


# errors


@every(cases.QDROP_ERRORS)
def test_errors_name_the_argument(case):
    good = {"x": torch.zeros(2, 3), "x_hat": torch.zeros(2, 3), "probability": 0.5, "key": torch.tensor([1, 2])}
    assert_raises(case, qdrop, good)


# properties


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=3, max_size=4),
    key=st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1)),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
)
def test_properties(shape, key, low, high):
    low, high = min(low, high), max(low, high)
    key, one, zero = torch.tensor(key), torch.ones(shape), torch.zeros(shape)
    some, more = qdrop(one, zero, low, key), qdrop(one, zero, high, key)
    assert (some <= more).all(), "what is kept with a probability is kept with a higher one"
    assert torch.equal(qdrop(zero, one, low, key), 1 - some), "each element is one or the other"
    assert torch.equal(qdrop(one.flatten(), zero.flatten(), low, key), some.flatten()), "the shape matters"
    last = one.movedim(1, -1).contiguous().movedim(-1, 1)
    assert torch.equal(qdrop(last, zero, low, key), some), "the layout matters"
    head = qdrop(one[:1], zero[:1], low, key)
    assert torch.equal(head, some[:1]), "later elements matter"


# torch's machinery

# Not nan_inf: opcheck compares results by value, and NaN differs from itself.
OPCHECK = [
    "plain",
    "tail",
    "empty",
    "strided",
    "expanded",
    "channels_last",
    "channels_last_odd",
    "fp16",
    "bf16",
    "fp64",
]


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    x, x_hat, *rest = CASE[name].op_args()
    torch.library.opcheck(torch.ops.zsq.qdrop, (x, x_hat, *rest))
    torch.library.opcheck(torch.ops.zsq.qdrop_backward, (x, *rest, True, True))
    torch.library.opcheck(torch.ops.zsq.qdrop_backward, (x, *rest, False, True))


def test_compile_keeps_the_op(fast):
    name, device = fast
    x, x_hat, *rest = CASE["plain"].args(device)
    x_hat.requires_grad_()
    for forced in ("auto", name):
        with backend.backend(forced):
            out, graphs = compiled(qdrop, x, x_hat, *rest)
            (got,) = torch.autograd.grad(out.sum(), x_hat)
            (expected,) = torch.autograd.grad(qdrop(x, x_hat, *rest).sum(), x_hat)
        assert [ours(graph) for graph in graphs] == [["zsq.qdrop.default"], ["zsq.qdrop_backward.default"]]
        assert_same(out, reference.qdrop(*CASE["plain"].op_args()))
        assert_same(got, expected)


def test_export_keeps_the_op():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("key", torch.tensor([1, 2]))

        def forward(self, x):
            return qdrop(x, x.round(), 0.5, self.key)

    assert_exports(Model(), (torch.randn(2, 3, 4),), (torch.randn(5, 3, 4),), "qdrop")


def test_meta_tensors_have_a_shape_and_no_values():
    x = torch.empty(2, 3, 5, device="meta")
    out = qdrop(x, x, 0.5, torch.empty(2, dtype=torch.int64, device="meta"))
    assert (out.device.type, out.shape) == ("meta", x.shape)


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replays_with_fresh_draws(name):
    x, x_hat, probability, key = CASE["plain"].args("cuda")
    with backend.backend(name):
        qdrop(x, x_hat, probability, key)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = qdrop(x, x_hat, probability, key)
            key[1] += 1
    key[1] = 7
    for offset in (7, 8, 9):
        graph.replay()
        expected = reference.qdrop(x, x_hat, 2**23, torch.tensor([42, offset], device="cuda"))
        assert_same(out, expected)
