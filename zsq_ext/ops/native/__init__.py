"""What the backends `cpu` and `cuda` share: the native module, and how its functions are called with tensors.

A function here has the arguments of its namesake in `reference` behind `call`, which is the one thing the two backends
have each for themselves: `call(op, *fields)` runs an op of the native module on the fields of its struct, in order, and
`call.with_workspace(op, *fields)` also gives it the memory that its sums want, where a backend keeps it outside.
"""

from zsq_ext.ops.native.adaround import adaround, adaround_backward
from zsq_ext.ops.native.bn_act import bn_act, bn_act_backward, channel_sums, channel_sums_backward
from zsq_ext.ops.native.channel_range import channel_range
from zsq_ext.ops.native.fake_quant import (
    dequantize,
    fake_quant,
    fake_quant_backward,
    fake_quant_lsq_backward,
    fake_quant_out,
    quantize,
)
from zsq_ext.ops.native.fake_quant_many import fake_quant_many, fake_quant_many_backward, fake_quant_many_out
from zsq_ext.ops.native.fake_quant_minmax import fake_quant_minmax, fake_quant_minmax_out
from zsq_ext.ops.native.heads import cam_map, cam_map_backward, count_active, distill_head, distill_head_backward
from zsq_ext.ops.native.image import resize_crops, resize_crops_backward, view_images, view_images_backward
from zsq_ext.ops.native.lp_error import lp_error
from zsq_ext.ops.native.qdrop import qdrop, qdrop_backward

problem: str | None = None
try:
    from zsq_ext import _C as module
except ImportError as error:  # a source tree that was never built: the reference still works
    module, problem = None, f"the native module does not load ({error})"
