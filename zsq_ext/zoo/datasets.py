"""Readers for real test images that a user already has: CIFAR-10 and CIFAR-100 as distributed, ImageNet as a folder.

Nothing here downloads. Images come out normalised as the networks of the literature expect them; they serve to measure
accuracy and never to select or tune anything.
"""

from zsq_ext.zoo.cifar import cifar10, cifar10_spec, cifar100, cifar100_spec
from zsq_ext.zoo.image_set import ImageSet
from zsq_ext.zoo.imagenet import imagenet_folder, imagenet_spec

__all__ = ["ImageSet", "cifar10", "cifar10_spec", "cifar100", "cifar100_spec", "imagenet_folder", "imagenet_spec"]
