"""The front door: quantize, synthesize, evaluate, save and load."""

from zsq_ext.api.calls import quantize, synthesize
from zsq_ext.api.measure import Batches, Measure, evaluate, measured, top1
from zsq_ext.api.result import Result, load
from zsq_ext.core.spec import InputSpec

__all__ = [
    "Batches",
    "InputSpec",
    "Measure",
    "Result",
    "evaluate",
    "load",
    "measured",
    "quantize",
    "synthesize",
    "top1",
]
