"""AP by hand: what COCO's rules give for predictions that one can count.

Broken on purpose, and which test saw it: corners handed over as widths (test_by_hand), labels dropped
(test_by_hand), all scores alike (test_what_is_found_twice_is_wrong_once), AP for AP50 (test_by_hand).
"""

import sys

import pytest
import torch

from zsq_ext.zoo.average_precision import average_precision, precision_of
from zsq_ext.zoo.shape_scenes import Objects
from zsq_ext.zoo.small_detector import Detections

pytest.importorskip("pycocotools")

BOX = (10.0, 20.0, 30.0, 40.0)


def truth(*images):
    """Objects from lists of (box, label)."""
    boxes, labels = torch.zeros(len(images), 2, 4), torch.full((len(images), 2), -1)
    for n, image in enumerate(images):
        for i, (box, label) in enumerate(image):
            boxes[n, i], labels[n, i] = torch.tensor(box), label
    return Objects(boxes, labels)


def found(*rows):
    """Detections from (box, score, label)."""
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(torch.tensor(boxes).view(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


def shifted(by):
    return (BOX[0] + by, BOX[1], BOX[2] + by, BOX[3])


ONE = truth([(BOX, 3)])


@pytest.mark.parametrize(
    ("detections", "ap50", "ap"),
    [
        ([(BOX, 0.9, 3)], 100, 100),
        ([(BOX, 0.01, 3)], 100, 100),  # scores only order
        ([], 0, 0),
        ([(BOX, 0.9, 2)], 0, 0),  # another class
        # moved by 1/6 of its length: overlap (5/6) / (7/6) = 0.714, right at 0.50, 0.55, 0.60, 0.65 and 0.70
        ([(shifted(20 / 6), 0.9, 3)], 100, 50),
        # moved by 1/2: overlap 1/3
        ([(shifted(10), 0.9, 3)], 0, 0),
        # moved by 1/3.5: overlap (2.5/3.5) / (4.5/3.5) = 0.556
        ([(shifted(20 / 3.5), 0.9, 3)], 100, 20),
        # twice the height: overlap 0.5 does not fall short of 0.5
        ([((10.0, 20.0, 30.0, 60.0), 0.9, 3)], 100, 10),
    ],
)
def test_by_hand(detections, ap50, ap):
    got = average_precision([found(*detections)], ONE)
    assert got == {"AP50": pytest.approx(ap50), "AP": pytest.approx(ap)}


def test_what_is_found_twice_is_wrong_once():
    """A duplicate costs where it ranks before another object: precision 2/3 at the second half of the recalls."""
    objects = truth([(BOX, 3)], [(BOX, 3)])
    surer = average_precision([found((BOX, 0.9, 3), (BOX, 0.8, 3)), found((BOX, 0.7, 3))], objects)
    # COCO reads the precision at 101 recalls: 51 of them (0 to 0.5) find 1, the other 50 find 2/3
    assert surer["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    behind = average_precision([found((BOX, 0.9, 3), (BOX, 0.6, 3)), found((BOX, 0.7, 3))], objects)
    assert behind["AP50"] == pytest.approx(100)


def test_a_missed_object_and_a_false_alarm():
    objects = truth([(BOX, 3)], [(BOX, 3)])
    missed = average_precision([found((BOX, 0.9, 3)), found()], objects)
    assert missed["AP"] == pytest.approx(100 * 51 / 101)
    alarm = average_precision([found((shifted(25), 0.99, 3), (BOX, 0.9, 3)), found((BOX, 0.8, 3))], objects)
    assert alarm["AP"] == pytest.approx(100 * 2 / 3)


def test_classes_are_averaged_and_only_those_that_occur():
    objects = truth([(BOX, 3), (shifted(25), 5)])
    got = average_precision([found((BOX, 0.9, 3), (BOX, 0.9, 7))], objects)
    assert got["AP50"] == pytest.approx(50)
    empty = truth([(BOX, 3)], [])
    assert average_precision([found((BOX, 0.5, 3)), found((BOX, 0.9, 3))], empty)["AP50"] == pytest.approx(50)


def test_nothing_is_printed(capsys):
    average_precision([found()], ONE)
    assert capsys.readouterr() == ("", "")


def test_what_cannot_be_counted():
    with pytest.raises(ValueError, match="found must have an entry per image, got 2 for 1 images"):
        average_precision([found(), found()], ONE)
    with pytest.raises(ValueError, match="truth must hold at least one object, got none"):
        average_precision([found()], truth([]))
    with pytest.raises(ValueError, match="precision_of: batches must hold at least one batch, got none"):
        precision_of(lambda images: {}, [])


def test_without_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match=r"^average_precision: pycocotools must be installed: pip install"):
        average_precision([found()], ONE)
