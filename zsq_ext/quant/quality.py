"""What quantization cost, measured without labels: student against teacher on held-out synthetic images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from zsq_ext.quant.config import QConfig
from zsq_ext.quant.graph import find, is_classifier, leaves, outputs, with_taps
from zsq_ext.quant.prepare import Site, plan

BATCH = 32
"""Images at a time: every site's tensor is held twice meanwhile, 0.6 GB for ResNet-18 at 224 pixels."""


@dataclass(frozen=True)
class Layer:
    """One site: how well its values survive (SQNR) and what quantizing it alone costs (sensitivity).

    ``sqnr_db`` compares the site's tensor in the quantized and in the float network, errors of earlier layers
    included; it is infinite where nothing was lost. The others are of the float network with this one site quantized:
    ``kl_alone`` its divergence in nats, NaN for a network that is no classifier, and ``output_db_alone`` the SQNR of
    its worst output. Where weights were rewritten, as DFQ equalises them, the float network is the rewritten one.
    """

    site: str
    kind: str
    bits: int
    sqnr_db: float
    kl_alone: float
    output_db_alone: float = math.nan


@dataclass(frozen=True)
class Quality:
    """Label-free quality on ``images`` synthetic images that tuning never saw.

    ``agreement`` is the percentage of images on which student and teacher predict the same class, ``kl`` the mean
    divergence KL(teacher || student) in nats, ``layers`` one row per site in execution order. ``unseen`` is False where
    there were no such images and the tuned ones had to serve: the figures flatter then.

    ``outputs_db`` is the SQNR of every tensor that the network returns, by its path (``"boxes.0"``, ``""`` for a lone
    one). A network that is no classifier has nothing else: its agreement and divergence are NaN.

    ``rewritten``: the layers' figures compare with a float network that was rewritten first, as DFQ equalises it; the
    others compare with the teacher always.
    """

    images: int
    agreement: float
    kl: float
    layers: tuple[Layer, ...]
    unseen: bool = True
    outputs_db: Mapping[str, float] = field(default_factory=dict)
    rewritten: bool = False

    def __str__(self) -> str:
        """The figures, and a line per layer."""
        whose = "held-out" if self.unseen else "tuned"
        layers = "by layer, against the rewritten float network" if self.rewritten else "by layer"
        width = max((len(layer.site) for layer in self.layers), default=0)
        classifier = not math.isnan(self.kl)
        rows = [
            f"{layer.site:{width}}  {layer.kind:10}  {layer.bits} bits  {layer.sqnr_db:6.1f} dB  "
            + (f"{layer.kl_alone:.4f} nats" if classifier else f"{layer.output_db_alone:6.1f} dB")
            for layer in self.layers
        ]
        if classifier:
            head = f"agreement {self.agreement:.1f} %, KL {self.kl:.4f} nats on {self.images} {whose} images"
            return "\n".join([head, f"{layers}: SQNR in place, KL of quantizing it alone", *rows])
        figures = ", ".join(f"{path or 'output'} {db:.1f} dB" for path, db in self.outputs_db.items())
        head = f"SQNR of the outputs: {figures} on {self.images} {whose} images"
        return "\n".join([head, f"{layers}: SQNR in place, SQNR of the worst output when it alone is quantized", *rows])

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has neither infinity nor NaN: None stands for them."""
        return _finite(asdict(self))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def measure(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    config: QConfig,
    images: Tensor,
    *,
    reference: fx.GraphModule | None = None,
    unseen: bool = True,
    advance: Callable[[int], None] = lambda images: None,
) -> Quality:
    """Compares a prepared student with its teacher.

    Args:
        teacher: the captured float network.
        student: the prepared network, calibrated and maybe tuned.
        config: the configuration the student was prepared with.
        images: (N, C, H, W) in normalised space, N >= 1.
        reference: the float network whose layers the student rounds, where its weights are not the teacher's: what is
            said of single sites is said against it.
        unseen: whether tuning did without them.
        advance: called with the number of images that were just done.

    Returns:
        Agreement, divergence, the outputs' SQNR, and a row per site.

    Raises:
        ValueError: there is no image.
    """
    if len(images) == 0:
        raise ValueError("measure: images must hold at least one image, got none")
    sites = plan(teacher, config)
    exact = reference or teacher
    behind = [_quantizer_behind(student, site) for site in sites]
    tapped = with_taps(exact, [site.node for site in sites]), with_taps(student, [node.name for node in behind])
    alone = [_with_one(exact, student, *pair) for pair in zip(sites, behind, strict=True)]
    classifier = is_classifier(teacher)
    paths = list(outputs(teacher))

    def zeros(*shape: int) -> Tensor:
        return images.new_zeros(shape, dtype=torch.float64)

    # sums over the images; the device is read once, at the end
    agree, kl, kl_alone, inside = zeros(), zeros(), zeros(len(sites)), zeros(2, len(sites))
    whole, whole_alone = zeros(2, len(paths)), zeros(2, len(sites), len(paths))
    for chunk in images.split(BATCH):
        (own, before), (got, after) = (network(chunk) for network in tapped)
        expected = own if reference is None else teacher(chunk)
        inside += _powers(before, after)
        whole += _powers(leaves(expected).values(), leaves(got).values())
        if classifier:
            agree += (got.argmax(1) == expected.argmax(1)).sum()
            kl += _kl(expected, got)
        for i, network in enumerate(alone):
            result = network(chunk)
            whole_alone[:, i] += _powers(leaves(own).values(), leaves(result).values())
            if classifier:
                kl_alone[i] += _kl(own, result)
        advance(len(chunk))
    worst = _decibels(whole_alone).amin(1).tolist()
    costs = (kl_alone / len(images)).tolist() if classifier else [math.nan] * len(sites)
    by_site = zip(sites, _decibels(inside).tolist(), costs, worst, strict=True)
    return Quality(
        images=len(images),
        agreement=100 * agree.item() / len(images) if classifier else math.nan,
        kl=kl.item() / len(images) if classifier else math.nan,
        layers=tuple(Layer(site.name, site.kind, site.bits, *figures) for site, *figures in by_site),
        unseen=unseen,
        outputs_db=dict(zip(paths, _decibels(whole).tolist(), strict=True)),
        rewritten=reference is not None,
    )


def _powers(references: Iterable[Tensor], values: Iterable[Tensor]) -> Tensor:
    """(2, T): the power of each of T tensors, and that of its error."""
    pairs = [(reference.double(), value.double()) for reference, value in zip(references, values, strict=True)]
    return torch.stack([torch.stack([a.square().sum(), (a - b).square().sum()]) for a, b in pairs], 1)


def _decibels(powers: Tensor) -> Tensor:
    """Signal to noise; 0 / 0 counts as nothing lost: a dead site stayed dead."""
    signal, noise = powers
    return torch.where(noise == 0, math.inf, 10 * torch.log10(signal / noise))


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
