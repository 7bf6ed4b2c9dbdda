"""Backend `triton`: the Triton kernels of kernels/*.py, on CUDA, or on the CPU under TRITON_INTERPRET=1."""

import importlib.util
import os

import torch

from zsq_ext.ops.triton.adaround import adaround, adaround_backward
from zsq_ext.ops.triton.bn_act import bn_act, bn_act_backward, channel_sums, channel_sums_backward
from zsq_ext.ops.triton.channel_range import channel_range
from zsq_ext.ops.triton.fake_quant import (
    dequantize,
    fake_quant,
    fake_quant_backward,
    fake_quant_lsq_backward,
    fake_quant_out,
    quantize,
)
from zsq_ext.ops.triton.fake_quant_many import fake_quant_many, fake_quant_many_backward, fake_quant_many_out
from zsq_ext.ops.triton.fake_quant_minmax import fake_quant_minmax, fake_quant_minmax_out
from zsq_ext.ops.triton.heads import cam_map, cam_map_backward, count_active, distill_head, distill_head_backward
from zsq_ext.ops.triton.image import resize_crops, resize_crops_backward, view_images, view_images_backward
from zsq_ext.ops.triton.lp_error import lp_error
from zsq_ext.ops.triton.qdrop import qdrop, qdrop_backward

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted() or torch.cuda.is_available():
        return None
    return "no CUDA device is visible, and TRITON_INTERPRET=1 is not set"


def refuses(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda" and not (device == "cpu" and _interpreted()):
        return f"takes CUDA tensors, not {device}"
    if device == "cpu" and dtype == torch.bfloat16:
        return "takes no torch.bfloat16 when interpreted: the interpreter truncates where hardware rounds"
    return None if dtype in _DTYPES else f"takes no {dtype}"
