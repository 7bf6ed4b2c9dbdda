"""Quantizers and their ranges, quantized modules, preparing a model and lowering it to integers."""
