"""The embedded task: a function of (seed, split, index) and of nothing else."""

import numpy as np
import pytest
import torch

from zsq_ext.zoo.textured_shapes import CLASSES, SPEC, TEST_IMAGES, TexturedShapes


def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in():
    task = TexturedShapes("train")
    together, labels = task.pixels(range(90))
    alone = torch.cat([task.pixels([i])[0] for i in (0, 17, 89)])
    assert torch.equal(together[[0, 17, 89]], alone)
    assert labels.tolist() == [i % len(CLASSES) for i in range(90)]


def test_images_are_the_ones_the_teachers_were_trained_on():
    """Another drawing is another task: the shipped weights and all recorded accuracies would be void."""
    pixels, _ = TexturedShapes("test").pixels(range(4))
    # sin and cos may differ in the last bit between processors, which can turn a byte or two of 3,072 by one
    assert pixels.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx([165.343, 91.492, 135.25, 160.146], abs=0.005)


def test_splits_and_seeds_are_disjoint():
    drawn = [
        TexturedShapes(split, seed).pixels(range(400))[0].flatten(1).numpy()
        for split, seed in (("train", 0), ("val", 0), ("test", 0), ("train", 1), ("test", 1))
    ]
    rows = {row.tobytes() for images in drawn for row in images}
    assert len(rows) == 5 * 400


def test_classes_are_balanced_and_many():
    _, labels = TexturedShapes("test").pixels(range(len(CLASSES) * 3))
    assert torch.bincount(labels).tolist() == [3] * len(CLASSES)
    assert len(CLASSES) >= 20
    assert TEST_IMAGES >= 10_000


def test_normalisation_is_that_of_the_data():
    images, _ = TexturedShapes("train").images(range(2000))
    # 2,000 images of about 100 independent patches each: a standard error of 0.01; the constants are rounded to 0.005
    assert images.mean((0, 2, 3)).abs().max() < 0.04
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.05
    assert SPEC.num_classes == len(CLASSES)


def test_a_far_index_can_be_drawn():
    pixels, _ = TexturedShapes("train").pixels(np.array([10**15], dtype=np.uint64))
    assert pixels.shape == (1, 3, 32, 32)


def test_batches_cover_the_split_once_and_in_order():
    task = TexturedShapes("val")
    parts = list(task.batches(130, 50))
    assert [len(labels) for _, labels in parts] == [50, 50, 30]
    assert torch.equal(torch.cat([images for images, _ in parts]), task.images(range(130))[0])


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        TexturedShapes("holdout")
