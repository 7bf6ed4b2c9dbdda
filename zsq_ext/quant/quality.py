"""What quantization cost, measured without labels: student against teacher on held-out synthetic images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from zsq_ext.quant.config import QConfig
from zsq_ext.quant.graph import find, with_taps
from zsq_ext.quant.prepare import plan


@dataclass(frozen=True)
class Layer:
    """One site: how well its values survive (SQNR) and what quantizing it alone costs (sensitivity).

    ``sqnr_db`` compares the site's tensor in the quantized and in the float network, errors of earlier layers
    included. ``kl_alone`` is the divergence of the float network with this one site quantized.
    """

    site: str
    kind: str
    bits: int
    sqnr_db: float
    kl_alone: float


@dataclass(frozen=True)
class Quality:
    """Label-free quality on ``images`` synthetic images that tuning never saw.

    ``agreement`` is the percentage of images on which student and teacher predict the same class, ``kl`` the mean
    divergence KL(teacher || student) in nats, ``layers`` one row per site in execution order.
    """

    images: int
    agreement: float
    kl: float
    layers: tuple[Layer, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "agreement": self.agreement,
            "kl": self.kl,
            "layers": [vars(layer) for layer in self.layers],
        }


@torch.no_grad()
def measure(teacher: fx.GraphModule, student: fx.GraphModule, config: QConfig, images: Tensor) -> Quality:
    """Compares a prepared student with its teacher.

    Args:
        teacher: the captured float network.
        student: the prepared network, calibrated and maybe tuned.
        config: the configuration the student was prepared with.
        images: (N, C, H, W) in normalised space, N >= 1, not used for tuning.

    Returns:
        Agreement, divergence, and a row per site.
    """
    sites = plan(teacher, config)
    nodes = [site.node for site in sites]
    expected, float_values = with_taps(teacher, nodes)(images)
    quantized = [_quantizer_behind(student, node) for node in nodes]
    got, values = with_taps(student, quantized)(images)
    alone = _one_by_one(teacher, student, [(site.node, node) for site, node in zip(sites, quantized, strict=True)])
    layers = []
    for site, before, after, network in zip(sites, float_values, values, alone, strict=True):
        layers.append(Layer(site.name, site.kind, site.bits, _sqnr(before, after), _kl(expected, network(images))))
    agreement = 100 * (got.argmax(1) == expected.argmax(1)).float().mean().item()
    return Quality(len(images), agreement, _kl(expected, got), tuple(layers))


def _one_by_one(
    teacher: fx.GraphModule, student: fx.GraphModule, sites: list[tuple[str, str]]
) -> Iterator[fx.GraphModule]:
    """The float network with one of the student's quantizers at a time."""
    for node, quantizer in sites:
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(teacher.graph, copied))
        network = fx.GraphModule(teacher, graph)
        network.add_submodule("alone", copy.deepcopy(student.get_submodule(str(find(student, quantizer).target))))
        source = next(new for old, new in copied.items() if old.name == node)
        with graph.inserting_after(source):
            inserted = graph.call_module("alone", (source,))
        source.replace_all_uses_with(inserted, delete_user_cb=lambda user, inserted=inserted: user is not inserted)
        network.recompile()
        yield network


def _quantizer_behind(student: fx.GraphModule, node: str) -> str:
    return next(user.name for user in find(student, node).users if user.op == "call_module")


def _sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise in dB; infinite where nothing was lost."""
    noise = (reference - value).double().square().sum()
    return (10 * torch.log10(reference.double().square().sum() / noise)).item()


def _kl(teacher: Tensor, student: Tensor) -> float:
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True).item()
