"""What quantization cost, measured without labels: student against teacher on held-out synthetic images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from zsq_ext.quant.config import QConfig
from zsq_ext.quant.graph import find, with_taps
from zsq_ext.quant.prepare import Site, plan

BATCH = 32
"""Images at a time: every site's tensor is held twice meanwhile, 0.6 GB for ResNet-18 at 224 pixels."""


@dataclass(frozen=True)
class Layer:
    """One site: how well its values survive (SQNR) and what quantizing it alone costs (sensitivity).

    ``sqnr_db`` compares the site's tensor in the quantized and in the float network, errors of earlier layers
    included; it is infinite where nothing was lost. ``kl_alone`` is the divergence of the float network with this one
    site quantized, in nats.
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
    divergence KL(teacher || student) in nats, ``layers`` one row per site in execution order. ``unseen`` is False where
    there were no such images and the tuned ones had to serve: the figures flatter then.
    """

    images: int
    agreement: float
    kl: float
    layers: tuple[Layer, ...]
    unseen: bool = True

    def __str__(self) -> str:
        """The two figures, and a line per layer."""
        whose = "held-out" if self.unseen else "tuned"
        width = max((len(layer.site) for layer in self.layers), default=0)
        rows = [
            f"{layer.site:{width}}  {layer.kind:10}  {layer.bits} bits  "
            f"{layer.sqnr_db:6.1f} dB  {layer.kl_alone:.4f} nats"
            for layer in self.layers
        ]
        head = f"agreement {self.agreement:.1f} %, KL {self.kl:.4f} nats on {self.images} {whose} images"
        return "\n".join([head, "by layer: SQNR in place, KL of quantizing it alone", *rows])

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: None stands for it."""
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            if math.isinf(layer["sqnr_db"]):
                layer["sqnr_db"] = None
        figures = {"images": self.images, "unseen": self.unseen, "agreement": self.agreement, "kl": self.kl}
        return {**figures, "layers": layers}


@torch.no_grad()
def measure(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    config: QConfig,
    images: Tensor,
    *,
    unseen: bool = True,
    advance: Callable[[int], None] = lambda images: None,
) -> Quality:
    """Compares a prepared student with its teacher.

    Args:
        teacher: the captured float network.
        student: the prepared network, calibrated and maybe tuned.
        config: the configuration the student was prepared with.
        images: (N, C, H, W) in normalised space, N >= 1.
        unseen: whether tuning did without them.
        advance: called with the number of images that were just done.

    Returns:
        Agreement, divergence, and a row per site.

    Raises:
        ValueError: there is no image.
    """
    if len(images) == 0:
        raise ValueError("measure: images must hold at least one image, got none")
    sites = plan(teacher, config)
    behind = [_quantizer_behind(student, site) for site in sites]
    tapped = with_taps(teacher, [site.node for site in sites]), with_taps(student, [node.name for node in behind])
    alone = [_with_one(teacher, student, *pair) for pair in zip(sites, behind, strict=True)]
    # sums over the images; the device is read once, at the end
    signal, noise, kl_alone = (images.new_zeros(len(sites), dtype=torch.float64) for _ in range(3))
    agree, kl = (images.new_zeros((), dtype=torch.float64) for _ in range(2))
    for chunk in images.split(BATCH):
        (expected, before), (got, after) = (network(chunk) for network in tapped)
        agree += (got.argmax(1) == expected.argmax(1)).sum()
        kl += _kl(expected, got)
        for i, (reference, value, network) in enumerate(zip(before, after, alone, strict=True)):
            signal[i] += reference.double().square().sum()
            noise[i] += (reference - value).double().square().sum()
            kl_alone[i] += _kl(expected, network(chunk))
        advance(len(chunk))
    # 0 / 0 counts as nothing lost: a dead site stayed dead
    sqnr = torch.where(noise == 0, math.inf, 10 * torch.log10(signal / noise))
    rows = zip(sites, sqnr.tolist(), (kl_alone / len(images)).tolist(), strict=True)
    layers = tuple(Layer(site.name, site.kind, site.bits, db, loss) for site, db, loss in rows)
    return Quality(len(images), 100 * agree.item() / len(images), kl.item() / len(images), layers, unseen)


def _with_one(teacher: fx.GraphModule, student: fx.GraphModule, site: Site, quantizer: fx.Node) -> fx.GraphModule:
    """The float network with one of the student's quantizers."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(teacher.graph, copied))
    network = fx.GraphModule(teacher, graph)
    network.add_submodule("alone", copy.deepcopy(student.get_submodule(str(quantizer.target))))
    source = copied[find(teacher, site.node)]
    with graph.inserting_after(source):
        inserted = graph.call_module("alone", (source,))
    source.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)
    network.recompile()
    return network


def _quantizer_behind(student: fx.GraphModule, site: Site) -> fx.Node:
    return next(user for user in find(student, site.node).users if user.op == "call_module")


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student), summed over the batch, in double: what is left of equal networks is zero."""
    logs = student.double().log_softmax(1), teacher.double().log_softmax(1)
    return F.kl_div(*logs, reduction="sum", log_target=True)
