"""Where results are written: into the input itself or apart from everything, and nothing in between goes unnoticed."""

import pytest
import torch

from zsq_ext.ops import fake_quant, fake_quant_many, fake_quant_minmax

STEP, ZERO = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32)


def one(x, out):
    return fake_quant(x, STEP, ZERO, -8, 7, out=out)


def minmax(tensors, out):
    return fake_quant_minmax(tensors, 4, out=out)


def many(tensors, out):
    return fake_quant_many(tensors, [STEP] * len(tensors), [ZERO] * len(tensors), -8, 7, out=out)


def test_memory_shared_in_part_is_refused():
    x = torch.randn(100)
    before = x.clone()
    message = r"fake_quant: out must be x itself or memory apart from all others, got memory shared in part"
    for out in (x[8:], x[:-8]):
        with pytest.raises(ValueError, match=message):
            one(x[:-8] if out.data_ptr() != x.data_ptr() else x[8:], out)
    assert torch.equal(x, before)


def test_memory_that_several_elements_share_is_refused():
    x = torch.randn(3, 4)
    rows = torch.zeros(4).expand(3, 4)
    windows = torch.zeros(12).as_strided((3, 4), (3, 1))  # each row begins with the end of the one before
    message = "must have memory for each of its elements, got strides"
    for out in (rows, windows):
        with pytest.raises(ValueError, match=f"fake_quant: out {message}"):
            one(x, out)
        for lists in (minmax, many):
            with pytest.raises(ValueError, match=rf"out\[1\] {message}"):
                lists([x, x.clone()], [torch.zeros(3, 4), out])
    for out in (torch.zeros(6, 8)[::2, 1::2], torch.zeros(8, 3).t()[:, ::2], torch.zeros(1, 4).expand(1, 4)):
        assert torch.equal(one(x[: len(out)], out), one(x[: len(out)], None))


@pytest.mark.parametrize("lists", [minmax, many])
def test_lists_that_cross_are_refused(lists):
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    for tensors, out in (
        ([a, b], [b, a]),
        ([a, a.clone()], [b, b]),
        ([a, a], [a, b]),
        ([a[:2], b[:2]], [b[1:], b[:2]]),
    ):
        with pytest.raises(ValueError, match=r"out\[\d\] must be tensors\[\d\] itself or memory apart from all others"):
            lists(tensors, out)


def test_what_shares_no_element_is_fine():
    x = torch.randn(4, 6, 5)
    expected = one(x[:, :3].clone(), torch.empty(4, 3, 5))
    assert torch.equal(one(x[:, :3], x[:, 3:]), expected)  # slices that interleave
    halves = torch.randn(10)
    assert torch.equal(one(halves[:5].clone(), halves[5:]), halves[5:])
    assert torch.equal(one(halves, halves), halves)
    assert one(x[:0], x[:0]).numel() == 0


@pytest.mark.parametrize("lists", [minmax, many])
def test_in_place_and_inputs_that_repeat(lists):
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    expected = lists([a, b], None)
    outs = lists([a, a], [torch.empty(3, 4), torch.empty(3, 4)])
    assert torch.equal(outs[0], expected[0])
    assert torch.equal(outs[1], expected[0])
    for got, want in zip(lists([a, b], [a, b]), expected, strict=True):
        assert torch.equal(got, want)
