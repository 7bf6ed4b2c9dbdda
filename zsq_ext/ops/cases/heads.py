"""The inputs that every backend of distill_head, cam_map and count_active meets."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops.cases import LAYOUTS, ErrorCase


@dataclass(frozen=True)
class DistillCase:
    """One input of distill_head.

    `values` is how far the student is from the teacher: "normal" as far as logits are spread; "close" by a hundredth,
    where a divergence cancels; "same" nowhere; "far" by hundreds, where probabilities vanish; "ties" has whole numbers,
    so that the largest logits are several; "special" has NaN and minus infinity in some samples.
    """

    name: str
    shape: tuple[int, int] = (12, 37)
    dtype: torch.dtype = torch.float32
    kd: str = "kl_batchmean"
    temperature: float = 4.0
    labels: bool = True
    trust: str = "below"  # or "up_to", "all", "given"
    values: str = "normal"
    layout: str = "contiguous"

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def args(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """The arguments of the op, the same on every device."""
        rng = torch.Generator().manual_seed(seed)
        samples, classes = self.shape

        def normal() -> Tensor:
            return torch.randn(self.shape, generator=rng, dtype=torch.float64)

        teacher, other = 3 * normal(), normal()
        if self.values == "ties":
            teacher, other = teacher.round(), other.round()
        gap = {"close": 0.01, "same": 0.0, "far": 200.0}.get(self.values, 1.0)
        student = teacher + gap * other
        if self.values == "far":
            teacher = 40 * teacher
        if self.values == "special":
            for sample, odd in enumerate((torch.nan, -torch.nan, -torch.inf)):
                student[sample, (9 * sample + 5) % classes] = odd
                teacher[sample + 3, (9 * sample + 6) % classes] = odd
        both = [LAYOUTS[self.layout](t.to(self.dtype).to(device)) for t in (student, teacher)]
        drawn = torch.randint(classes, (samples,), generator=rng)
        likely = teacher.nan_to_num().argmax(1) if classes else drawn
        labels = torch.where(torch.rand(samples, generator=rng) < 0.6, likely, drawn).to(device)
        easy = (torch.rand(samples, generator=rng) < 0.5).to(device)
        return (
            *both,
            labels if self.labels else None,
            easy if self.trust == "given" else None,
            self.kd,
            1.5,
            self.temperature,
            0.7,
            0.6 if self.trust in ("below", "up_to") else None,
            self.trust != "up_to",
        )

    def grads(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Upstream gradients of both terms."""
        kd, ce = torch.tensor([0.8, -1.3], dtype=self.compute, device=device)
        return kd, ce


def _distill_cases() -> list[DistillCase]:
    half, brain = torch.float16, torch.bfloat16
    cases = []
    for kd in ("kl_batchmean", "mse", "entropy"):
        cases += [
            DistillCase(kd, kd=kd),
            DistillCase(f"{kd}_close", kd=kd, values="close", temperature=20.0, shape=(8, 1000)),
            DistillCase(f"{kd}_same", kd=kd, values="same"),
            DistillCase(f"{kd}_far", kd=kd, values="far", temperature=1.0),
            DistillCase(f"{kd}_nan_inf", kd=kd, values="special"),
            DistillCase(f"{kd}_no_labels", kd=kd, labels=False, trust="all"),
            DistillCase(f"{kd}_fp16", kd=kd, dtype=half),
            DistillCase(f"{kd}_bf16", kd=kd, dtype=brain),
            DistillCase(f"{kd}_fp64", kd=kd, dtype=torch.float64),
        ]
    cases += [
        DistillCase("kl_mean", kd="kl_mean"),
        DistillCase("up_to", trust="up_to"),
        DistillCase("all", trust="all"),
        DistillCase("given", trust="given"),
        DistillCase("ties", values="ties", shape=(40, 24)),
        DistillCase("ties_tail", values="ties", shape=(40, 11), kd="mse"),
        DistillCase("two_classes", shape=(9, 2)),
        DistillCase("ten_classes", shape=(64, 10)),
        DistillCase("one_vector", shape=(5, 8)),
        DistillCase("aligned", shape=(6, 1024)),
        DistillCase("many_classes", shape=(3, 4099)),
        DistillCase("threads", shape=(40, 1000)),
        DistillCase("one_sample", shape=(1, 100)),
        DistillCase("empty", shape=(0, 10)),
        DistillCase("empty_mse", shape=(0, 10), kd="mse"),
        DistillCase("strided", layout="strided"),
        DistillCase("expanded", layout="expanded"),
        DistillCase("misaligned", layout="misaligned", shape=(6, 64)),
        DistillCase("permuted", layout="permuted"),
        DistillCase("fp16_misaligned", dtype=half, layout="misaligned", shape=(6, 64)),
        DistillCase("bf16_tail", dtype=brain, shape=(5, 13)),
        DistillCase("fp64_far", dtype=torch.float64, values="far", temperature=1.0),
    ]
    return cases


DISTILL = tuple(_distill_cases())


@dataclass(frozen=True)
class CamCase:
    """One activation, its weights, and the bounds of the ops that read it."""

    name: str
    shape: tuple[int, int, int, int] = (3, 20, 5, 7)
    dtype: torch.dtype = torch.float32
    floor: float | None = None
    upper: float | None = None
    values: str = "normal"  # or "special", or "edges": exactly 0 and upper, and their neighbours
    layout: str = "contiguous"

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def activation(self, device: str = "cpu", seed: int = 0) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        if self.values == "normal":
            x = 4 * torch.randn(self.shape, generator=rng, dtype=torch.float64)
        else:
            odd = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0]
            edges = [0.0, -0.0, 1e-7, -1e-7, self.upper or 1.0]
            table = torch.tensor(odd if self.values == "special" else edges, dtype=self.dtype)
            x = table[torch.randint(len(table), self.shape, generator=rng)]
            if self.values == "edges":
                x = torch.nextafter(x, x + torch.randint(-1, 2, self.shape, generator=rng).to(x.dtype))
        return LAYOUTS[self.layout](x.to(self.dtype).to(device))

    def args(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, float | None]:
        """(activation, alpha, floor), the same on every device."""
        rng = torch.Generator().manual_seed(seed + 1)
        alpha = torch.randn(self.shape[:2], generator=rng, dtype=self.compute)
        return self.activation(device, seed), alpha.to(device), self.floor

    def grad(self, device: str = "cpu") -> Tensor:
        """An upstream gradient of the map."""
        rng = torch.Generator().manual_seed(2)
        shape = (self.shape[0], *self.shape[2:])
        return torch.randn(shape, generator=rng, dtype=self.compute).to(device)


def _cam_cases() -> list[CamCase]:
    half, brain = torch.float16, torch.bfloat16
    cases = []
    for layout in ("contiguous", "channels_last"):
        cases += [
            CamCase(f"{layout}", layout=layout),
            CamCase(f"{layout}_floor", layout=layout, floor=1e-10, upper=6.0),
            CamCase(f"{layout}_resnet", (2, 520, 7, 7), layout=layout, upper=6.0),
            CamCase(f"{layout}_packed", (2, 40, 14, 14), layout=layout),
            CamCase(f"{layout}_tail", (2, 37, 3, 5), layout=layout),
            CamCase(f"{layout}_chunks", (2, 2048, 4, 4), layout=layout, floor=1e-10),
            CamCase(f"{layout}_nan_inf", layout=layout, values="special", upper=6.0),
            CamCase(f"{layout}_edges", (2, 24, 6, 6), layout=layout, values="edges", upper=0.75),
            CamCase(f"{layout}_threads", (5, 96, 17, 13), layout=layout),
            CamCase(f"{layout}_fp16", dtype=half, layout=layout, floor=1e-10),
            CamCase(f"{layout}_bf16", dtype=brain, layout=layout, upper=6.0),
            CamCase(f"{layout}_bf16_edges", dtype=brain, layout=layout, values="edges", upper=0.7),
            CamCase(f"{layout}_fp64", dtype=torch.float64, layout=layout, upper=6.0),
        ]
    cases += [
        CamCase("tiny", (2, 3, 2, 2)),
        CamCase("one_place", (3, 10, 1, 1)),
        CamCase("one_channel", (3, 1, 5, 5)),
        CamCase("one_channel_last", (3, 1, 5, 5), layout="channels_last"),
        CamCase("empty", (0, 8, 4, 4)),
        CamCase("no_channels", (2, 0, 4, 4)),
        CamCase("no_places", (2, 8, 0, 4)),
        CamCase("strided", layout="strided"),
        CamCase("expanded", layout="expanded"),
        CamCase("misaligned", (2, 16, 8, 8), layout="misaligned"),
        CamCase("permuted", layout="permuted"),
        CamCase("fp16_misaligned", (2, 16, 8, 8), dtype=half, layout="misaligned"),
    ]
    return cases


CAM = tuple(_cam_cases())

_NAN = float("nan")

# The good call: student and teacher float32 [4, 5], labels [4], tau 0.5.
DISTILL_ERRORS = (
    ErrorCase(
        "student_integer",
        TypeError,
        "distill_head: student must be a float32, float16, bfloat16 or float64 tensor, got torch.int64",
        {"student": torch.zeros(4, 5, dtype=torch.int64)},
    ),
    ErrorCase(
        "student_shape",
        ValueError,
        "distill_head: student must have shape (B, K) with K >= 2, got (4,)",
        {"student": torch.zeros(4)},
    ),
    ErrorCase(
        "one_class",
        ValueError,
        "distill_head: student must have shape (B, K) with K >= 2, got (4, 1)",
        {"student": torch.zeros(4, 1)},
    ),
    ErrorCase("teacher_none", TypeError, "distill_head: teacher must be a tensor, got NoneType", {"teacher": None}),
    ErrorCase(
        "teacher_dtype",
        TypeError,
        "distill_head: teacher must be torch.float32, got torch.float16",
        {"teacher": torch.zeros(4, 5, dtype=torch.float16)},
    ),
    ErrorCase(
        "teacher_shape",
        ValueError,
        "distill_head: teacher must have shape (4, 5), got (4, 6)",
        {"teacher": torch.zeros(4, 6)},
    ),
    ErrorCase(
        "teacher_device",
        ValueError,
        "distill_head: teacher must be on cpu, got meta",
        {"teacher": torch.zeros(4, 5, device="meta")},
    ),
    ErrorCase(
        "labels_dtype",
        TypeError,
        "distill_head: labels must be torch.int64, got torch.int32",
        {"labels": torch.zeros(4, dtype=torch.int32)},
    ),
    ErrorCase(
        "labels_shape",
        ValueError,
        "distill_head: labels must have shape (4,), got (4, 1)",
        {"labels": torch.zeros(4, 1, dtype=torch.int64)},
    ),
    ErrorCase(
        "labels_range",
        ValueError,
        "distill_head: labels must be in [0, 4], got 5 in sample 2",
        {"labels": torch.tensor([0, 4, 5, -1]), "check": True},
    ),
    ErrorCase(
        "kd_name",
        ValueError,
        "distill_head: kd must be one of kl_mean, kl_batchmean, mse, entropy, got 'kl'",
        {"kd": "kl"},
    ),
    ErrorCase(
        "temperature",
        ValueError,
        "distill_head: temperature must be positive and finite, got 0",
        {"temperature": 0},
    ),
    ErrorCase("alpha", ValueError, "distill_head: alpha must be finite, got nan", {"alpha": _NAN}),
    ErrorCase("ce", ValueError, "distill_head: ce must be finite, got nan", {"ce": _NAN}),
    ErrorCase("tau", ValueError, "distill_head: tau must be None or in [0, 1], got 1.5", {"tau": 1.5}),
    ErrorCase(
        "easy_dtype",
        TypeError,
        "distill_head: easy must be torch.bool, got torch.uint8",
        {"tau": None, "easy": torch.zeros(4, dtype=torch.uint8)},
    ),
    ErrorCase(
        "easy_and_tau",
        ValueError,
        "distill_head: easy must come with no tau, got 0.5",
        {"easy": torch.zeros(4, dtype=torch.bool)},
    ),
    ErrorCase(
        "easy_alone",
        ValueError,
        "distill_head: easy must come with labels, got None",
        {"labels": None, "tau": None, "easy": torch.zeros(4, dtype=torch.bool)},
    ),
)

# The good call: activation float32 [2, 3, 4, 4], alpha [2, 3].
CAM_ERRORS = (
    ErrorCase(
        "activation_list",
        TypeError,
        "cam_map: activation must be a float32, float16, bfloat16 or float64 tensor, got list",
        {"activation": [1.0]},
    ),
    ErrorCase(
        "activation_3d",
        ValueError,
        "cam_map: activation must have shape (B, K, H, W), got (2, 3, 4)",
        {"activation": torch.zeros(2, 3, 4)},
    ),
    ErrorCase("alpha_number", TypeError, "cam_map: alpha must be a tensor, got float", {"alpha": 1.0}),
    ErrorCase(
        "alpha_dtype",
        TypeError,
        "cam_map: alpha must be torch.float32 for torch.float32 activation, got torch.float64",
        {"alpha": torch.zeros(2, 3, dtype=torch.float64)},
    ),
    ErrorCase(
        "alpha_shape",
        ValueError,
        "cam_map: alpha must have shape (2, 3), got (3,)",
        {"alpha": torch.zeros(3)},
    ),
    ErrorCase(
        "alpha_device",
        ValueError,
        "cam_map: alpha must be on cpu, got meta",
        {"alpha": torch.zeros(2, 3, device="meta")},
    ),
    ErrorCase("floor", ValueError, "cam_map: floor must be None or finite, got nan", {"floor": _NAN}),
)

# The good call: x float32 [2, 3, 4, 4].
COUNT_ERRORS = (
    ErrorCase(
        "x_shape",
        ValueError,
        "count_active: x must have shape (B, K, H, W), got (3,)",
        {"x": torch.zeros(3)},
    ),
    ErrorCase(
        "x_integer",
        TypeError,
        "count_active: x must be a float32, float16, bfloat16 or float64 tensor, got torch.int32",
        {"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)},
    ),
    ErrorCase("upper", ValueError, "count_active: upper must be None or positive and finite, got 0", {"upper": 0}),
)

# What the benchmark times: the batches and classes of the published runs.
DISTILL_BENCH = (
    DistillCase("16x1000", (16, 1000), temperature=20.0),
    DistillCase("256x1000", (256, 1000), temperature=20.0),
    DistillCase("256x100", (256, 100), temperature=20.0),
    DistillCase("256x10", (256, 10), temperature=20.0),
    DistillCase("16x1000_bf16", (16, 1000), temperature=20.0, dtype=torch.bfloat16),
)

# The last maps of ResNet-18 and -50 at batch 16, and of ResNet-20 at 256.
CAM_BENCH = (
    CamCase("16x512x7x7", (16, 512, 7, 7)),
    CamCase("16x2048x7x7", (16, 2048, 7, 7)),
    CamCase("256x64x8x8", (256, 64, 8, 8)),
    CamCase("256x64x8x8_last", (256, 64, 8, 8), layout="channels_last"),
    CamCase("relu6_16x1280x7x7", (16, 1280, 7, 7), upper=6.0),
    CamCase("bf16_16x512x7x7", (16, 512, 7, 7), dtype=torch.bfloat16),
)
