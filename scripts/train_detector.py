"""Trains the detector that ships with the package on the embedded scenes and writes it as safetensors.

    python scripts/train_detector.py --images 200000 --threads 1

Every scene is fresh (the training stream never repeats), so there is no augmentation and no held-out decision to take:
the recipe is fixed, ``val`` is printed along the way, ``test`` once at the end. A run that was stopped goes on with
``--resume``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from zsq_ext.core.progress import Progress
from zsq_ext.core.run import Run
from zsq_ext.core.steps import Stage, State, Terms, run_steps
from zsq_ext.zoo.average_precision import precision_of
from zsq_ext.zoo.shape_scenes import CLASSES, TEST_IMAGES, Objects, ShapeScenes
from zsq_ext.zoo.small_detector import Heads, cells, fpn_small

WEIGHTS = Path(__file__).parent.parent / "zsq_ext" / "zoo" / "weights"
PEAK_LR = 3e-3
LARGE = 18  # pixels: objects with a longer side belong to the coarser level
RADIUS = 1.5  # strides: cells this near an object's centre, and inside its box, answer for it


def answers(objects: Objects, centres: Tensor, strides: Tensor) -> Tensor:
    """Which object each cell answers for: (N, P) int64, -1 for none; of several objects the smallest."""
    boxes = objects.boxes[:, None]  # (N, 1, M, 4)
    sides = boxes[..., 2:] - boxes[..., :2]
    at, stride = centres[None, :, None], strides[None, :, None]
    inside = ((at > boxes[..., :2]) & (at < boxes[..., 2:])).all(-1)
    near = ((at - (boxes[..., :2] + boxes[..., 2:]) / 2).abs() < RADIUS * stride[..., None]).all(-1)
    level = (sides.amax(-1) > LARGE) == (stride > strides.min())
    there = inside & near & level & (objects.labels >= 0)[:, None]
    area = sides.prod(-1).expand_as(there).masked_fill(~there, float("inf"))
    smallest, which = area.min(-1)
    return which.where(smallest.isfinite(), -1)


def loss_terms(heads: Heads, objects: Objects) -> Terms:
    """Quality focal loss (Li et al. 2020) with the box's overlap as its target, and generalised IoU (Rezatofighi 2019).

    Both are sums over the cells, divided by the number of cells that answer for an object.
    """
    logits, boxes, centres, strides = cells(heads)
    which = answers(objects, centres, strides)
    image, cell = (which >= 0).nonzero(as_tuple=True)
    target = objects.boxes[image, which[image, cell]]
    found = boxes[image, cell]
    low, high = torch.maximum(found[:, :2], target[:, :2]), torch.minimum(found[:, 2:], target[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    union = (found[:, 2:] - found[:, :2]).prod(1) + (target[:, 2:] - target[:, :2]).prod(1) - shared
    low, high = torch.minimum(found[:, :2], target[:, :2]), torch.maximum(found[:, 2:], target[:, 2:])
    hull = (high - low).prod(1)
    iou = shared / union
    quality = torch.zeros_like(logits)
    quality[image, cell, objects.labels[image, which[image, cell]]] = iou.detach().clamp(min=0)
    focus = (quality - logits.sigmoid()).square()
    classes = (focus.detach() * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")).sum()
    count = max(len(image), 1)
    return {"classes": classes / count, "boxes": 2 * (1 - iou + (hull - union) / hull).sum() / count}


def precision(model: nn.Module, split: str, count: int) -> dict[str, float]:
    """AP50 and AP in percent on the first ``count`` scenes of a split."""
    return precision_of(model.eval(), ShapeScenes(split).batches(count))


def train(stage: Stage, model: nn.Module, images: int, batch: int) -> None:
    """AdamW, warm-up over a tenth of the steps and a cosine down to nothing, weight decay 0.05 on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    steps, data = images // batch, ShapeScenes("train")

    def step(n: int) -> Terms:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(10 * (n + 1) / steps, (1 + math.cos(math.pi * n / steps)) / 2)
        model.train()
        x, objects = data.images(range(n * batch, (n + 1) * batch))
        with torch.autocast("cpu", torch.bfloat16):  # nearly twice as fast where the processor multiplies bfloat16
            heads = model(x.to(memory_format=torch.channels_last))
        terms = loss_terms({name: [level.float() for level in levels] for name, levels in heads.items()}, objects)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        return terms

    def after(n: int) -> dict[str, float] | None:
        if (n + 1) % 500:
            return None
        row = precision(model, "val", 500)
        stage.progress.say(f"step {n + 1}: val {row}")
        return row

    state = State(model.state_dict(), {"adamw": optimizer})
    run_steps(stage, steps, step, state, advice="Lower PEAK_LR.", after=after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200_000, help="training scenes in all, each seen once")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--run", type=Path, default=Path("runs/train_detector"), help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="continue the run that the folder holds")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin = time.time()
    recipe = {"images": args.images, "batch": args.batch, "seed": args.seed}
    torch.manual_seed(args.seed)
    model = fpn_small(len(CLASSES))
    for head in model.classes:  # a cell is rarely an object: start from a score of 0.01, as focal losses do
        nn.init.constant_(head[-1].bias, -4.6)
    model = model.to(memory_format=torch.channels_last)
    stage = Stage(Run(args.run, recipe, resume=args.resume), "train", args.seed, Progress())
    train(stage, model, args.images, args.batch)
    facts = {"task": "shape_scenes, seed 0", "recipe": ", ".join(f"{name} {value}" for name, value in recipe.items())}
    for split in ("val", "test"):
        for name, value in precision(model, split, TEST_IMAGES).items():
            facts[f"{name.lower()}_{split}"] = f"{value:.2f}"
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(weights, args.out / "fpn_small.safetensors", metadata=facts)
    print(json.dumps({**facts, "seconds": round(time.time() - begin)}))


if __name__ == "__main__":
    main()
