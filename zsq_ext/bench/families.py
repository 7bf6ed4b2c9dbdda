"""The suite `families`: each op of zsq_ext.ops beside eager PyTorch and ATen's fused op, where there is one."""

import math
from typing import Any

import torch

from zsq_ext.bench import (
    adaround,
    bn_act,
    codes_and_ranges,
    fake_quant,
    fake_quant_many,
    fake_quant_minmax,
    heads,
    image,
    lp_error,
    qdrop,
    timing,
)
from zsq_ext.bench.subject import Subject, measured
from zsq_ext.core.progress import Progress

# family -> from a device to its subjects
FAMILIES = {
    "fake_quant": fake_quant.subjects,
    "codes_and_ranges": codes_and_ranges.subjects,
    "fake_quant_many": fake_quant_many.subjects,
    "fake_quant_minmax": fake_quant_minmax.subjects,
    "lp_error": lp_error.subjects,
    "adaround": adaround.subjects,
    "qdrop": qdrop.subjects,
    "bn_act": bn_act.subjects,
    "image": image.subjects,
    "heads": heads.subjects,
}

# The ops of the families that are called otherwise than these.
OPS = {
    "fake_quant": ("fake_quant_lsq",),
    "codes_and_ranges": ("quantize", "dequantize", "channel_range"),
    "image": ("view_images", "resize_crops", "low_pass"),
    "heads": ("distill_head", "cam_map", "count_active"),
}


def rows(
    progress: Progress, *, only: str | None = None, inductor: bool = False, seconds: float | None = None
) -> list[dict[str, Any]]:
    """All families, one, or one op.

    Args:
        progress: where to report.
        only: a family's name, or an op's.
        inductor: also time what torch.compile makes of the eager peer; each takes seconds to compile.
        seconds: about how long each subject is timed, its peers included.

    Raises:
        ValueError: no family and no op has that name, or seconds is negative or not finite.
    """
    family_of = {op: family for family, ops in OPS.items() for op in ops}
    if only is not None and only not in (*FAMILIES, *family_of):
        names = f"{', '.join(FAMILIES)}, or an op of theirs, {', '.join(family_of)}"
        raise ValueError(f"bench: only must be one of {names}, got {only!r}")
    seconds = timing.SECONDS if seconds is None else seconds
    if not 0 <= seconds < math.inf:
        raise ValueError(f"bench: seconds must be at least 0 and finite, got {seconds}")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    subjects: list[Subject] = []
    for device in devices:
        for name, family in FAMILIES.items():
            if only in (None, name):
                subjects += family(device)
            elif name == family_of.get(only):
                subjects += (subject for subject in family(device) if subject.op == only)
    found = []
    with progress.stage("families", len(subjects)) as stage:
        for subject in subjects:
            found += measured(subject, inductor, seconds)
            stage.advance(note=f"{subject.op} {subject.case}")
    return found
