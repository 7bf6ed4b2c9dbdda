"""Backend `cuda`: CUDA C++ from kernels/*.cu, launched on the current stream of the tensors' device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_ext.ops import native
from zsq_ext.ops.layout import DTYPE_CODE, head


def missing() -> str | None:
    if native.problem:
        return native.problem
    if not native.module.cuda_archs:
        return "the native module was built without CUDA (no nvcc was found, or ZSQ_CUDA=OFF)"
    if not torch.backends.cuda.is_built():
        return "this build of torch has no CUDA"
    return None if torch.cuda.is_available() else "no CUDA device is visible"


def refuses(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return f"takes CUDA tensors, not {device}"
    return None if dtype in DTYPE_CODE and dtype != torch.float64 else f"takes no {dtype}"


class _Call:
    def __call__(self, op: str, *fields: Any) -> None:
        error = getattr(native.module, f"cuda_{op}")(*fields, torch.cuda.current_stream().cuda_stream)
        if error:
            raise RuntimeError(f"{op}: CUDA launch failed: {error}")

    def with_workspace(self, op: str, *fields: Any) -> None:
        size = getattr(native.module, f"cuda_{op}_workspace")(*fields, 0)
        memory = torch.empty(size, dtype=torch.uint8, device="cuda")
        self(op, *fields, memory.data_ptr())


_call = _Call()


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(first: Tensor | list[Tensor], *rest: Any) -> Any:
        with torch.cuda.device_of(head(first)):
            return op(_call, first, *rest)

    return run


adaround = _on_its_device(native.adaround)
adaround_backward = _on_its_device(native.adaround_backward)
fake_quant = _on_its_device(native.fake_quant)
fake_quant_out = _on_its_device(native.fake_quant_out)
fake_quant_backward = _on_its_device(native.fake_quant_backward)
fake_quant_lsq_backward = _on_its_device(native.fake_quant_lsq_backward)
quantize = _on_its_device(native.quantize)
dequantize = _on_its_device(native.dequantize)
fake_quant_many = _on_its_device(native.fake_quant_many)
fake_quant_many_out = _on_its_device(native.fake_quant_many_out)
fake_quant_many_backward = _on_its_device(native.fake_quant_many_backward)
fake_quant_minmax = _on_its_device(native.fake_quant_minmax)
fake_quant_minmax_out = _on_its_device(native.fake_quant_minmax_out)
channel_range = _on_its_device(native.channel_range)
lp_error = _on_its_device(native.lp_error)
bn_act = _on_its_device(native.bn_act)
bn_act_backward = _on_its_device(native.bn_act_backward)
channel_sums = _on_its_device(native.channel_sums)
channel_sums_backward = _on_its_device(native.channel_sums_backward)
distill_head = _on_its_device(native.distill_head)
distill_head_backward = _on_its_device(native.distill_head_backward)
cam_map = _on_its_device(native.cam_map)
cam_map_backward = _on_its_device(native.cam_map_backward)
count_active = _on_its_device(native.count_active)
qdrop = _on_its_device(native.qdrop)
qdrop_backward = _on_its_device(native.qdrop_backward)
view_images = _on_its_device(native.view_images)
view_images_backward = _on_its_device(native.view_images_backward)
resize_crops = _on_its_device(native.resize_crops)
resize_crops_backward = _on_its_device(native.resize_crops_backward)
