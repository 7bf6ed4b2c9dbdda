"""The loss of fine-tuning: distillation from the float network, and the published ideas around it.

    L = [KD + ce * CE_easy + FA](x) + pert * [KD + ce * CE_easy + FA](x + eps sign g) + cam * CAM(x)

SynQ's equation 6 and its released code are two settings of it; HAST, IntraQ and the plain fine-tuning of noise are
others. One step costs two forwards of each network at most: the maps come out of the clean forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from zsq_ext.core.check import require
from zsq_ext.core.steps import Terms, sum_terms
from zsq_ext.ops import KD_SCALINGS, distill_head
from zsq_ext.ops.heads_distill import Distilled
from zsq_ext.quant.fuse import fuse
from zsq_ext.quant.graph import attribute, find, with_taps
from zsq_ext.quant.prepare import weights_together
from zsq_ext.quant.structure import ClassifierTail, cam_layer, classifier_tail, feature_maps
from zsq_ext.synth.objectives import wrong_over_right
from zsq_ext.tune.cam import ALPHA_FLOOR, autograd_alpha, bn_slope, cam_classes, cam_loss, closed_form_alpha
from zsq_ext.tune.ideas import CamAlign, FeatureAlign, Idea, Mix, Perturb, SoftLabels
from zsq_ext.tune.losses import feature_alignment, signed_perturbation
from zsq_ext.tune.mix import Labels, MixedLabels

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class DistillConfig:
    """The distillation terms. Defaults: SynQ, HAST and IntraQ (alpha 20, T 20: a factor of 8000)."""

    kd: str = "kl_batchmean"  # or kl_mean, mse, entropy: see ops.distill_head
    alpha: float = 20.0
    temperature: float = 20.0
    ce: float = 0.5  # lambda_CE
    ideas: tuple[Idea, ...] = ()

    def __post_init__(self) -> None:
        require("DistillConfig", "kd", self.kd, self.kd in KD_SCALINGS, f"be one of {', '.join(KD_SCALINGS)}")
        require("DistillConfig", "temperature", self.temperature, self.temperature > 0, "be positive")
        for name in ("alpha", "ce"):
            require("DistillConfig", name, getattr(self, name), getattr(self, name) >= 0, "be at least 0")

    def find(self, kind: type[Kind]) -> Kind | None:
        """The idea of that kind, if it is switched on and has any weight."""
        for idea in self.ideas:
            if isinstance(idea, kind) and getattr(idea, "weight", 1.0) > 0:
                return idea
        return None


class Distiller:
    """From a batch of images and labels to weighted loss terms.

    Args:
        teacher: the captured float network.
        student: the prepared network; its graph is the teacher's with quantizers, so node names are shared.
        config: terms and ideas.
        fused: False runs both networks operator by operator, as they were captured; to measure against.

    Attributes:
        plain: the terms are of the logits alone: no idea needs maps or images that were moved.

    Raises:
        ValueError: CAM alignment is on and the network has no convolution with a map larger than 1 x 1, feature
            alignment is on and it has no batch norm, or the teacher's answers are to be mixed though more than they
            alone is compared.
    """

    def __init__(
        self, teacher: fx.GraphModule, student: fx.GraphModule, config: DistillConfig, *, fused: bool = True
    ) -> None:
        self.config = config
        self._align = config.find(FeatureAlign)
        self._cam = config.find(CamAlign)
        self._perturb = config.find(Perturb)
        self._soft = config.find(SoftLabels)
        self.plain = self._align is None and self._cam is None and self._perturb is None
        mix = config.find(Mix)
        if mix is not None and not mix.teacher and not self.plain:
            others = [idea for idea in (self._align, self._cam, self._perturb) if idea is not None]
            raise ValueError(f"Mix: teacher must be True beside {type(others[0]).__name__}, got False")
        self._teacher = _Network(teacher, self._align is not None, self._cam is not None, fused)
        self._student = _Network(student, self._align is not None, self._cam is not None, fused)

    def __call__(self, images: Tensor, labels: Labels) -> Terms:
        """Loss terms of one batch, each already times its weight; their sum is the loss.

        Args:
            images: (B, C, H, W), in the networks' input space.
            labels: (B,) int64, or both labels of mixed images.
        """
        if isinstance(labels, MixedLabels) and labels.answers is not None:
            return self.of_logits(self._student.run(images.detach(), with_grad=True).logits, labels.answers, labels)
        perturb = self._perturb
        x = images.detach().requires_grad_(perturb is not None)
        maps = self._cam is not None
        teacher = self._teacher.run(x, with_grad=perturb is not None and perturb.through_teacher, maps=maps)
        student = self._student.run(x, with_grad=True, maps=maps)
        clean, easy = self._bracket(student, teacher, labels, None, self._align)
        terms = dict(clean)
        if perturb is not None:
            (direction,) = torch.autograd.grad(sum_terms(clean), [x], retain_graph=True)
            moved = signed_perturbation(x.detach(), direction, perturb.eps)
            align = self._align if perturb.feature_alignment else None
            hard, _ = self._bracket(
                self._student.run(moved, with_grad=True), self._teacher.run(moved), labels, easy, align
            )
            terms |= {f"{name}_perturbed": perturb.weight * value for name, value in hard.items()}
        if self._cam is not None:
            labels = labels.larger if isinstance(labels, MixedLabels) else labels
            terms["cam"] = self._cam.weight * self._map_distance(self._cam, student, teacher, labels, images.shape[2:])
        return terms

    def of_logits(self, student: Tensor, teacher: Tensor, labels: Labels) -> Terms:
        """The terms of logits that were computed elsewhere, as ``__call__`` gives them for the images behind.

        Args:
            student, teacher: (B, K); gradients pass through both, as far as they have graphs.
            labels: (B,) int64, or both labels of mixed images.

        Raises:
            ValueError: an idea needs more than logits (``plain`` is False).
        """
        if not self.plain:
            raise ValueError("Distiller.of_logits: ideas must need logits alone, got ones that need maps or images")
        return self._bracket(_Seen(student, (), {}), _Seen(teacher, (), {}), labels, None, None)[0]

    def answer(self, images: Tensor) -> Tensor:
        """The student's logits (B, K), with a graph back to its parameters and to images that have one."""
        return self._student.run(images, with_grad=True).logits

    def ask(self, images: Tensor) -> Tensor:
        """The teacher's logits (B, K), without a graph."""
        return self._teacher.run(images).logits

    def _bracket(
        self,
        student: _Seen,
        teacher: _Seen,
        labels: Labels,
        easy: Sequence[Tensor] | None,
        align: FeatureAlign | None,
    ) -> tuple[Terms, Sequence[Tensor] | None]:
        """The terms, and per set of labels whose are trusted: decided here, unless it is known already."""
        hard = self.config.ce > 0
        sets = labels[:2] if isinstance(labels, MixedLabels) else (labels,)
        given = [(own, None) for own in sets] if easy is None else list(zip(sets, easy, strict=True))
        heads = [self._head(student, teacher, *one) for one in given] if hard else [self._head(student, teacher)]
        terms = {"kd": heads[0].kd}
        if hard and isinstance(labels, MixedLabels):
            terms["ce"] = self._mixed(student, labels, *heads)
        elif hard:
            terms["ce"] = heads[0].ce
        if align is not None:
            terms["fa"] = align.weight * feature_alignment(teacher.features, student.features)
        return terms, [head.easy for head in heads] if hard else None

    def _head(
        self, student: _Seen, teacher: _Seen, labels: Tensor | None = None, easy: Tensor | None = None
    ) -> Distilled:
        config, soft = self.config, self._soft
        return distill_head(
            student.logits,
            teacher.logits,
            labels,
            kd=config.kd,
            alpha=config.alpha,
            temperature=config.temperature,
            ce=config.ce,
            tau=soft.tau if soft is not None and easy is None else None,
            strict=soft is not None and soft.strict,
            easy=easy,
        )

    def _mixed(self, student: _Seen, labels: MixedLabels, first: Distilled, second: Distilled) -> Tensor:
        """Both labels' cross-entropies by their shares, each over the samples that the teacher trusts it on."""
        share = labels.share
        if share.dim() == 0:
            return share * first.ce + (1 - share) * second.ce
        each = (  # the head adds its samples up, and these have a share each
            portion * head.easy * F.softplus(wrong_over_right(student.logits, own))
            for portion, head, own in ((share, first, labels.first), (1 - share, second, labels.second))
        )
        return self.config.ce * torch.stack(list(each)).sum(0).mean()

    def _map_distance(self, cam: CamAlign, student: _Seen, teacher: _Seen, labels: Tensor, size: torch.Size) -> Tensor:
        return cam_loss(
            self._student.alpha(student, cam_classes(student.logits, labels, cam.rule)),
            student.cam["map"],
            self._teacher.alpha(teacher, cam_classes(teacher.logits, labels, cam.rule)),
            teacher.cam["map"],
            normalise=cam.normalise,
            size=(int(size[0]), int(size[1])),
            floor=ALPHA_FLOOR if cam.clamp else None,
        )


@dataclass(frozen=True)
class _Seen:
    """What one forward of a network showed.

    ``features`` are maps or, of a fused network, their channel energies; ``cam`` holds what its class activation map is
    read from.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    cam: dict[str, Tensor]


class _Network:
    """A network with taps on the maps that the losses compare."""

    def __init__(self, module: fx.GraphModule, align: bool, cam: bool, fused: bool = True) -> None:
        self.module = module
        self.calls = 0
        self._features = feature_maps(module) if align else []
        if align and not self._features:
            raise ValueError(
                "FeatureAlign: the model must have batch norms for FeatureAlign to compare, got none; "
                "ideas=(FeatureAlign(0),) leaves it out"
            )
        self._tail: ClassifierTail | None = None
        self._cam: dict[str, str] = {}
        if cam:
            self._tail = classifier_tail(module)
            if self._tail is not None and _positions(module, self._tail.features) == 1:
                self._tail = None  # a map of one position explains nothing: an earlier layer's is taken
            self._cam = _cam_nodes(module, self._tail)
        names = [*self._features, *self._cam.values()]
        if fused:
            self._tapped = fuse(with_taps(weights_together(module), names), energies=len(self._features))
        else:
            self._tapped = with_taps(module, names)

    def run(self, images: Tensor, with_grad: bool = False, maps: bool = False) -> _Seen:
        """One forward.

        Args:
            images: (B, C, H, W).
            with_grad: the losses may be differentiated through this forward.
            maps: ``alpha`` will be asked for.
        """
        self.calls += 1
        # the open tail's channel weights are a gradient, so its logits need a graph even where nothing else does
        own_graph = maps and self._tail is None and not with_grad
        x = images.detach().requires_grad_() if own_graph else images
        with torch.set_grad_enabled(with_grad or own_graph):
            logits, taps = self._tapped(x)
        count = len(self._features)
        features, cam = taps[:count], dict(zip(self._cam, taps[count:], strict=True))
        if own_graph:
            cam["logits"] = logits
            logits, features = logits.detach(), tuple(feature.detach() for feature in features)
        return _Seen(logits, features, cam)

    def alpha(self, seen: _Seen, classes: Tensor) -> Tensor:
        """Grad-CAM's channel weights: in closed form where the tail allows it, by autograd elsewhere."""
        tail = self._tail
        if tail is None:
            return autograd_alpha(seen.cam.get("logits", seen.logits), seen.cam["map"], classes)
        norm = tail.batch_norm
        slope = bn_slope(attribute(self.module, str(norm.weight)), attribute(self.module, str(norm.var)), norm.eps)
        upper = 6.0 if tail.activation == "relu6" else None
        return closed_form_alpha(seen.cam["classifier"], classes, slope, seen.cam["pre_activation"], upper=upper)


def _positions(module: fx.GraphModule, name: str) -> int:
    """Height times width of a node's map."""
    shape = find(module, name).meta["val"].shape
    return int(shape[2]) * int(shape[3])


def _cam_nodes(module: fx.GraphModule, tail: ClassifierTail | None) -> dict[str, str]:
    if tail is not None:
        return {"map": tail.features, "pre_activation": tail.pre_activation, "classifier": tail.classifier}
    layer = cam_layer(module)
    if layer is None:
        raise ValueError(
            "CamAlign: the model must have a convolution with a map larger than 1 x 1 for CamAlign, got none; "
            "ideas=(CamAlign(0),) leaves it out"
        )
    return {"map": layer}
