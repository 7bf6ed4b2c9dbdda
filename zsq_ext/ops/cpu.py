"""Backend `cpu`: C++ with AVX2 and threads, from csrc/cpu/."""

from functools import partial
from typing import Any

import torch

from zsq_ext.ops import native
from zsq_ext.ops.layout import DTYPE_CODE


def missing() -> str | None:
    return native.problem


def refuses(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"takes CPU tensors, not {device}"
    return None if dtype in DTYPE_CODE else f"takes no {dtype}"


class _Call:
    def __call__(self, op: str, *fields: Any) -> None:
        getattr(native.module, f"cpu_{op}")(*fields, torch.get_num_threads())

    with_workspace = __call__


_call = _Call()

adaround = partial(native.adaround, _call)
adaround_backward = partial(native.adaround_backward, _call)
fake_quant = partial(native.fake_quant, _call)
fake_quant_out = partial(native.fake_quant_out, _call)
fake_quant_backward = partial(native.fake_quant_backward, _call)
fake_quant_lsq_backward = partial(native.fake_quant_lsq_backward, _call)
quantize = partial(native.quantize, _call)
dequantize = partial(native.dequantize, _call)
fake_quant_many = partial(native.fake_quant_many, _call)
fake_quant_many_out = partial(native.fake_quant_many_out, _call)
fake_quant_many_backward = partial(native.fake_quant_many_backward, _call)
fake_quant_minmax = partial(native.fake_quant_minmax, _call)
fake_quant_minmax_out = partial(native.fake_quant_minmax_out, _call)
channel_range = partial(native.channel_range, _call)
lp_error = partial(native.lp_error, _call)
bn_act = partial(native.bn_act, _call)
bn_act_backward = partial(native.bn_act_backward, _call)
channel_sums = partial(native.channel_sums, _call)
channel_sums_backward = partial(native.channel_sums_backward, _call)
distill_head = partial(native.distill_head, _call)
distill_head_backward = partial(native.distill_head_backward, _call)
cam_map = partial(native.cam_map, _call)
cam_map_backward = partial(native.cam_map_backward, _call)
count_active = partial(native.count_active, _call)
qdrop = partial(native.qdrop, _call)
qdrop_backward = partial(native.qdrop_backward, _call)
view_images = partial(native.view_images, _call)
view_images_backward = partial(native.view_images_backward, _call)
resize_crops = partial(native.resize_crops, _call)
resize_crops_backward = partial(native.resize_crops_backward, _call)
