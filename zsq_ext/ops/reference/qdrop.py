"""qdrop and its gradient.

Shapes: x, x_hat and their gradients are any shape; key is [2] int64, the key and the offset. threshold is the
probability times 2^24.
"""

import torch
from torch import Tensor

from zsq_ext.ops.layout import arranged, channels_last

_WORD = 0xFFFFFFFF


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(upper, lower) 32 bits of the product of two numbers of 32 bits, in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # below 2^48 each
    high = high + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox-4x32-10: four words from a counter of four and a key of two, each an int64 tensor below 2^32."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (upper_a, lower_a), (upper_b, lower_b) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = upper_b ^ c1 ^ k0, lower_b, upper_a ^ c3 ^ k1, lower_a
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


def _keeps(x: Tensor, threshold: int, key: Tensor) -> Tensor:
    """Element i of x, in the order of its shape, has word i % 4 of counter i // 4."""
    block = torch.arange((x.numel() + 3) // 4, device=x.device)
    key, offset = key.unbind()
    counter = [block & _WORD, block >> 32, offset & _WORD, offset >> 32 & _WORD]
    words = torch.stack(philox(counter, [key & _WORD, key >> 32 & _WORD]), -1)
    return ((words >> 8) < threshold).flatten()[: x.numel()].reshape(x.shape)


def qdrop(x: Tensor, x_hat: Tensor, threshold: int, key: Tensor) -> Tensor:
    return arranged(torch.where(_keeps(x, threshold, key), x, x_hat), channels_last(x))


def qdrop_backward(grad: Tensor, threshold: int, key: Tensor, need_x: bool, need_x_hat: bool) -> tuple[Tensor, Tensor]:
    """(dx, dx_hat), empty where they are not needed."""
    keep, last, nothing = _keeps(grad, threshold, key), channels_last(grad), grad.new_empty(0)
    dx = arranged(torch.where(keep, grad, 0), last) if need_x else nothing
    return dx, arranged(torch.where(keep, 0, grad), last) if need_x_hat else nothing
