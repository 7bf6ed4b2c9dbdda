"""The ops: fast, bit-exact across backends, and usable alone under autograd, compile and export."""

from zsq_ext.ops.fake_quant import fake_quant

__all__ = ["fake_quant"]
