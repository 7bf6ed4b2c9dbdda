"""What every op means, in plain PyTorch. Where documentation and this backend disagree, this backend wins.

Runs on any device and allocates freely. The other backends hold the same functions, with the same names and
argument order, and give the same bits.
"""

import torch

from zsq_ext.ops.reference.adaround import adaround, adaround_backward
from zsq_ext.ops.reference.bn_act import bn_act, bn_act_backward, channel_sums, channel_sums_backward
from zsq_ext.ops.reference.channel_range import channel_range
from zsq_ext.ops.reference.fake_quant import (
    dequantize,
    fake_quant,
    fake_quant_backward,
    fake_quant_lsq_backward,
    fake_quant_out,
    quantize,
)
from zsq_ext.ops.reference.fake_quant_many import fake_quant_many, fake_quant_many_backward, fake_quant_many_out
from zsq_ext.ops.reference.fake_quant_minmax import fake_quant_minmax, fake_quant_minmax_out
from zsq_ext.ops.reference.heads import cam_map, cam_map_backward, count_active, distill_head, distill_head_backward
from zsq_ext.ops.reference.image import resize_crops, resize_crops_backward, view_images, view_images_backward
from zsq_ext.ops.reference.lp_error import lp_error
from zsq_ext.ops.reference.qdrop import qdrop, qdrop_backward


def missing() -> str | None:
    return None


def refuses(device: str, dtype: torch.dtype) -> str | None:
    return None
