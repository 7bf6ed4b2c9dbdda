"""Trains the two teachers that ship with the package on the embedded task and writes them as safetensors.

    python scripts/train_teachers.py resnet20 --images 400000 --threads 1

Every image is fresh (the training stream never repeats), so there is no augmentation and no held-out decision to take:
the recipe is fixed, ``val`` is printed along the way, ``test`` once at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from zsq_ext.zoo import small_nets
from zsq_ext.zoo.textured_shapes import CLASSES, TEST_IMAGES, TexturedShapes

WEIGHTS = Path(__file__).parent.parent / "zsq_ext" / "zoo" / "weights"
PEAK_LR = {"resnet20": 0.2, "mobilenet_small": 0.1}


@torch.no_grad()
def top1(model: nn.Module, split: str, count: int) -> float:
    """Accuracy in percent on the first ``count`` images of a split."""
    model.eval()
    right = 0
    for images, labels in TexturedShapes(split).batches(count):
        right += int((model(images.to(memory_format=torch.channels_last)).argmax(1) == labels).sum())
    return 100 * right / count


def train(name: str, images: int, batch: int, seed: int) -> nn.Module:
    """SGD with Nesterov momentum, one-cycle cosine learning rate, weight decay 5e-4 on matrices only."""
    torch.manual_seed(seed)
    model = getattr(small_nets, name)(len(CLASSES)).to(memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 5e-4}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    steps = images // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR[name], total_steps=steps, pct_start=0.15, cycle_momentum=False, final_div_factor=1e3
    )
    data, begin = TexturedShapes("train"), time.time()
    for step in range(steps):
        model.train()
        x, y = data.images(range(step * batch, (step + 1) * batch))
        loss = nn.functional.cross_entropy(model(x.to(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            line = f"step {step + 1}/{steps} loss {loss.item():.3f} {time.time() - begin:.0f} s"
            if (step + 1) % 500 == 0:
                line += f" val {top1(model, 'val', 2000):.2f}"
            print(line, flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(PEAK_LR))
    parser.add_argument("--images", type=int, default=400_000, help="training images in all, each seen once")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin = time.time()
    model = train(args.model, args.images, args.batch, args.seed)
    facts = {
        "task": "textured_shapes, seed 0",
        "recipe": f"{args.images} images, batch {args.batch}, seed {args.seed}",
        "top1_val": f"{top1(model, 'val', TEST_IMAGES):.2f}",
        "top1_test": f"{top1(model, 'test', TEST_IMAGES):.2f}",
    }
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(weights, args.out / f"{args.model}.safetensors", metadata=facts)
    print(json.dumps({**facts, "seconds": round(time.time() - begin)}))


if __name__ == "__main__":
    main()
