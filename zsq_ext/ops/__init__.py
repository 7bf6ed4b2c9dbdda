"""The ops: fast, bit-exact across backends, and usable alone under autograd, compile and export."""

import inspect

from zsq_ext.ops.adaround import adaround, adaround_many, adaround_start
from zsq_ext.ops.bn_act import bn_act
from zsq_ext.ops.bn_act_sums import channel_energy, channel_sums, statistics_of
from zsq_ext.ops.channel_range import channel_range
from zsq_ext.ops.fake_quant import fake_quant
from zsq_ext.ops.fake_quant_codes import dequantize, quantize
from zsq_ext.ops.fake_quant_many import fake_quant_many
from zsq_ext.ops.fake_quant_minmax import fake_quant_minmax
from zsq_ext.ops.heads_cam import cam_map, count_active
from zsq_ext.ops.heads_distill import KD_SCALINGS, Distilled, distill_head
from zsq_ext.ops.image import resize_crops, view_images
from zsq_ext.ops.lp_error import lp_error
from zsq_ext.ops.qdrop import qdrop

__all__ = [
    "KD_SCALINGS",
    "Distilled",
    "adaround",
    "adaround_many",
    "adaround_start",
    "bn_act",
    "cam_map",
    "channel_energy",
    "channel_range",
    "channel_sums",
    "count_active",
    "dequantize",
    "distill_head",
    "fake_quant",
    "fake_quant_many",
    "fake_quant_minmax",
    "lp_error",
    "qdrop",
    "quantize",
    "resize_crops",
    "statistics_of",
    "view_images",
]

# public op -> the registered one that it runs on a backend, where that is called otherwise; None where it is a few of
# PyTorch's operators
_RUNS: dict[str, str | None] = {
    "adaround_many": "adaround",
    "adaround_start": None,
    "channel_energy": None,
    "statistics_of": None,
}
PUBLIC = {name: _RUNS.get(name, name) for name in __all__ if inspect.isfunction(globals()[name])}
