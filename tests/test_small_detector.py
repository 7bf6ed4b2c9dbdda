"""Raw heads to boxes: by hand, against a plain greedy suppression, and the detector's shapes and size.

Broken on purpose, and which test saw it: x and y of the centres swapped, sides not in strides (test_cells_by_hand);
suppression across classes, of boxes that were themselves suppressed, or of the surer one
(test_suppression_is_the_greedy_one); the least sure candidates kept (test_arguments_of_decode).
"""

import pytest
import torch
import torch.nn.functional as F

from zsq_ext.zoo.small_detector import STRIDES, box_iou, cells, decode, fpn_small


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(n=2, classes=3, height=32, width=48, seed=0):
    maps = [(height // s, width // s) for s in STRIDES]
    return {
        "classes": [2 * normal(n, classes, *hw, seed=seed + i) for i, hw in enumerate(maps)],
        "boxes": [2 * normal(n, 4, *hw, seed=seed + 10 + i) for i, hw in enumerate(maps)],
    }


def test_the_detector():
    net = fpn_small(8)
    assert 4 * sum(tensor.numel() for tensor in net.state_dict().values()) < 1.5e6
    out = net.eval()(normal(2, 3, 64, 96))
    assert {name: [tuple(level.shape) for level in levels] for name, levels in out.items()} == {
        "classes": [(2, 8, 16, 24), (2, 8, 8, 12)],
        "boxes": [(2, 4, 16, 24), (2, 4, 8, 12)],
    }
    sum(level.square().mean() for levels in out.values() for level in levels).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_cells_by_hand():
    raw = heads()
    logits, boxes, centres, strides = cells(raw)
    assert logits.shape == (2, 8 * 12 + 4 * 6, 3)
    level, row, column, n = 1, 2, 5, 1
    p = 8 * 12 + row * 6 + column
    stride = STRIDES[level]
    assert strides[p] == stride
    assert centres[p].tolist() == [(column + 0.5) * stride, (row + 0.5) * stride]
    assert torch.equal(logits[n, p], raw["classes"][level][n, :, row, column])
    left, top, right, bottom = F.softplus(raw["boxes"][level][n, :, row, column]) * stride
    x, y = centres[p]
    torch.testing.assert_close(boxes[n, p], torch.stack([x - left, y - top, x + right, y + bottom]))


def test_overlaps():
    a = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 5, 5]])
    expected = torch.tensor([[1, 1 / 7, 0], [1 / 7, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(box_iou(a, a), expected)
    torch.testing.assert_close(box_iou(torch.stack([a, a]), a[:2]), torch.stack([expected[:, :2]] * 2))


def greedy(boxes, scores, labels, overlap):
    kept = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(labels[i] != labels[j] or box_iou(boxes[i, None], boxes[j, None]) <= overlap for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("overlap", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("seed", [0, 1])
def test_suppression_is_the_greedy_one(overlap, seed):
    raw = heads(seed=100 * seed)
    logits, boxes, _, _ = cells(raw)
    got = decode(raw, (32, 48), threshold=0.3, overlap=overlap, limit=150)
    suppressed = 0
    for n, one in enumerate(got):
        scores, index = logits[n].sigmoid().flatten().sort(descending=True, stable=True)
        scores, index = scores[:150], index[:150]
        scores, index = scores[scores > 0.3], index[scores > 0.3]
        inside = boxes[n, index // 3].clamp(min=0).minimum(torch.tensor([48.0, 32, 48, 32]))
        kept = greedy(inside, scores, index % 3, overlap)
        assert torch.equal(one.scores, scores[kept])
        assert torch.equal(one.labels, (index % 3)[kept])
        assert torch.equal(one.boxes, inside[kept])
        suppressed += len(scores) - len(kept)
    assert suppressed >= 4


def test_a_box_that_was_suppressed_suppresses_nothing():
    """A chain: the second overlaps the first, the third only the second."""
    raw = {
        "classes": [torch.full((1, 1, 1, 4), -9.0), torch.full((1, 1, 1, 2), -9.0)],
        "boxes": [torch.full((1, 4, 1, 4), 4.0), torch.zeros(1, 4, 1, 2)],
    }
    raw["classes"][0][0, 0, 0, :3] = torch.tensor([3.0, 2, 1])
    raw["boxes"][0][0, (0, 2)] = 1.0  # 10.5 pixels wide at a pitch of 4
    (one,) = decode(raw, (64, 64), overlap=0.4)
    assert one.scores.tolist() == pytest.approx(torch.tensor([3.0, 1]).sigmoid().tolist())


def test_arguments_of_decode():
    raw = heads(n=1)
    many, few = (decode(raw, (32, 48), limit=limit, overlap=1.0)[0] for limit in (50, 5))
    assert len(many.scores) == 50
    assert torch.equal(few.scores, many.scores[:5])
    assert (many.scores.diff() <= 0).all()
    assert len(decode(raw, (32, 48), threshold=0.999)[0].scores) == 0
    cut = decode(raw, (20, 30))[0].boxes
    assert cut.min() >= 0
    assert (cut <= torch.tensor([30.0, 20, 30, 20])).all()
    for name, value in (("threshold", 1.0), ("overlap", 0.0), ("limit", 0)):
        with pytest.raises(ValueError, match=f"decode: {name} must be .*, got {value}"):
            decode(raw, (32, 48), **{name: value})
