"""The tests' own tools see what they are there to see."""

import pytest
import torch
from parity import assert_same, assert_within, on_every_path, path, unchanged

from zsq_ext.ops import native

ONE = torch.tensor([1.0, 0.0, torch.nan, torch.inf])


def changed(at, value, dtype=torch.float32):
    t = ONE.clone()
    t[at] = value
    return t.to(dtype)


OTHER = {
    "a unit in the last place": changed(0, 1 + 2.0**-23),
    "the sign of zero": changed(1, -0.0),
    "a number for NaN": changed(2, 1.0),
    "NaN for a number": changed(0, torch.nan),
    "the sign of infinity": changed(3, -torch.inf),
    "the dtype": ONE.double(),
    "the shape": ONE[:, None],
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_the_same(name):
    assert_same(ONE, ONE.clone())
    for got, expected in ((OTHER[name], ONE), (ONE, OTHER[name]), ([ONE, OTHER[name]], [ONE, ONE])):
        with pytest.raises(AssertionError):
            assert_same(got, expected)


def test_a_nan_is_its_place_unless_its_bits_are_asked_for():
    other = -ONE.abs()
    assert_same(ONE[2:3], other[2:3])
    with pytest.raises(AssertionError):
        assert_same(ONE[2:3], other[2:3], nan_bits=True)
    with pytest.raises(ValueError):
        assert_same([ONE], [ONE, ONE])


def test_what_is_not_within():
    off = torch.tensor([1e-3, 0.0, 0.0, 0.0])
    assert_within(ONE + off, ONE, 1.1e-3)
    assert_within(ONE, ONE.double(), 0)
    wrong = [(ONE + off, 0.9e-3), (ONE + off, off * 0.9)]
    wrong += [(OTHER[k], 1e30) for k in ("a number for NaN", "NaN for a number", "the sign of infinity", "the shape")]
    for got, slack in wrong:
        with pytest.raises(AssertionError):
            assert_within(got, ONE, slack)


def test_what_was_written_to():
    tensors = {"x": torch.zeros(3), "more": [torch.full((2,), torch.nan)]}
    with unchanged(tensors, None, 3):
        tensors["x"] + 1
    for t in (tensors["x"], tensors["more"][0]):
        with pytest.raises(AssertionError, match="an input was modified"), unchanged(tensors):
            t[0] = -0.0


@pytest.mark.skipif(native.problem is not None, reason=f"no CPU backend: {native.problem}")
def test_a_path_ends_with_its_block():
    from zsq_ext import _C

    def state():
        seen.append((torch.get_num_threads(), _C.simd_enabled()))
        return seen[-1]

    seen = []
    before = state()
    with path(simd=False, threads=7):
        assert state() == (7, False)
    assert state() == before
    with pytest.raises(AssertionError):
        on_every_path(lambda: torch.tensor(state()))
    assert state() == before
    seen.clear()
    on_every_path(lambda: [state(), torch.ones(1)][1])
    assert {threads for threads, _ in seen} == {1, 2, 5}
    assert {simd for _, simd in seen} == {True, False}
